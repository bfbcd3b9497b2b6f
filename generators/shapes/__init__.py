"""The embedded world: a renderer of captioned scenes, the parser that reads them back, and small trained models."""

from __future__ import annotations

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def weights(name: str) -> Path:
    """The folder of an embedded model, for `from_pretrained`: 'sd3' a pipeline, 'clip' a CLIPModel and its processor.

    Raises FileNotFoundError naming what exists.
    """
    folder = _WEIGHTS / name
    if name not in (found := sorted(p.name for p in _WEIGHTS.glob("*") if p.is_dir())):
        raise FileNotFoundError(f"no embedded weights {name!r} in {_WEIGHTS}; there are: {', '.join(found) or 'none'}")
    return folder
