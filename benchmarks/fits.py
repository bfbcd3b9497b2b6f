"""Which config fits on which card: the tables of docs/scale.md and docs/memory.md, printed.

    python -m benchmarks.fits

Everything is the estimate of ``alignflow check --card``, with the rewards of each config; nothing is loaded or run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from align.checking.architectures import parts_of
from align.checking.estimate import GB, estimate
from align.checking.fitting import fitting_swap
from align.config.load import load_config, overridden
from align.config.memory import PRESETS
from align.config.settings import Config
from alignflow.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
ONE_CARD = ("rollout.prompts=8",)
"""Overrides of the published configs, whose batches are for 8 cards or more."""
MODELS = {
    "sd35-medium": "SD3.5 medium",
    "flux-dev": "FLUX.1 dev",
    "qwen-image": "Qwen-Image",
    "wan21-1.3b": "Wan 2.1 1.3B, 81 frames",
    "wan22-i2v": "Wan 2.2 A14B, image to video, 81 frames",
}
CARDS = {12: "12gb", 16: "16gb", 24: "24gb", 48: "48gb", 80: "80gb", 141: "80gb"}
"""Size of a card in GB -> its preset."""
SWAPPED = {
    "flux-dev": ("24gb", "57", (12, 16, 24, 80)),
    "qwen-image": ("24gb", "60", (16, 24, 80)),
    "wan22-i2v": ("80gb", "40 in each of two networks", (80,)),
}
"""Model -> preset, its blocks, and the cards for which the number of swapped blocks is given."""


def with_preset(model: str, name: str, preset: str) -> Config:
    """A shipped config with a preset on one card, prompts uncached where text encoders are trained.

    Raises:
        ConfigError: the preset does not suit this config.
    """
    file = ROOT / "configs" / model / f"{name}.yaml"
    try:
        return load_config(file, [f"memory={preset}", *ONE_CARD])
    except ConfigError as error:
        if "memory.cache_prompts" not in str(error):
            raise
        return load_config(file, [f"memory={preset}", "memory.cache_prompts=none", *ONE_CARD])


@cache
def needed(model: str, name: str, preset: str) -> float:
    """Estimated bytes of a shipped config with a preset."""
    return estimate(with_preset(model, name, preset)).bytes


def swaps(model: str, preset: str, card: int) -> int | None:
    """Fewest swapped blocks with which ``nft.yaml`` fits with unquantised weights; None if all are not enough."""
    config = overridden(with_preset(model, "nft", preset), "memory.quantise=none")
    changes = fitting_swap(config, card * GB)
    return int(changes[-1].rpartition("=")[2]) if changes else None


def fitting(model: str, name: str, card: int) -> tuple[str, float] | None:
    """The largest preset, up to that of the card, with which a shipped config fits in ``card`` GB, and its bytes."""
    known = list(PRESETS)
    for preset in reversed(known[: known.index(CARDS[card]) + 1]):
        bytes_ = needed(model, name, preset)
        if bytes_ <= card * GB:
            return preset, bytes_
    return None


def machines(model: str) -> str:
    """A row of the table of docs/scale.md: GB with the preset of each card, a smaller preset, or blocks to swap."""
    cells = []
    for card, own in CARDS.items():
        if found := fitting(model, "nft", card):
            preset, bytes_ = found
            cells.append(f"{bytes_ / GB:.0f} GB" + ("" if preset == own else f", `{preset}`"))
        else:
            blocks = swaps(model, own, card)
            cells.append("no" if blocks is None else f"swap {blocks}")
    return f"| {MODELS[model]} | {' | '.join(cells)} |"


def swapping(model: str, cards: Sequence[int] = (12, 16, 24, 80)) -> str:
    """A row of the table of swapped blocks in docs/memory.md."""
    preset, blocks, given = SWAPPED[model]
    cells = [blocks, *(str(swaps(model, preset, card)) if card in given else "" for card in cards)]
    return f"| `configs/{model}/nft.yaml`, `{preset}` |{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def shipped() -> Iterator[tuple[str, str]]:
    """(folder, name) of every shipped training config of a real model whose networks are known."""
    for file in sorted(ROOT.glob("configs/*/*.yaml")):
        model, name = file.parent.name, file.stem
        apart = model in ("shared", "prompts", "rewards", "rewriting") or model.startswith("shapes")
        if not apart and name != "base" and not name.startswith("search"):
            generator = load_config(file).generator
            if parts_of(generator.kind, generator.path) is not None:
                yield model, name


def smallest() -> list[str]:
    """The rows of the table of docs/scale.md with the smallest card, and the preset there, of every shipped config."""
    rows: dict[tuple[int, str], dict[str, list[str]]] = {}
    for model, name in shipped():
        place = next(((card, found[0]) for card in CARDS if (found := fitting(model, name, card))), (0, ""))
        rows.setdefault(place, {}).setdefault(model, []).append(name)
    return [
        f"| {f'{card} GB' if card else 'none'} | {f'`{preset}`' if preset else ''} | "
        + "; ".join(f"`{model}`: {', '.join(names)}" for model, names in rows[card, preset].items())
        + " |"
        for card, preset in sorted(rows)
    ]


def main() -> None:
    """Print all rows."""
    for rows in ([machines(model) for model in MODELS], smallest(), [swapping(model) for model in SWAPPED]):
        print("\n".join(rows), end="\n\n")


if __name__ == "__main__":
    main()
