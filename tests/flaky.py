"""Rewards that fail once, as a file in the folder ``FLAKY`` says: kill, hang, nan."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

calls = 0
"""How often :func:`_after` was asked."""


def _after(count: int) -> bool:
    """Whether it was asked ``count`` times before."""
    global calls
    calls += 1
    return calls > count


def falls_silent(media: Tensor, prompts: list[str], after: int) -> Tensor:
    """Scores so many times, then gives no score any more."""
    return torch.full((len(media),), torch.nan) if _after(after) else judge(media, prompts)


def edits(media: Tensor, prompts: list[str], image: Tensor, metadata: list[dict]) -> Tensor:
    """Likeness to the source, plus what the prompts' rows say."""
    return -(media - image).abs().mean(dim=(1, 2, 3)) + torch.tensor([float(row["bonus"]) for row in metadata])


def claim(name: str) -> bool:
    """Whether this call is the one that is to fail: the file holds how many are let pass first."""
    file = Path(os.environ["FLAKY"]) / name
    try:
        left = int(file.read_text() or 0)
        if left:
            file.write_text(str(left - 1))
        else:
            file.unlink()
    except OSError:
        return False
    return not left


def judge(media: Tensor, prompts: list[str]) -> Tensor:
    """Red minus the other channels, one sample at a time, so that no batch changes a bit."""
    if claim("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if claim("hang"):
        time.sleep(8)
    return torch.stack([one[..., 0, :, :].mean() - one[..., 1:, :, :].mean() for one in media])


def blinks(media: Tensor, prompts: list[str]) -> Tensor:
    """The same, but for one sample that it does not see."""
    values = judge(media, prompts)
    if claim("nan"):
        values[0] = torch.nan
    return values


def slow(media: Tensor, prompts: list[str]) -> Tensor:
    """The same after a pause that costs no CPU."""
    time.sleep(0.4)
    return judge(media, prompts)


def grouped(media: Tensor, prompts: list[str], group: Tensor) -> Tensor:
    """How far a sample is from the mean of its prompt: wrong where a prompt's samples are torn apart."""
    values = judge(media, prompts)
    means = {int(g): values[group == g].mean() for g in group.unique()}
    return torch.stack([value - means[int(g)] for value, g in zip(values, group, strict=True)])


def refuses(media: Tensor, prompts: list[str]) -> Tensor:
    """A reward for videos only."""
    from rewards.base import RewardError

    raise RewardError("this judge reads videos, got images")


def poisoned(media: Tensor, prompts: list[str]) -> Tensor:
    """Raises if any prompt is ``poison``."""
    if "poison" in prompts:
        raise ValueError("poison")
    return judge(media, prompts)


def counted(media: Tensor, prompts: list[str]) -> Tensor:
    """How many samples were scored together."""
    time.sleep(0.05)
    return torch.full((len(media),), float(len(media)))


def endless(media: Tensor, prompts: list[str]) -> Tensor:
    """The same, an hour later where a prompt asks for work."""
    if "work" in prompts:
        time.sleep(3600)
    return judge(media, prompts)
