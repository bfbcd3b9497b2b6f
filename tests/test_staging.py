"""A rollout off the card: media in bytes, trajectories on the CPU, samples that overflowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live
from tiny_run import final_tensors, policy_gap, settings
from torch import Tensor

from align.data.media import from_bytes, to_bytes
from align.maths.samplers import Trajectory
from align.policy.build import build_generator
from align.rollout.rollout import decode, decode_to_cpu
from align.rollout.scoring import Scoring
from align.rollout.sources import OnlineSource, Share
from align.rollout.staging import on_cpu
from align.training.trainer import train
from generators.pinned import to_device
from rewards.base import Reward


@pytest.fixture
def generator(model: Path, tmp_path: Path) -> Any:
    config = settings(tmp_path, model)
    return build_generator(config.generator, config.memory, "cpu")


def test_bytes_are_rounded_as_when_saved() -> None:
    media = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 128.4 / 255, 1.0, 1.3])
    assert to_bytes(media).tolist() == [0, 0, 0, 1, 128, 255, 255]
    every = torch.arange(256).byte()
    assert torch.equal(to_bytes(from_bytes(every)), every)


def test_float_pixels_live_for_one_chunk(generator: Any) -> None:
    latents = generator.noise(list(range(8)))
    peaks = {}
    for chunk in (1, 8):
        with torch.no_grad(), Live() as live:
            media, broken = decode_to_cpu(generator, latents, chunk)
        peaks[chunk] = live.peak
        assert torch.equal(media, to_bytes(decode(generator, latents, chunk)))
    assert (media.dtype, tuple(media.shape), broken) == (torch.uint8, (8, 3, 32, 32), {})
    assert peaks[1] < peaks[8] / 4


@pytest.mark.parametrize("scope", ["sample", "group", "batch"])
def test_a_sample_that_overflowed_has_no_score(
    scope: Any, generator: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = generator.decode

    def overflows(latents: Tensor) -> Tensor:
        media = decoded(latents)
        media[1::4, 0, 0, 0] = torch.inf
        return media

    monkeypatch.setattr(generator, "decode", overflows)
    config = settings(tmp_path, model, rollout={"decode_chunk": 4})
    scoring = Scoring(Reward("mean", lambda media, *_: media.flatten(1).mean(1), scope=scope))
    drawn = OnlineSource(config, generator, Share())(0, ready=scoring.add)
    scores = scoring.scores()
    assert scores.values.isnan().nonzero().flatten().tolist() == [1, 5]
    assert {*scores.reasons} == {1, 5}
    assert "the network or its VAE overflowed" in scores.reasons[5]
    right = [0, 2, 3, 4, 6, 7]
    assert torch.equal(scores.values[right], from_bytes(drawn.media[right]).flatten(1).mean(1))


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", ["grpo", "re_dmd", "vgpo"])
def test_a_trajectory_on_the_cpu_trains_the_same_weights(recipe: str, model: Path, tmp_path: Path) -> None:
    found = []
    for place in ("device", "cpu"):
        (tmp_path / place).mkdir()
        config = settings(tmp_path / place, model, recipe, train={"steps": 1}, memory={"trajectories": place})
        train(config)
        found.append(final_tensors(config))
    assert policy_gap(*found) == 0


def test_rows_of_a_trajectory_are_copied_back() -> None:
    states, numbers = torch.rand(4, 2, 3), torch.zeros(4, 2)
    path = Trajectory(states, states + 1, states + 2, numbers, numbers, torch.ones(2), torch.zeros(2), 0.9, (0, 1))
    staged = on_cpu(path)
    rows, steps = torch.tensor([3, 0]), torch.tensor([1, 0])
    assert torch.equal(to_device(staged.x_next[rows, steps], torch.device("cpu")), states[rows, steps] + 1)
    assert to_device(staged.mean, torch.device("meta")).shape == (4, 2, 3)
