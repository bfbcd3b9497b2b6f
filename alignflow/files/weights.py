"""Check that all weights of a network were loaded and are finite: one rule for generators and rewards.

No torch at import: tensors are inspected through their own methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

UNUSED = ("position_ids", "inv_freq", "num_batches_tracked")
"""Ends of keys that older files hold and networks compute by themselves."""


def unaccounted(
    report: Mapping[str, Collection[Any]],
    parts: Collection[str] | None = None,
    idle: tuple[str, ...] = (),
) -> list[str]:
    """Problems of a network in the loading report of ``from_pretrained(..., output_loading_info=True)``.

    Args:
        report: of diffusers or transformers, which both leave out tied weights and those that a class may lack.
        parts: names of the network's top-level modules and parameters. An unexpected key elsewhere belongs to a head
            that this class does not have, which is not an error. None: every unexpected key is one.
        idle: keys that contain one of these do not matter.

    Returns:
        ``3 weights are missing (a, b, c)`` and the like; empty where every key is accounted for.
    """

    def matters(key: str) -> bool:
        return not key.endswith(UNUSED) and not any(word in key for word in idle)

    missing = sorted(key for key in report.get("missing_keys", ()) if matters(key))
    unexpected = sorted(
        key
        for key in report.get("unexpected_keys", ())
        if matters(key) and (parts is None or missing or key.split(".")[0] in parts)
    )
    shapes = sorted(
        f"{key} {list(found)} for {list(wanted)}"
        for key, found, wanted in report.get("mismatched_keys", ())
        if matters(key)
    )
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    return [f"{counted(len(keys), 'weight')} {how} ({first(keys)})" for how, keys in lists.items() if keys]


def not_finite(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; integers and tensors without memory are passed over."""
    return [name for name, value in tensors if not is_finite(value)]


def is_finite(value: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinity, without a copy of it."""
    if value.is_meta or not value.is_floating_point() or not value.numel():
        return True
    if value.element_size() == 1:  # float8 has no comparison
        value = value.float()
    return all(bool(bound.isfinite()) for bound in value.detach().aminmax())


def first(names: Collection[str], most: int = 3) -> str:
    """The first few of ``names``, with dots where there are more."""
    shown = list(names)[:most]
    return ", ".join([*shown, "..."] if len(names) > most else shown)


def counted(number: int, word: str) -> str:
    """``1 weight is``, ``2 weights are``."""
    return f"{number} {word} is" if number == 1 else f"{number} {word}s are"
