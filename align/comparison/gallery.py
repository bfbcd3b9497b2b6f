"""Samples of the same prompts and noise, side by side: before, and after with every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from align.comparison.arms import Arm
from align.comparison.entries import Key, Shot
from align.comparison.matching import same_noise
from align.report.charts import GAP, short
from align.report.images import LARGE_PAIRS, LARGE_VIDEOS, STRIP_SIDE, InlineImage, playing

MAX_ROWS, MAX_IMAGES = 16, 96
"""Rows of the gallery, and images in all."""


@dataclass(frozen=True)
class Image:
    """One sample of a row; ``label`` names the setting, ``score`` its judging score."""

    label: str
    tone: str
    image: InlineImage | None
    score: str


@dataclass(frozen=True)
class Row:
    """One prompt: before and after with every setting."""

    prompt: str
    images: list[Image]


@dataclass(frozen=True)
class Gallery:
    """All rows, how many prompts the settings share, and whether they share the noise as well."""

    rows: list[Row]
    total: int
    noise: bool


def gallery(arms: Sequence[Arm], name: str | None) -> Gallery | None:
    """Rows in the order of the first setting's samples, without selection; None if no prompt is shared.

    Of a setting with several seeds, the first run is shown.
    """
    shown = [arm for arm in arms if arm.first.shots[1]]
    if len(shown) < 2:
        return None
    noise = all(same_noise(shown[0].first, arm.first) for arm in shown)
    keys = [key for key in shown[0].first.shots[1] if all(key in arm.first.shots[1] for arm in shown)]
    noise = noise and bool(keys)
    ends = [{_key(key, noise): shot for key, shot in arm.first.shots[1].items()} for arm in shown]
    starts = {_key(key, noise): shot for key, shot in shown[0].first.shots[0].items()}
    shared = [key for key in ends[0] if all(key in one for one in ends)]
    if not shared:
        return None
    probe = _embedded(ends[0][shared[0]])
    video = ends[0][shared[0]].video is not None
    most = MAX_ROWS if probe is None or probe.crisp else LARGE_VIDEOS if video else LARGE_PAIRS
    most = max(1, min(most, MAX_IMAGES // (len(shown) + 1)))
    rows = [_row(key, starts.get(key), [one[key] for one in ends], shown, name) for key in shared[:most]]
    return Gallery(rows, len(shared), noise)


def _key(key: Key, noise: bool) -> Key:
    return key if noise else (key[0], "")


def _row(key: Key, start: Shot | None, ends: Sequence[Shot], arms: Sequence[Arm], name: str | None) -> Row:
    before = [] if start is None else [Image("before", "", _embedded(start), _score(start, name))]
    after = [
        Image(arm.label, arm.tone, _embedded(shot), _score(shot, name)) for arm, shot in zip(arms, ends, strict=True)
    ]
    return Row(key[0], [*before, *after])


def _embedded(shot: Shot) -> InlineImage | None:
    return playing(shot.image, shot.video, shot.fps, STRIP_SIDE)


def _score(shot: Shot, name: str | None) -> str:
    value = shot.scores.get(name) if name else None
    return GAP if value is None else short(value, 2)
