"""The embedded world: a renderer of captioned scenes, a parser that reads them back, and small trained models."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"

WORLDS = {
    "shapes": ("sd3",),
    "shapes-edit": ("flux_kontext",),
    "shapes-fill": ("flux_fill",),
    "shapes-video": ("wan",),
}
"""Embedded world -> kinds of the generators that draw it. Its prompts are `<world>:train` and `<world>:heldout`."""


def weights(name: str) -> Path:
    """The folder of an embedded model, for `from_pretrained`: a pipeline, 'clip' or 'judge' with what they read with.

    Raises FileNotFoundError naming what exists.
    """
    folder = _WEIGHTS / name
    if name not in (found := sorted(p.name for p in _WEIGHTS.glob("*") if p.is_dir())):
        raise FileNotFoundError(f"no embedded weights {name!r} in {_WEIGHTS}; there are: {', '.join(found) or 'none'}")
    return folder


def pipelines(world: str) -> dict[str, Path]:
    """Kind of generator -> folder of its pipeline, of a world in `WORLDS`; empty if there is no such world."""
    return {kind: folder for kind in WORLDS.get(world, ()) if (folder := _WEIGHTS / kind).is_dir()}
