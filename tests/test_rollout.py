"""What the samples of a rollout are drawn from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import sd3_pipeline
from tiny_run import settings

from align.policy.build import build_generator
from align.rollout.sources import OnlineSource, Share


@pytest.mark.parametrize("same", [True, False])
def test_one_initial_noise_for_a_group(same: bool, tmp_path: Path) -> None:
    """The first kept state is the group's own, or each sample's; the steps' noise always is each sample's."""
    folder = tmp_path / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    rollout = {"same_noise": same, "sampler": {"kind": "flow_sde", "steps": 3}}
    config = settings(tmp_path, folder, "grpo", rollout=rollout)
    source = OnlineSource(config, build_generator(config, "cpu"), Share(), keep=True)
    drawn = source(0)
    assert drawn.trajectory is not None
    first, last = drawn.trajectory.x[:, 0].reshape(2, 4, -1), drawn.latents.reshape(2, 4, -1)
    equal = (first == first[:, :1]).all(-1)
    assert equal.all() if same else not equal[:, 1:].any()
    assert not (first[0, 0] == first[1, 0]).all()
    assert not (last[:, 1:] == last[:, :1]).all(-1).any()
    assert torch.equal(source(0).latents, drawn.latents)
    assert not torch.equal(source(1).latents, drawn.latents)
