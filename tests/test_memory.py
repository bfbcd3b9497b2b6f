"""Ways to save memory leave results as they are, or are refused with what to do; what is dropped is gone."""

from __future__ import annotations

import gc
import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PROMPTS, Case
from memory_cases import EVERY, SD3, generator_of, velocity
from tiny_run import final_tensors, policy_gap, settings
from torch import nn

from align.policy import build
from align.training.trainer import train
from alignflow.errors import ConfigError
from generators import memory
from generators.base import Conditioning, Generator, GeneratorError
from generators.load import adapter, load
from generators.settings import Memory
from generators.text_cache import TextCache, text_encoders

pytestmark = pytest.mark.usefixtures("small_sources")
QUICK = ("sd3", "flux", "qwen_image_edit", "z_image", "wan_i2v")
each = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if k in QUICK else pytest.mark.slow, id=k) for k, c in EVERY.items()]
)
BRIEF: dict[str, Any] = {"prompts": {"heldout": None}, "train": {"steps": 2}}


# -- prompts kept, encoders gone --------------------------------------------------------------------------------------


@each
def test_every_model_draws_the_same_from_kept_prompts_without_its_encoders(case: Case) -> None:
    generator = generator_of(case)
    expected = velocity(generator, case)
    encoders = text_encoders(generator.pipeline)
    gone = [weakref.ref(part) for part in encoders.values()]
    assert gone
    del encoders
    cache = TextCache()
    generator.remember(cache, PROMPTS, case.inputs)
    generator.drop_encoders(cache)
    gc.collect()
    assert not [part for part in gone if part() is not None]
    torch.testing.assert_close(velocity(generator, case), expected, rtol=0, atol=0)
    generator.decode(generator.noise([1]))
    with pytest.raises(GeneratorError, match="not in the cache"):
        generator.encode(["never seen", *PROMPTS[1:]], case.inputs)


def test_a_prompt_beside_another_image_is_another_prompt() -> None:
    case = EVERY["qwen_image_edit"]
    generator = generator_of(case)
    cache = TextCache()
    generator.remember(cache, PROMPTS, case.inputs)
    generator.remember(cache, PROMPTS, case.inputs)
    assert len(cache) == 2
    generator.remember(cache, PROMPTS, {"image": 1 - case.inputs["image"]})
    assert len(cache) == 4


def test_a_pipeline_that_runs_whole_keeps_its_encoders(model: Path) -> None:
    generator = load("generic", str(model))
    with pytest.raises(GeneratorError, match=r"cache_prompts: StableDiffusion3Pipeline .* use none"):
        generator.drop_encoders(TextCache())


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_training_from_kept_prompts_is_training(where: str, model: Path, tmp_path: Path, monkeypatch) -> None:
    reads = adapter("sd3").encode_text

    def one_by_one(self: Generator, prompts: list[str], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The last bits of a matrix product depend on the batch."""
        return Conditioning.cat([Conditioning(reads(self, [prompt], inputs)) for prompt in prompts]).tensors

    monkeypatch.setattr(adapter("sd3"), "encode_text", one_by_one)
    found = []
    for name, cache in (("plain", "none"), ("kept", where)):
        (tmp_path / name).mkdir()
        brief = {**BRIEF, "rollout": {"sampler": {"steps": 3, "guidance": 2.0}}}
        config = settings(tmp_path / name, model, memory={"cache_prompts": cache}, **brief)
        train(config)
        found.append(final_tensors(config))
    assert policy_gap(*found) == 0.0
    assert (config.run_dir / "prompts").is_dir() == (where == "disk")


def test_a_resumed_run_reads_what_it_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, model, **{**BRIEF, "train": {"steps": 1}}, memory={"cache_prompts": "disk"})
    train(config)
    (config.run_dir / "prompts" / "cut.safetensors").write_bytes(b"12345678")
    asked: list[list[str]] = []
    reads = adapter("sd3").encode_text

    def encoded(self: Any, *given: Any) -> Any:
        found = reads(self, *given)  # only the lengths are read before the run, which stops here
        asked.append(given[0])
        return found

    monkeypatch.setattr(adapter("sd3"), "encode_text", encoded)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    train(longer, resume=True)
    assert asked == [[""]]  # the negative prompt


# -- where things wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["group", "model"])
@pytest.mark.parametrize("case", [SD3, EVERY["wan"]], ids=["sd3", "wan"])
def test_waiting_encoders_read_the_same(offload: str, case: Case) -> None:
    """On the CPU both devices are one; the hooks are diffusers' and accelerate's own."""
    expected = velocity(generator_of(case), case)
    pipeline = case.build()
    resting = memory.place(pipeline, "cpu", Memory(offload=offload))
    generator = adapter(case.kind)(pipeline, case.options)
    generator.resting = resting
    hooked = [part for part in text_encoders(pipeline).values() if _hooked(part)]
    assert len(hooked) == len(text_encoders(pipeline)) > 0
    assert not _hooked(pipeline.transformer)
    assert not _hooked(pipeline.vae)
    torch.testing.assert_close(velocity(generator, case), expected, rtol=0, atol=0)


def _hooked(part: nn.Module) -> bool:
    return any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in part.modules())


def test_encoders_leave_the_device_when_they_have_read(model: Path) -> None:
    generator = load("sd3", str(model))
    left: list[str] = []
    generator.resting = [types.SimpleNamespace(offload=lambda: left.append("gone"))]
    generator.encode(["a"])
    assert left == ["gone"]
    generator.negative(generator.encode(["a"]))
    assert len(left) == 3


# -- the VAE ----------------------------------------------------------------------------------------------------------


def test_slices_and_tiles(model: Path) -> None:
    plain = load("sd3", str(model))
    latents = plain.noise([1, 2, 3])
    expected = plain.decode(latents)
    sliced = load("sd3", str(model), memory=Memory(vae_slicing=True))
    assert sliced.pipeline.vae.use_slicing
    torch.testing.assert_close(sliced.decode(latents), expected, rtol=0, atol=1e-5)
    tiled = load("sd3", str(model), memory=Memory(vae_tiling=True))
    assert tiled.pipeline.vae.use_tiling
    torch.testing.assert_close(tiled.decode(latents), expected, rtol=0, atol=1e-5)  # one tile holds it
    tiled.pipeline.vae.tile_latent_min_size, tiled.pipeline.vae.tile_sample_min_size = 4, 32
    seams = (tiled.decode(latents) - expected).abs()
    assert seams.shape == expected.abs().shape
    assert 0 < float(seams.mean()) < 0.3  # the statistics of its norms are a tile's own


def test_a_vae_without_tiles_says_so() -> None:
    with pytest.raises(GeneratorError, match=r"memory\.vae_tiling: Linear has no tiling; set memory.vae_tiling=false"):
        memory.thrifty_vae(nn.Linear(1, 1), Memory(vae_tiling=True))


# -- activations ------------------------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_run(model: Path, tmp_path: Path) -> None:
    found = []
    for name, on in (("plain", False), ("again", True)):
        (tmp_path / name).mkdir()
        brief = {**BRIEF, "train": {"steps": 2, "gradient_checkpointing": on}}
        config = settings(tmp_path / name, model, "grpo", **brief)
        train(config)
        found.append(final_tensors(config))
    assert policy_gap(*found) < 1e-6


# -- what a machine cannot do -----------------------------------------------------------------------------------------


def test_a_machine_without_card_or_package_is_told(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("align.config.memory.find_spec", lambda package: None)
    config = settings(
        tmp_path, model, generator={"path": str(model), "device": "auto"}, train={"optimizer": "paged_adamw8bit"},
        memory={"quantise": "nf4", "attention": "xformers"},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        build.build_generator(config.generator, config.memory, "cpu", training=True, optimizer=config.train.optimizer)
    text = str(caught.value)
    assert "memory.quantise: nf4 needs the package bitsandbytes: pip install 'bitsandbytes'" in text
    assert "memory.attention: xformers needs the package xformers: pip install 'xformers>=0.0.29'" in text
    assert "train.optimizer: paged_adamw8bit needs the package bitsandbytes" in text
    assert "memory.quantise: nf4 needs a CUDA card (any), and this run is on cpu" in text
