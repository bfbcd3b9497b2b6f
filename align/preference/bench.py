"""Evaluation of a reward on a published preference set, as in ``alignflow reward bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.data.inputs import read_inputs
from align.data.media import read_media
from align.data.prompts import Prompt, check_media
from align.preference import agreement as bench
from align.preference.formats import Media, Pair
from alignflow.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from rewards.base import Reward

ORDERED = 64
"""Pairs scored in both orders with a reward that declares that it does not compare samples."""


def measure(
    reward: Reward,
    pairs: Sequence[Pair],
    *,
    threshold: float | None = None,
    validation: Sequence[Pair] = (),
    tune_on_test: bool = False,
    draws: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> bench.Report:
    """Score the pairs and compare with what people prefer.

    Args:
        threshold: gaps up to it are ties; by default 0.
        validation: pairs of another split that the threshold is tuned on instead.
        tune_on_test: tune it on the very pairs, as published numbers of VideoGen-RewardBench were; the report says so.
        progress: called with the number of scored pairs.

    Raises:
        DataError: a file that cannot be read, a pair without an input of the reward, pairs in both splits, or more than
            one source of the threshold.
        RewardError: the reward cannot work.
    """
    if (threshold is not None) + bool(validation) + tune_on_test > 1:
        raise DataError("the tie threshold is given, tuned on validation pairs or tuned on the test pairs; choose one")
    _check_apart(validation, pairs)
    gap, order_gaps = _gaps(reward, pairs, device, progress)
    label = np.array([pair.label for pair in pairs])
    if validation:
        tuned = bench.tune(_gaps(reward, validation, device)[0], np.array([pair.label for pair in validation]))
        chosen = bench.Threshold(value=tuned, source="validation")
    elif tune_on_test:
        chosen = bench.Threshold(value=bench.tune(gap, label), source="test")
    else:
        chosen = bench.Threshold(value=threshold or 0.0, source="zero" if threshold is None else "given")
    cluster = np.array([pair.cluster for pair in pairs])
    order = bench.order(*order_gaps, threshold=chosen.value)
    return bench.report(gap, label, cluster, chosen, order, draws=draws, seed=seed)


def _check_apart(validation: Sequence[Pair], pairs: Sequence[Pair]) -> None:
    """A threshold from pairs that are tested too would be tuned on the test set."""
    known = {_key(pair.prompt, side) for pair in pairs for side in (pair.first, pair.second)}
    for pair in validation:
        if {_key(pair.prompt, pair.first), _key(pair.prompt, pair.second)} <= known:
            raise DataError(
                f"{pair.prompt.where}: this validation pair is among the test pairs too; take another split"
            )


def _key(prompt: Prompt, media: Media) -> tuple[Any, ...]:
    if isinstance(media, Path):
        return prompt.text, str(media.resolve())
    return prompt.text, media.row, media.name, id(media.column)


def _gaps(
    reward: Reward, pairs: Sequence[Pair], device: str, progress: Callable[[int], None] = lambda done: None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Gaps ``[M]``, and those of the pairs scored both ways, in their order and swapped.

    A reward that compares samples scores every pair in both orders, and the gap is the mean of the two.
    """
    check_media([pair.prompt for pair in pairs], reward.wants, f"reward {reward.name!r}")
    alone = reward.scope == "sample"
    known: dict[tuple[Any, ...], float] = {}
    gaps, forward, swapped = [], [], []
    for number, pair in enumerate(pairs, 1):
        sides = [pair.first, pair.second]
        if not alone or number <= ORDERED:
            there, back = _scores(reward, pair.prompt, sides, device), _scores(reward, pair.prompt, sides[::-1], device)
            forward.append(there[0] - there[1])
            swapped.append(back[0] - back[1])
            gaps.append(forward[-1] if alone else (forward[-1] - swapped[-1]) / 2)
        else:  # an image of many pairs is scored once
            keys = [_key(pair.prompt, side) for side in sides]
            for key, side in zip(keys, sides, strict=True):
                if key not in known:
                    known[key] = _scores(reward, pair.prompt, [side], device)[0]
            gaps.append(known[keys[0]] - known[keys[1]])
        progress(number)
    return np.array(gaps), (np.array(forward), np.array(swapped))


def _scores(reward: Reward, prompt: Prompt, sides: Sequence[Media], device: str) -> list[float]:
    """Scores of media of one prompt, together if they are of one size; NaN if there is none."""
    import torch

    media = [_read(side, prompt).to(device) for side in sides]
    together = all(one.shape == media[0].shape for one in media)
    if not together and reward.scope != "sample":
        size = (media[0].shape[-2], media[0].shape[-1])
        media, together = [_read(side, prompt, size).to(device) for side in sides], True
    calls: list[Tensor] = [torch.stack(media)] if together else [one[None] for one in media]
    values: list[float] = []
    for call in calls:
        size = (call.shape[-2], call.shape[-1])
        inputs = read_inputs([prompt] * len(call), reward.wants, size)
        group = torch.zeros(len(call), dtype=torch.long)
        values.extend(reward(call, [prompt.text] * len(call), group, inputs).values.detach().cpu().tolist())
    return values


def _read(media: Media, prompt: Prompt, size: tuple[int, int] | None = None) -> Tensor:
    content = media if isinstance(media, Path) else media.content()
    if content is None:
        raise DataError(f"{prompt.where}: the cell for the image is empty")
    return read_media(content, size)
