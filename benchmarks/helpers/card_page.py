"""The table of :mod:`benchmarks.card` for ``docs/benchmarks.md``, from the JSON files of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    "config", "samples", "images/s", "rollout (s)", "decode (s)", "score (s)", "learn (s)", "MFU rollout, learn",
    "over bare calls", "memory, check (GB)", "generated/s, diffusers", "log-probability gap, mean, 99 %",
)  # fmt: skip
NOTE = (
    "Weights are random, of the published shapes; prompts are random embeddings, without text encoders; the reward is "
    "a random CLIP ViT-H/14. MFU counts recomputed activations. The policy carries its LoRA, diffusers' pipeline none. "
    "Memory is that in use on the card after the first step."
)


def table(folder: Path, models: Iterable[str]) -> str:
    """Markdown: a row per config whose part is there, and what was random."""
    lines = [_row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    cards = set()
    for model in models:
        beside = _read(folder / f"{model}.pipeline.json")
        for recipe in ("nft", "grpo"):
            found = _read(folder / f"{model}.{recipe}.json")
            if found:
                cards.add(f"{found['card']}, torch {found['torch']}")
                lines.append(_row(_cells(f"`{model}/{recipe}`", found, beside if recipe == "nft" else None)))
    return "\n".join([*lines, "", f"{'; '.join(sorted(cards)) or 'Nothing measured'}. {NOTE}"])


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _cells(name: str, found: dict[str, Any], beside: dict[str, Any] | None) -> list[str]:
    seconds, samples, gap = found["seconds"], found["samples"], found["gap"]
    whole, bare = sum(seconds.values()), sum(found["bare"].values())
    generating = samples / (seconds["rollout"] + seconds["decode"])
    theirs = f"{generating:.3g}, {beside['images_per_second']:.3g}" if beside else ""
    shares = [f"{100 * share:.0f} %" for share in found["mfu"].values()]
    return [
        name,
        f"{samples} of {found['group']}",
        f"{found['images_per_second']:.3g}",
        *(f"{seconds[phase]:.2f}" for phase in ("rollout", "decode", "reward", "update")),
        ", ".join(shares),
        f"{100 * (whole / bare - 1):+.0f} %",
        f"{found['memory_gb']:.1f}, {found['check_gb']:.1f}",
        theirs,
        f"{gap['mean']:.2g}, {gap['p99']:.2g}" if gap else "",
    ]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
