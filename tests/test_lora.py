"""LoRA: only it is trained, and an untouched diffusers pipeline draws with it what we draw."""

from __future__ import annotations

import json
import os

import pytest
import tiny
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from align.policy.layers import LoraError
from align.policy.lora import FILE, add_lora, load_lora, save_lora
from alignflow.errors import RunFolderError
from generators.adapters.sd3 import SD3
from generators.base import Options

SIZE = (32, 32)


def sd3(dtype=torch.float32, seed=0):
    return SD3(tiny.sd3_pipeline(t5=False, seed=seed).to(dtype), Options(size=SIZE))


def trained(rank=4, alpha=16, dtype=torch.float32):
    """A generator whose LoRA is far from zero."""
    generator = sd3(dtype)
    parameters = add_lora(generator, rank, alpha)
    gen = torch.Generator().manual_seed(1)
    for _, value in parameters:
        value.data += 0.2 * torch.randn(value.shape, generator=gen)
    return generator


def velocity(generator):
    with torch.no_grad():
        return generator.velocity(generator.noise([0, 1]), torch.tensor(0.7), generator.encode(["a", "b"]))


def test_adds_nothing_at_first_and_trains_nothing_else():
    generator = sd3()
    before = velocity(generator)
    parameters = add_lora(generator, 4, 8)
    assert torch.equal(velocity(generator), before)
    assert {name for name, value in generator.backbone.named_parameters() if value.requires_grad} == {
        name for name, _ in parameters
    }
    assert all("lora_" in name for name, _ in parameters)
    # two blocks: eight layers in the first; in the last, which drops its text, seven (no to_add_out); A and B each
    assert len(parameters) == 2 * (8 + 7)


def test_gradients_reach_every_target():
    generator = trained()
    v = generator.velocity(generator.noise([0, 1]), torch.tensor(0.7), generator.encode(["a", "b"]))
    v.square().mean().backward()
    silent = [
        name
        for name, value in generator.backbone.named_parameters()
        if value.requires_grad and (value.grad is None or value.grad.abs().max() == 0)
    ]
    # what the last block's text tokens ask for is thrown away with those tokens
    assert silent == [f"transformer_blocks.1.attn.add_q_proj.lora_{part}.default.weight" for part in "AB"]


def test_start_depends_on_the_seed_alone():
    one, two, three = sd3(), sd3(), sd3()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = add_lora(one, 4, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = add_lora(two, 4, 4, seed=3), add_lora(three, 4, 4, seed=4)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(first, second, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    deviation = torch.cat([value.detach().flatten() for name, value in first if "lora_A" in name]).std()
    assert deviation == pytest.approx(1 / 4, rel=0.1)


def test_float32_on_a_bfloat16_base(tmp_path):
    generator = trained(dtype=torch.bfloat16)
    assert {value.dtype for value in generator.backbone.parameters() if value.requires_grad} == {torch.float32}
    assert generator.dtype == torch.bfloat16
    save_lora(generator, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / FILE).values()} == {torch.float32}
    fresh, untouched = sd3(torch.bfloat16), sd3(torch.bfloat16)
    load_lora(fresh, tmp_path)
    assert torch.equal(velocity(fresh), velocity(generator))
    untouched.pipeline.load_lora_weights(tmp_path)  # diffusers itself rounds the LoRA to the base's dtype
    assert 0 < (velocity(untouched) - velocity(generator)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("rank", "alpha", "tolerance"), [(4, 16, 0), (8, 4, 0), (4, 4, 0), (4, 6, 5e-5), (3, 10, 5e-5)]
)
def test_untouched_pipeline_draws_the_same(tmp_path, rank, alpha, tolerance):
    """alpha / rank a power of two multiplies without rounding, so exact; any other to float32 rounding."""
    generator = trained(rank, alpha)
    save_lora(generator, tmp_path)
    pipeline = tiny.sd3_pipeline(t5=False)
    base = velocity(SD3(pipeline, Options(size=SIZE)))
    pipeline.load_lora_weights(tmp_path)
    ours, theirs = velocity(generator), velocity(SD3(pipeline, Options(size=SIZE)))
    assert (ours - base).abs().max() > 0.01
    assert (ours - theirs).abs().max() <= tolerance
    # whole images, by the pipeline's own loop, without anything of ours in it
    images = []
    for pipe in (generator.pipeline, pipeline):
        noise = generator.noise([3])
        images.append(pipe("a", height=32, width=32, num_inference_steps=2, latents=noise, output_type="pt").images)
    assert (images[0] - images[1]).abs().max() <= tolerance


def test_the_file_says_so_twice(tmp_path):
    generator = trained(4, 16)
    assert save_lora(generator, tmp_path / "deep" / "folder") == tmp_path / "deep" / "folder" / FILE
    assert [file.name for file in (tmp_path / "deep" / "folder").iterdir()] == [FILE]
    tensors = load_file(tmp_path / "deep" / "folder" / FILE)
    name = "transformer_blocks.0.attn.to_q.lora_B"
    mine = dict(generator.backbone.named_parameters())[f"{name}.default.weight"]
    assert torch.equal(tensors[f"transformer.{name}.weight"], 4 * mine)
    with safe_open(tmp_path / "deep" / "folder" / FILE, "pt") as opened:
        about = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert about["transformer.lora_alpha"] == about["transformer.r"] == 4
    assert len(about["transformer.target_modules"]) == 15
    (tmp_path / "deep" / "folder" / FILE).write_bytes(b"old")
    save_lora(generator, tmp_path / "deep" / "folder")  # over an older file
    assert len(load_file(tmp_path / "deep" / "folder" / FILE)) == 30


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    generator = trained()
    path = save_lora(generator, tmp_path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RunFolderError, match="No space"):
        save_lora(generator, tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_equal_loras_are_equal_bytes_that_others_may_read(tmp_path, mask):
    generator = trained()
    before = os.umask(mask)
    try:
        files = [save_lora(generator, tmp_path / str(index)) for index in range(6)]
    finally:
        os.umask(before)
    assert len({file.read_bytes() for file in files}) == 1
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("as_file", [False, True])
def test_load_lora(tmp_path, as_file):
    generator = trained(4, 16)
    path = save_lora(generator, tmp_path)
    fresh = sd3()
    load_lora(fresh, path if as_file else tmp_path)
    assert torch.equal(velocity(fresh), velocity(generator))
    assert not any(value.requires_grad for value in fresh.backbone.parameters())


def test_what_does_not_fit_is_named(tmp_path):
    generator = sd3()
    with pytest.raises(LoraError, match=r"no LoRA at .*pytorch_lora_weights"):
        load_lora(generator, tmp_path)
    (tmp_path / FILE).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(LoraError, match="not a whole safetensors file: no header"):
        load_lora(generator, tmp_path)
    good = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    other = "transformer.single_blocks.0.proj.lora_A.weight"

    def pairs(*sizes):
        both = {key: torch.ones(4, wide) for key, wide, _ in sizes}
        return both | {key.replace("_A", "_B"): torch.ones(rows, 4) for key, _, rows in sizes}

    save_file(pairs((good, 32, 32), (other, 32, 32)), tmp_path / FILE)
    with pytest.raises(
        LoraError, match=r"the diffusers layout.*: 1 of 2 pairs do not fit, first .*single_blocks.0.proj"
    ):
        load_lora(generator, tmp_path)
    for wide, rows in ((48, 32), (32, 48)):  # right name, a wider model
        save_file(pairs((good, wide, rows)), tmp_path / FILE)
        with pytest.raises(LoraError, match=f"to_q has {wide} and {rows}, the layer 32 inputs and 32 outputs"):
            load_lora(generator, tmp_path)


def test_targets():
    generator = sd3()
    with pytest.raises(LoraError, match=r"\['attn.to_qq'\] match no linear layer; there are .*attn\.to_q, "):
        add_lora(generator, 4, 4, targets=["attn.to_k", "attn.to_qq"])
    with pytest.raises(LoraError, match="match no linear layer"):
        add_lora(generator, 4, 4, targets=r".*\.nothing")
    names = [name for name, _ in add_lora(generator, 4, 4, targets=["attn.to_k"])]
    assert [name.split(".lora_")[0] for name in names[::2]] == [f"transformer_blocks.{i}.attn.to_k" for i in (0, 1)]
    by_pattern = [name for name, _ in add_lora(sd3(), 4, 4, targets=r"transformer_blocks\.\d\.attn\.to_k")]
    assert by_pattern == names
