"""The embedded world's gold reward for edits and fills: checks the change and the unchanged rest. No model.

The source and the result are read back into scenes. Reads `alignflow.worlds.shapes` as `rewards.worlds.shapes` does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from alignflow.worlds.shapes.edits import change, fill, parse_instruction, read_mask
from alignflow.worlds.shapes.parse import parse_image
from alignflow.worlds.shapes.world import Obj, Scene, parse_caption
from rewards.worlds.shapes import score_each

AT_PLACE, ELSEWHERE = 4.0, 12.0  # canvas units between two centres: up to the first the same place, from the second not
NAMES = ("strict", "dense", "done", "kept")
_edit, _spec = lru_cache(4096)(parse_instruction), lru_cache(4096)(parse_caption)


def score_edits(images: Any, sources: Any, prompts: list[str]) -> dict[str, Any]:
    """'strict', 'dense', 'done' and 'kept' of images [N, 3, H, W] in [0, 1] made from `sources`; see `judge_edit`.

    NaN with a reason if a prompt is not an instruction, or its source does not hold exactly one such object.
    """

    def score(image: np.ndarray, asked: tuple[np.ndarray, str]) -> tuple[float, ...]:
        source = parse_image(asked[0])
        return judge_edit(parse_image(image), source, *change(source, _edit(asked[1])))

    return score_each(images, list(zip(_pixels(sources), prompts, strict=True)), score, NAMES)


def score_fills(images: Any, sources: Any, masks: Any, prompts: list[str]) -> dict[str, Any]:
    """The same of images whose masks [N, 1, H, W], 1 = repainted, hide an object; a prompt says what belongs there.

    NaN with a reason where a prompt is not the caption of one object with its colour, or a mask is empty.
    """

    def score(image: np.ndarray, asked: tuple[np.ndarray, np.ndarray, str]) -> tuple[float, ...]:
        source, (want, *others) = parse_image(asked[0]), _spec(asked[2]).wants
        if others:
            raise ValueError(f"caption {asked[2]!r} names two kinds of object; a hole takes one object")
        hidden, target = fill(source, read_mask(asked[1][..., 0]), want)
        return judge_edit(parse_image(image), source, hidden, target.objects[-1])

    return score_each(images, list(zip(_pixels(sources), _pixels(masks), prompts, strict=True)), score, NAMES)


def _pixels(media: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(media, np.float32), -3, -1)


def judge_edit(result: Scene, source: Scene, old: Obj | None, new: Obj | None) -> tuple[float, float, float, float]:
    """(strict, dense, done, kept) of a scene in which `old` of the source should have become `new`.

    `done` in [0, 1] is how far what is at the new place is on the way from `old` to `new`, halved where an object that
    should have gone is still there; where nothing should come, whether it has gone. `kept` is the mean likeness of
    the source's other objects with what is now in their places, anything additional counting as one more object that
    is not alike, times 0.7 if the background is another. Dense is done * kept: 0 for the source itself, strict is 1
    exactly where dense is 1. `old` None adds, `new` None removes.
    """
    others = [o for o in source.objects if o != old]
    wanted = [*others, *([] if new is None else [new])]
    likes = np.array([[likeness(w, o) for o in result.objects] for w in wanted]).reshape(len(wanted), -1)
    rows, columns = linear_sum_assignment(likes, maximize=True)
    found = dict(zip(rows.tolist(), likes[rows, columns].tolist(), strict=True))
    free = [o for j, o in enumerate(result.objects) if j not in columns]
    left = max((likeness(old, o) for o in free), default=0.0) if old else 0.0
    before = likeness(new, old) if old and new else 0.0
    if new is None:
        done = 1.0 - left
    else:
        done = max(found.get(len(others), 0.0) - before, 0.0) / (1.0 - before)
        done *= 1.0 - left / 2 if before == 0 else 1.0
    alike, strange = sum(found.get(i, 0.0) for i in range(len(others))), len(free) - left
    kept = (alike / (len(others) + strange)) if others else 1.0 / (1.0 + strange)
    kept *= 1.0 if result.background == source.background else 0.7
    return float(done * kept == 1.0), done * kept, done, kept


def likeness(wanted: Obj, found: Obj) -> float:
    """In [0, 1]: the share of shape, colour (double each) and size that is right, times how near the places are."""
    same = 2 * (wanted.shape == found.shape) + 2 * (wanted.colour == found.colour) + (wanted.size == found.size)
    apart = np.hypot(*(np.add(wanted.box[:2], wanted.box[2:]) - np.add(found.box[:2], found.box[2:]))) / 2
    return same / 5 * float(np.clip((ELSEWHERE - apart) / (ELSEWHERE - AT_PLACE), 0, 1))
