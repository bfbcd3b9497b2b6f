"""Attention backends, fewer bits, compiled blocks: the same results, the right library call, or a refusal."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_image
import tiny_video
import torch
from adapter_cases import PROMPTS, Case
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from diffusers.models import attention_dispatch
from memory_cases import EVERY, SD3, generator_of, velocity
from tiny_run import final_tensors, settings
from torch import nn

from align.config.memory import missing
from align.policy import build
from align.policy.lora import add_lora
from align.policy.roles import Roles
from align.training.trainer import train
from generators import compiled, memory
from generators.base import GeneratorError
from generators.load import load
from generators.settings import Memory

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


@pytest.mark.parametrize("name", memory.BACKENDS)
def test_every_name_is_a_backend_of_diffusers_and_says_what_it_lacks(name: str) -> None:
    assert attention_dispatch.AttentionBackendName(memory.BACKENDS[name])
    found = [problem.message for problem in missing(Memory(attention=name), training=True)]  # type: ignore[arg-type]
    package = {"flash": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention", "xformers": "xformers"}
    needed = "kernels" if name.endswith("_hub") else package.get(name)
    assert [f"{name} needs the package {needed}" in text for text in found[:1]] == ([True] if needed else [])
    assert any("has no gradient" in text for text in found) == name.startswith("sage")


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

    whole = SD3Transformer2DModel.from_pretrained

    def recorded(folder: Path, **told: Any) -> Any:
        seen["transformer"] = told.pop("quantization_config", None)  # which needs a card
        return whole(folder, **told)

    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", recorded)
    monkeypatch.setattr("diffusers.quantizers.quantization_config.is_torchao_version", lambda *_: False)
    monkeypatch.setattr("diffusers.quantizers.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
    load("sd3", str(model), dtype="bfloat16", memory=Memory(quantise="nf4"))
    config = seen["transformer"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    load("sd3", str(model), memory=Memory(quantise="int8"))
    assert seen["transformer"].load_in_8bit


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
    generator = build.build_generator(config.generator, config.memory, "cpu")
    stored = next(m for m in generator.backbone.modules() if isinstance(m, nn.Linear)).weight
    assert "Float8" in type(stored.data).__name__ + type(stored).__name__
    assert train(config)["status"] == "finished"
    found = final_tensors(config)
    assert max(float(found[n].abs().max()) for n in found if "policy/" in n and "lora_B" in n) > 0


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
    optimizer = build.build_optimizer(config.train, [nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is Made
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.1, 0.2), 0.3)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_what_is_compiled(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: seen.append(type(self).__name__))
    compiled.compile_networks([tiny_image.flux().transformer, tiny.sd3_pipeline().transformer], how)
    blocks = {"FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock"}
    assert set(seen) == (blocks if how == "blocks" else {"FluxTransformer2DModel", "SD3Transformer2DModel"})


def test_blocks_that_nobody_named() -> None:
    with pytest.raises(GeneratorError, match=r"compile blocks: AutoencoderTiny names no repeated blocks; use"):
        compiled.compile_networks([AutoencoderTiny(encoder_block_out_channels=(8,) * 4)], "blocks")


@pytest.mark.slow
def test_compiled_blocks_draw_learn_and_change_roles_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as torch.compile does; its code generator alone is left out, which takes minutes."""
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend="aot_eager"))
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
    compiled.compile_networks([generator.backbone], "blocks")
    torch.testing.assert_close(found(), expected, rtol=1e-4, atol=1e-5)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3
