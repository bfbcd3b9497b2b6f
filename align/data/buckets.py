"""Sizes for stored images and videos of different shapes: every batch has one size, all sizes about as many pixels.

Aspect buckets as SDXL was trained with (arXiv 2307.01952, section 2.3 and appendix I); the sizes are made as in
kohya-ss/sd-scripts, library/model_util.py. Media are resized to cover their bucket and cropped about the middle;
nothing is padded. No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.data.media import size_of
from align.data.prompts import Prompt
from align.data.tables import Cell
from align.maths.seeds import derive
from alignflow.errors import DataError
from alignflow.words import count as counted

if TYPE_CHECKING:
    from align.config.sources import Buckets

Size = tuple[int, int]
"""Height and width in pixels."""


# -- sizes ------------------------------------------------------------------------------------------------------------


def sizes(size: Size, unit: int, ratio: float) -> list[Size]:
    """The buckets beside ``size``, from the widest to the tallest.

    A bucket has at most the pixels of ``size``, and more than ``1 - unit / longer side`` of them.

    Args:
        unit: sides are multiples of it.
        ratio: of the longer to the shorter side, at most; ``size`` itself may exceed it.
    """
    area, found = size[0] * size[1], {size}
    for short in range(unit, math.isqrt(area) + 1, unit):
        long = area // short // unit * unit
        if long <= ratio * short:
            found |= {(short, long), (long, short)}
    largest = [one for one in found if not any(one != o and one[0] <= o[0] and one[1] <= o[1] for o in found)]
    return sorted(largest, key=lambda one: one[0] / one[1])


def nearest(height: float, width: float, among: Sequence[Size]) -> int:
    """Number of the bucket whose ratio of sides is nearest, by the ratio of the ratios; the first of equals."""
    return min(range(len(among)), key=lambda n: abs(math.log(height / width * among[n][1] / among[n][0])))


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Division:
    """Rows of a table divided among buckets.

    Args:
        sizes: the buckets.
        bucket: number of the bucket of every row.
        enlarged: images or videos with fewer pixels on a side than they are resized to.
        beyond: rows with a ratio of sides that is larger than allowed, of which more is cropped.
        apart: rows whose images would be in different buckets.
    """

    sizes: list[Size]
    bucket: list[int]
    enlarged: int = 0
    beyond: int = 0
    apart: int = 0

    def said(self, batch: int) -> str:
        """Buckets with their rows, and what happens to rows, in one line.

        Args:
            batch: rows per step.
        """
        rows = Counter(self.bucket)
        used = [f"{self.sizes[n][0]} x {self.sizes[n][1]} ({rows[n]})" for n in range(len(self.sizes)) if rows[n]]
        small = sum(number for number in rows.values() if number < batch)
        steps = sum(math.ceil(number / batch) for number in rows.values())
        notes = {
            f"{counted(small, 'row')} in buckets of fewer rows than rollout.prompts {batch}, in smaller batches": small,
            f"{counted(self.enlarged, 'file')} smaller than the bucket, enlarged": self.enlarged,
            f"{counted(self.beyond, 'row')} beyond rollout.buckets.ratio, cropped to the last bucket": self.beyond,
            f"{counted(self.apart, 'row')} with sides of different shapes, cropped to one": self.apart,
        }
        said = "; ".join(text for text, number in notes.items() if number)
        found = f"height x width (rows): {', '.join(used)}; {counted(steps, 'step')} a pass"
        return f"{found}; {said}" if said else found


def divided(
    prompts: Sequence[Prompt],
    columns: Sequence[str],
    settings: Buckets,
    among: list[Size],
    skipped: dict[str, str] | None = None,
) -> tuple[list[int], Division]:
    """The rows that are used, by index, and their buckets. Only the headers of files are read.

    A row of several images goes to the bucket that is nearest to the geometric mean of their ratios.

    Args:
        columns: images or videos of a row.
        among: the buckets, see :func:`sizes`.
        skipped: takes place -> why of rows that cannot be used; None = they are errors.

    Raises:
        DataError: an image cannot be read, or has a larger ratio than ``settings`` allow; names the row.
    """
    used, bucket, enlarged, beyond, apart = [], [], 0, 0, 0
    for index, prompt in enumerate(prompts):
        try:
            shapes = [_size(prompt, name) for name in columns]
            far = [one for one in shapes if max(one) > settings.ratio * min(one)]
            if far and settings.beyond == "stop":
                limit = f"more than rollout.buckets.ratio {settings.ratio:g}; crop it, or use beyond: crop"
                raise DataError(f"{prompt.where}: {far[0][0]} x {far[0][1]} pixels, {limit}")
        except DataError as error:
            if skipped is None:
                raise
            skipped[prompt.place] = str(error)
            continue
        mean = math.exp(sum(math.log(height / width) for height, width in shapes) / len(shapes))
        chosen = nearest(mean, 1.0, among)
        used.append(index)
        bucket.append(chosen)
        enlarged += sum(height < among[chosen][0] or width < among[chosen][1] for height, width in shapes)
        beyond += bool(far)
        apart += len({nearest(*one, among) for one in shapes}) > 1
    return used, Division(among, bucket, enlarged, beyond, apart)


def _size(prompt: Prompt, name: str) -> Size:
    source = prompt.media[name]
    try:
        content = source.content() if isinstance(source, Cell) else source
        if content is None:
            raise DataError("is empty")
        return _of_file(content) if isinstance(content, Path) else size_of(content)
    except DataError as error:
        raise DataError(f"{prompt.where}: {name!r}: {error}") from None


@lru_cache(maxsize=2**20)  # `check` asks twice
def _of_file(path: Path) -> Size:
    return size_of(path)


# -- batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Rows of each step: pass after pass, each with every row once, in batches of one bucket.

    A bucket of n rows makes ``ceil(n / batch)`` batches of nearly equal sizes. A function of the step alone, so that
    neither a resumed run nor the number of processes changes it.

    Args:
        bucket: number of the bucket of every row.
        batch: rows per step, at most.
    """

    def __init__(self, bucket: Iterable[int], batch: int, seed: int) -> None:
        numbers, self.batch, self.seed = np.array([*bucket]), batch, seed
        self.rows = [np.flatnonzero(numbers == n) for n in sorted({*numbers.tolist()})]
        self.steps = sum(math.ceil(len(rows) / batch) for rows in self.rows)
        self._known: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> list[int]:
        """Rows of a step (from 0), over all processes."""
        number, offset = divmod(step, self.steps)
        if self._known[0] != number:
            self._known = number, self._pass(number)
        return self._known[1][offset]

    def _pass(self, number: int) -> list[list[int]]:
        source = np.random.default_rng(derive(self.seed, "bucket pass", number))
        shuffled = [np.array_split(source.permutation(rows), math.ceil(len(rows) / self.batch)) for rows in self.rows]
        found = [part.tolist() for parts in shuffled for part in parts]
        return [found[place] for place in source.permutation(len(found))]
