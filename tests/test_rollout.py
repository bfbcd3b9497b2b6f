"""What the samples of a rollout are drawn from."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from tiny import sd3_pipeline
from tiny_run import settings
from torch import Tensor

from align.config.load import load_config
from align.evaluation.evaluate import sample_media
from align.policy.build import build_generator
from align.rollout.sources import OnlineSource, Share
from generators.base import Conditioning


@pytest.mark.parametrize("same", [True, False])
def test_one_initial_noise_for_a_group(same: bool, tmp_path: Path) -> None:
    """The first kept state is the group's own, or each sample's; the steps' noise always is each sample's."""
    folder = tmp_path / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    rollout = {"same_noise": same, "sampler": {"kind": "flow_sde", "steps": 3}}
    config = settings(tmp_path, folder, "grpo", rollout=rollout)
    source = OnlineSource(config, build_generator(config.generator, config.memory, "cpu"), Share(), ("trajectory",))
    drawn = source(0)
    assert drawn.trajectory is not None
    first, last = drawn.trajectory.x[:, 0].reshape(2, 4, -1), drawn.latents.reshape(2, 4, -1)
    equal = (first == first[:, :1]).all(-1)
    assert equal.all() if same else not equal[:, 1:].any()
    assert not (first[0, 0] == first[1, 0]).all()
    assert not (last[:, 1:] == last[:, :1]).all(-1).any()
    assert torch.equal(source(0).latents, drawn.latents)
    assert not torch.equal(source(1).latents, drawn.latents)


class Rows:
    """Counts the rows and bytes of conditioning that live whenever the network is called."""

    def __init__(self) -> None:
        self.rows, self.bytes = 0, 0
        gc.collect()
        self.before = self.alive()

    def alive(self) -> list[Conditioning]:
        return [one for one in gc.get_objects() if type(one) is Conditioning and one.tensors]

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        known = {id(one) for one in self.before}
        alive = [one for one in self.alive() if id(one) not in known]
        stored = {value.untyped_storage() for one in alive for value in one.tensors.values()}
        self.rows = max(self.rows, sum(len(one) for one in alive))
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in stored))
        return torch.zeros_like(x)


@pytest.mark.slow
@pytest.mark.parametrize("drawn_by", ["source", "sample_media"])
def test_conditioning_is_held_once_a_prompt_and_for_one_chunk(
    drawn_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the prompts, samples and chunk of configs/sd35-medium."""
    folder = tmp_path / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    prompts, group, chunk = 48, 24, 24
    (tmp_path / "many.txt").write_text("".join(f"a cat number {n}\n" for n in range(prompts)))
    config = settings(
        tmp_path, folder, prompts={"train": str(tmp_path / "many.txt")},
        rollout={"prompts": prompts, "group": group, "chunk": chunk},
    )  # fmt: skip
    real = load_config(Path(__file__).parent.parent / "configs/sd35-medium/nft.yaml").rollout
    assert (real.prompts, real.group, getattr(real, "chunk", None)) == (prompts, group, chunk)
    generator = build_generator(config.generator, config.memory, "cpu")
    each = sum(value.numel() * value.itemsize for value in generator.encode(["a cat"]).tensors.values())
    seen = Rows()
    monkeypatch.setattr(generator, "velocity", seen)
    monkeypatch.setattr(generator, "decode", lambda x: x[:, :3])
    if drawn_by == "source":
        OnlineSource(config, generator, Share())(0)
    else:
        asked = [f"a cat number {n}" for n in range(prompts) for _ in range(group)]
        sample_media(generator, asked, list(range(len(asked))), config.evaluate.sampler, chunk)
    assert chunk < seen.rows <= prompts + chunk
    assert seen.bytes <= (prompts + chunk) * each
    assert 10 * seen.bytes < prompts * group * each
