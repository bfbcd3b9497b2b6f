"""Rewards that score each sample against its prompt's row; an invalid row loses only its own score."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignflow.lazy import lazy
from rewards.base import Scores
from rewards.frames import middles

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def by_row(
    media: Tensor, rows: Sequence[Any], judge: Callable[[Tensor, Any], Mapping[str, float]], frames: int | None = None
) -> dict[str, Scores]:
    """Name -> scores of all samples; a video's are the means of its frames'.

    Args:
        media: ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1].
        rows: what each sample is judged by, N of them.
        judge: ``(frames [f, 3, H, W], row) -> name -> mean score of the frames``; always the same names. A
            ``ValueError`` says why this sample has no score.
        frames: frames of a video that are judged, in the middles of equal stretches; all by default.
    """
    videos = (media if media.ndim == 5 else media[:, None]).detach()
    chosen = middles(videos.shape[1], frames)
    values: dict[str, Tensor] = {}
    reasons: dict[int, str] = {}
    for index, row in enumerate(rows):
        try:
            if not videos[index].isfinite().all():
                raise ValueError("the media hold NaN or infinity")
            found = judge(videos[index, chosen], row)
        except ValueError as error:
            reasons[index] = str(error)
            continue
        for name, value in found.items():
            values.setdefault(name, torch.full((len(rows),), torch.nan))[index] = value
    return {name: Scores(column, reasons) for name, column in values.items()} or {"": _none(len(rows), reasons)}


def chosen_score(columns: Mapping[str, Scores], name: str) -> Scores:
    """The column ``name`` as the score, all columns as its parts; where no sample has one, the reasons alone."""
    found = columns.get(name) or next(iter(columns.values()))
    return Scores(found.values, found.reasons, {key: column.values for key, column in columns.items() if key})


def column(row: Mapping[str, Any], name: str, kind: type, what: str, default: Any = None) -> Any:
    """``row[name]``, read as JSON where a table could only hold text.

    Args:
        kind: what it should be, ``list``, ``str`` ...
        what: what it should hold, for the message.
        default: instead of a column that is missing or empty; None = it must be there.

    Raises:
        ValueError: missing, not JSON, or of another kind.
    """
    value = row.get(name)
    if value is None:
        if default is not None:
            return default
        raise ValueError(
            f"the prompt's row has no {name!r} ({what}); its columns: {', '.join(map(str, row)) or 'none'}"
        )
    if isinstance(value, str) and kind is not str:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"column {name!r} should be JSON ({what}): {error}") from None
    if not isinstance(value, kind):
        raise ValueError(f"column {name!r} should be a {kind.__name__} ({what}), is {value!r}")
    return value


def eight_bit(images: Tensor) -> Any:
    """``[N, 3, H, W]`` in [0, 1] -> uint8 array ``[N, H, W, 3]``, rounded as when saved."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _none(count: int, reasons: Mapping[int, str]) -> Scores:
    return Scores(torch.full((count,), torch.nan), reasons)
