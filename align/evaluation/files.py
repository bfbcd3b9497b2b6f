"""Scoring of image and video files, as in ``alignflow score``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.inputs import read_inputs
from align.data.media import Recording, read_recording, to_tensor
from align.data.prompts import Prompt, check_media
from align.evaluation.score_items import Item, items_of
from alignflow.errors import DataError
from alignflow.secrets import shown
from rewards.base import RewardError, widest_known
from rewards.rate import videos_at

if TYPE_CHECKING:
    from rewards.base import Reward, RewardSettings, Scores

HELD = 256 << 20
"""Bytes of pixels (8 bit) held at a time, unless samples that must be scored together have more."""
Row = dict[str, Any]


def score_files(
    files: Sequence[Path],
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardSettings],
    device: str = "cpu",
    chunk: int = 16,
) -> list[Row]:
    """:func:`score_items` of files, folders or tables, all rows at once.

    Raises:
        DataError: also the first file that cannot be read.
    """
    rows = list(score_items(items_of(files, prompts), build(rewards, device), device, chunk))
    for row in rows:
        if row["unread"]:
            raise DataError(row["unread"])
    return rows


def build(rewards: Mapping[str, RewardSettings], device: str) -> dict[str, Reward]:
    """The rewards, ready; RewardError for one that learns while a policy trains."""
    return {name: settings.build(device).fixed() for name, settings in rewards.items()}


def score_items(
    items: Iterable[Item], rewards: Mapping[str, Reward], device: str = "cpu", chunk: int = 16
) -> Iterator[Row]:
    """Rows as they are scored: ``file, prompt, scores: {name: value or None}, reasons: {name: why None}, unread``.

    ``parts: {name: {part: value or None}}`` of a row holds the parts of its scores, such as the members of a mixture.

    Rewards that score each sample separately take ``chunk`` samples of one size at a time. Rewards that compare the
    samples of a prompt take them together, and those that compare all samples take all; then rows come prompt by
    prompt. A score without a sample to compare with is missing, with a reason, and its parts are there.

    Args:
        items: samples of any size; what a reward needs beside them is read at the same size.
        chunk: samples scored at once.
    """
    scope = widest_known([reward.scope for reward in rewards.values()])
    for bundle in _bundles(items, str(scope), chunk):
        yield from _Bundle(bundle, rewards, device, chunk).rows()


def parts_of(row: Row) -> dict[str, float | None]:
    """Column -> value of the parts in a row of :func:`score_items`, called ``reward/part`` as held-out scores are."""
    return {f"{name}/{part}": value for name, parts in row["parts"].items() for part, value in parts.items()}


def _bundles(items: Iterable[Item], scope: str, chunk: int) -> Iterator[Iterator[Item]]:
    """Bundles of samples, each read and scored before the next; endless if only memory limits it."""
    if scope == "sample":
        stream = iter(items)
        for first in stream:
            yield _chain(first, stream)
        return
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.prompt.text if scope == "group" else "", []).append(item)
    for group in groups.values():
        yield iter(group)


def _chain(first: Item, rest: Iterator[Item]) -> Iterator[Item]:
    yield first
    for item in rest:  # noqa: UP028, "yield from" would end the stream together with this bundle
        yield item


@dataclass
class _Read:
    item: Item
    row: Row
    found: Recording

    @property
    def pixels(self) -> np.ndarray:
        """uint8 ``[H, W, 3]`` or ``[F, H, W, 3]``."""
        return self.found.pixels


class _Bundle:
    """Samples that are in memory together."""

    def __init__(self, items: Iterator[Item], rewards: Mapping[str, Reward], device: str, chunk: int) -> None:
        self.rewards, self.device, self.chunk = rewards, device, chunk
        self.whole = any(reward.scope != "sample" for reward in rewards.values())
        self.all: list[Row] = []
        self.read: list[_Read] = []
        size = 0
        for item in items:
            one = self._read(item)
            if one is not None:
                self.read.append(one)
                size += one.pixels.nbytes
            if not self.whole and (len(self.all) >= chunk or size >= HELD):
                return

    def rows(self) -> list[Row]:
        """The rows, scored."""
        for name, reward in self.rewards.items():
            if reward.scope == "sample":
                for some in self._by_size():
                    self._score(name, reward, some)
            else:
                self._compare(name, reward)
        return self.all

    def _read(self, item: Item) -> _Read | None:
        row: Row = {"file": shown(item.name), "prompt": item.prompt.text, "scores": dict.fromkeys(self.rewards),
                    "reasons": {}, "parts": {}, "unread": ""}  # fmt: skip
        self.all.append(row)
        try:
            if item.source is None:
                raise DataError(item.error)
            content = item.source if isinstance(item.source, Path) else item.source.content()
            if content is None:
                raise DataError(f"{item.name}: the cell is empty")
            return _Read(item, row, read_recording(content))
        except DataError as error:
            row["unread"] = shown(error)
            row["reasons"] = dict.fromkeys(self.rewards, row["unread"])
            return None

    def _by_size(self) -> Iterator[list[_Read]]:
        sizes: dict[Any, list[_Read]] = {}
        for one in self.read:
            sizes.setdefault((one.pixels.shape, one.found.fps), []).append(one)
        for some in sizes.values():
            for start in range(0, len(some), self.chunk):
                yield some[start : start + self.chunk]

    def _compare(self, name: str, reward: Reward) -> None:
        """Score samples that are compared at once, where they can be."""
        groups: dict[str, list[_Read]] = {}
        for one in self.read:
            groups.setdefault(one.item.prompt.text if reward.scope == "group" else "", []).append(one)
        for some in groups.values():
            sizes = {one.pixels.shape for one in some}
            if len(sizes) > 1:
                said = ", ".join(sorted(" x ".join(map(str, size[:-1])) for size in sizes)[:4])
                self._missing(name, some, f"{reward.name} compares samples, which must be of one size; they are {said}")
                continue
            self._score(name, reward, some)
            if len(some) == 1:
                some[0].row["scores"][name] = None
                kind = "the samples of a prompt" if reward.scope == "group" else "all samples"
                why = f"{reward.name} compares {kind} with one another, and there is only this one"
                self._missing(name, some, why)

    def _score(self, name: str, reward: Reward, some: Sequence[_Read]) -> None:
        try:
            prompts = [one.item.prompt for one in some]
            check_media(prompts, reward.wants, f"reward {reward.name!r}")
            inputs = read_inputs(prompts, reward.wants, some[0].pixels.shape[-3:-1])
        except DataError as error:
            if len(some) == 1 or reward.scope != "sample":
                self._missing(name, some, str(error))
            else:
                for one in some:
                    self._score(name, reward, [one])
            return
        media = to_tensor(np.stack([one.pixels for one in some])).to(self.device)
        rates = {one.found.fps for one in some}
        try:
            with videos_at(rates.pop() if len(rates) == 1 else None):
                scores = reward(media, [prompt.text for prompt in prompts], None, inputs)
            self._note(name, reward, some, scores)
        except RewardError as error:
            self._missing(name, some, str(error))

    def _note(self, name: str, reward: Reward, some: Sequence[_Read], scores: Scores) -> None:
        values = scores.values.detach().cpu().tolist()
        for index, (one, value) in enumerate(zip(some, values, strict=True)):
            one.row["scores"][name] = None if np.isnan(value) else value
            if index in scores.reasons:
                one.row["reasons"][name] = scores.reasons[index]
            if scores.parts:
                parts = {part: float(column[index]) for part, column in scores.parts.items()}
                one.row["parts"][name] = {part: None if np.isnan(number) else number for part, number in parts.items()}

    def _missing(self, name: str, some: Sequence[_Read], why: str) -> None:
        for one in some:
            one.row["reasons"][name] = why
