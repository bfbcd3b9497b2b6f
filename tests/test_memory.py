"""Ways to save memory leave results as they are, or are refused with what to do; what is dropped is gone."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import adapter_cases
import adapter_cases_video
import image_cases
import pytest
import tiny
import tiny_image
import tiny_video
import torch
from adapter_cases import PROMPTS, Case
from diffusers import AutoencoderTiny
from diffusers.models import attention_dispatch
from tiny_run import final_tensors, policy_gap, settings
from torch import nn

from align import build
from align.errors import ConfigError
from align.lora import add_lora
from align.roles import Roles
from align.trainer import train
from generators import memory
from generators.base import Conditioning, Generator, GeneratorError
from generators.load import DTYPES, adapter, load
from generators.memory import Memory
from generators.text_cache import TextCache, text_encoders

pytestmark = pytest.mark.usefixtures("small_sources")
SD3 = Case("sd3", "sd3", tiny.sd3_pipeline, guidance=2.0)
SHIPPED = (SD3, *adapter_cases.CASES, *image_cases.CASES, *adapter_cases_video.CASES)
EVERY = {case.kind: case for case in SHIPPED}
QUICK = ("sd3", "flux", "qwen_image_edit", "z_image", "wan_i2v")
each = pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if k in QUICK else pytest.mark.slow, id=k) for k, c in EVERY.items()]
)
BRIEF: dict[str, Any] = {"prompts": {"heldout": None}, "train": {"steps": 2}}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 without T5 on disk: its null tokens are folded."""
    folder = tmp_path_factory.mktemp("model") / "sd3"
    tiny.sd3_pipeline(t5=False).save_pretrained(folder)
    return folder


def generator_of(case: Case) -> Generator:
    return adapter(case.kind)(case.build(), case.options)


def velocity(generator: Generator, case: Case) -> torch.Tensor:
    cond = generator.encode(PROMPTS, case.inputs)
    with torch.no_grad():
        return generator.velocity(generator.noise([1, 2]), torch.tensor([0.3, 0.8]), cond, case.guidance)


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


def test_a_prompt_beside_another_picture_is_another_prompt() -> None:
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
    asked: list[list[str]] = []
    reads = adapter("sd3").encode_text
    monkeypatch.setattr(
        adapter("sd3"), "encode_text", lambda self, *given: asked.append(given[0]) or reads(self, *given)
    )
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


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for the packages of every backend: torch's attention, counted, refusing masks as the real one does."""
    calls: list[Any] = []
    registry = attention_dispatch._AttentionBackendRegistry

    def stand_in(name: str, masks: bool):
        def attend(query, key, value, attn_mask=None, scale=None):
            if attn_mask is not None and not masks:
                raise ValueError("`attn_mask` is not supported")
            calls.append((name, tuple(key.shape)))
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale).transpose(1, 2)

        return attend

    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda backend: None)
    for name in ("xformers", "flash"):
        backend = attention_dispatch.AttentionBackendName(name)
        monkeypatch.setitem(registry._backends, backend, stand_in(name, name == "xformers"))
        known = {"query", "key", "value", "attn_mask", "scale"}
        monkeypatch.setitem(registry._supported_arg_names, backend, known)
    return calls


@pytest.mark.parametrize("name", ["native", "xformers", "flash"])
@pytest.mark.parametrize("t5", [True, False], ids=["t5", "folded"])
def test_sd3_hears_its_backend_and_draws_the_same(name: str, t5: bool, fake_backend: list[Any]) -> None:
    case = Case("sd3", "sd3", lambda: tiny.sd3_pipeline(t5=t5), guidance=2.0)
    expected = velocity(generator_of(case), case)
    generator = generator_of(case)
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    memory.set_attention([generator.backbone], name, torch.float32, torch.device("cpu"))
    fake_backend.clear()
    torch.testing.assert_close(velocity(generator, case), expected, rtol=1e-5, atol=1e-5)
    blocks = len(generator.pipeline.transformer.transformer_blocks)
    assert [call[0] for call in fake_backend] == ([] if name == "native" else [name] * blocks)
    folded, text = not t5 and name == "xformers", 77 + 256
    for _, (_, keys, _, _) in fake_backend:
        assert keys == 16 + (78 if folded else text)
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_backend_is_one_networks_own(kind: str, fake_backend: list[Any]) -> None:
    case = EVERY[kind]
    expected = velocity(generator_of(case), case)
    generator, other = generator_of(case), generator_of(case)
    memory.set_attention(generator.backbones().values(), "xformers", torch.float32, torch.device("cpu"))
    fake_backend.clear()
    torch.testing.assert_close(velocity(other, case), expected, rtol=0, atol=0)
    assert fake_backend == []
    torch.testing.assert_close(velocity(generator, case), expected, rtol=1e-5, atol=1e-5)
    assert fake_backend


def test_a_network_that_would_not_hear_is_refused() -> None:
    network = tiny.sd3_pipeline().transformer  # diffusers' own processor calls torch directly
    with pytest.raises(GeneratorError, match=r"JointAttnProcessor2_0 of SD3Transformer2DModel .* ignore it; use auto"):
        memory.set_attention([network], "native", torch.float32, torch.device("cpu"))


def test_a_backend_that_is_wrong_or_missing_is_refused(
    fake_backend: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = attention_dispatch._AttentionBackendRegistry
    flash = attention_dispatch.AttentionBackendName("flash")
    for stand_in, said in (
        (lambda query, key, value: query * 0 + 9, "is wrong here"),
        (
            lambda query, key, value: attention_dispatch._native_attention(query, key, value).detach(),
            "does not work here",
        ),
        (lambda query, key, value: 1 / 0, "does not work here: division by zero; use native"),
    ):
        monkeypatch.setitem(registry._backends, flash, stand_in)
        monkeypatch.setitem(registry._supported_arg_names, flash, {"query", "key", "value"})
        with pytest.raises(GeneratorError, match=said):
            memory.set_attention([], "flash", torch.float32, torch.device("cpu"))


# -- fewer bits -------------------------------------------------------------------------------------------------------


def test_what_from_pretrained_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def recorded(folder: Path, **told: Any) -> Any:
        seen.update(told)
        return tiny.sd3_pipeline(t5=False)

    monkeypatch.setattr("generators.load.DiffusionPipeline.from_pretrained", recorded)
    monkeypatch.setattr("diffusers.quantizers.quantization_config.is_torchao_version", lambda *_: False)
    monkeypatch.setattr("diffusers.quantizers.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    load("sd3", str(model), dtype="bfloat16", memory=Memory(quantise="nf4"))
    mapping = seen["quantization_config"].quant_mapping
    assert list(mapping) == ["transformer"]
    config = mapping["transformer"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    load("sd3", str(model), memory=Memory(quantise="int8"))
    assert seen["quantization_config"].quant_mapping["transformer"].load_in_8bit


def test_both_experts_are_stored_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_video.wan(2).save_pretrained(tmp_path)
    components: list[str] = []
    monkeypatch.setattr("generators.load.quantisation", lambda kind, names, dtype: components.extend(names))
    load("wan", str(tmp_path))
    assert components == ["transformer", "transformer_2"]


def test_fp8_trains_a_lora_on_a_frozen_base(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = settings(
        tmp_path, model, train={"steps": 2, "precision": "bf16"}, memory={"quantise": "fp8"}, prompts={"heldout": None},
        generator={"dtype": "bfloat16", "path": str(model), "device": "cpu", "size": [32, 32]},
    )  # fmt: skip
    generator = build.build_generator(config, "cpu")
    stored = next(m for m in generator.backbone.modules() if isinstance(m, nn.Linear)).weight
    assert "Float8" in type(stored.data).__name__ + type(stored).__name__
    assert train(config)["status"] == "finished"
    found = final_tensors(config)
    assert max(float((found[n] - found[n.replace("policy/", "ref/")]).abs().max()) for n in found if "policy/" in n) > 0


@pytest.mark.parametrize("name", ["adamw8bit"])
def test_optimizers_in_8_bits_learn_and_resume(name: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = settings(tmp_path, model, train={"steps": 2, "optimizer": name})
    train(config)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})
    assert train(longer, resume=True)["steps"] == 3


@pytest.mark.parametrize(
    ("name", "made"), [("adamw8bit", "AdamW8bit"), ("paged_adamw", "PagedAdamW"), ("paged_adamw8bit", "PagedAdamW8bit")]
)
def test_the_right_optimizer_is_made(name: str, made: str, model: Path, tmp_path: Path, monkeypatch) -> None:
    class Made(torch.optim.AdamW):
        pass

    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(**{made: Made})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    config = settings(
        tmp_path, model, train={"optimizer": name, "lr": 0.5, "betas": [0.1, 0.2], "weight_decay": 0.3},
        generator={"path": str(model), "device": "auto"},
    )  # fmt: skip
    optimizer = build.build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is Made
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_what_is_compiled(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    memory.compile_networks([tiny_image.flux().transformer, tiny.sd3_pipeline().transformer], how)
    blocks = {"FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock"}
    assert set(compiled) == (blocks if how == "blocks" else {"FluxTransformer2DModel", "SD3Transformer2DModel"})


def test_blocks_that_nobody_named() -> None:
    with pytest.raises(GeneratorError, match=r"compile blocks: AutoencoderTiny names no repeated blocks; use"):
        memory.compile_networks([AutoencoderTiny(encoder_block_out_channels=(8,) * 4)], "blocks")


@pytest.mark.slow
def test_compiled_blocks_draw_learn_and_change_roles_as_before() -> None:
    generator = generator_of(SD3)
    parameters = add_lora(generator, 4, 4)
    roles = Roles(parameters, ["ref"])
    for _, value in parameters:
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    roles.policy_changed()
    cond, x, t = generator.encode(PROMPTS), generator.noise([1, 2]), torch.tensor([0.3, 0.8])

    def found() -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), roles.use("ref"):
            reference = generator.velocity(x, t, cond)
        policy = generator.velocity(x, t, cond)
        gradients = torch.autograd.grad(policy.square().mean(), [value for _, value in parameters], allow_unused=True)
        return reference, policy.detach(), *(gradient for gradient in gradients if gradient is not None)

    expected = found()
    memory.compile_networks([generator.backbone], "blocks")
    torch.testing.assert_close(found(), expected, rtol=1e-4, atol=1e-5)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3


# -- what a machine cannot do -----------------------------------------------------------------------------------------


def test_a_machine_without_card_or_package_is_told(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("align.memory.find_spec", lambda package: None)
    config = settings(
        tmp_path, model, generator={"path": str(model), "device": "auto"}, train={"optimizer": "paged_adamw8bit"},
        memory={"quantise": "nf4", "attention": "xformers"},
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        build.build_generator(config, "cpu", training=True)
    text = str(caught.value)
    assert "memory.quantise: nf4 needs the package bitsandbytes: pip install 'alignflow[quant]'" in text
    assert "memory.attention: xformers needs the package xformers: pip install 'alignflow[xformers]'" in text
    assert "train.optimizer: paged_adamw8bit needs the package bitsandbytes" in text
    assert "memory.quantise: nf4 needs a CUDA card (any), and this run is on cpu" in text


def test_dtypes_stay_what_they_are() -> None:
    assert memory.quantisation("none", ["transformer"], DTYPES["float32"]) is None
