"""Code shared by the splits of the embedded worlds: specs of one split, and wrong captions. NumPy only."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

Spec = TypeVar("Spec", bound=Hashable)


def distinct_specs(
    split: str,
    n: int,
    seed: int,
    tasks: Sequence[str],
    sample: Callable[[str, np.random.Generator], Spec],
    held_out: Callable[[Spec], bool],
) -> list[Spec]:
    """`n` specs of split 'train' or 'heldout', the tasks in turn; distinct while the task has new ones to give."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    seen: set[Spec] = set()
    specs: list[Spec] = []
    while len(specs) < n:
        task, tries = tasks[len(specs) % len(tasks)], 0
        while True:
            spec = sample(task, rng)
            if held_out(spec) == (split == "heldout"):
                tries += 1
                if spec not in seen or tries > 10:
                    break
        seen.add(spec)
        specs.append(spec)
    return specs


def misnamed(
    spec: Spec,
    wrong: float,
    rng: np.random.Generator,
    change: Callable[[Spec, np.random.Generator], Spec],
    held_out: Callable[[Spec], bool],
) -> Spec:
    """`spec` after two chances `wrong` of a `change` to another of the same split."""
    side = held_out(spec)
    for _ in range(2):
        if rng.random() < wrong:
            spec = next(new for new in iter(partial(change, spec, rng), None) if held_out(new) == side)
    return spec
