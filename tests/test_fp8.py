"""Products in fp8 of a frozen base: arithmetic in closed form, gradients, runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory_cases import PROMPTS, SD3, generator_of
from pydantic import ValidationError
from test_doctor import script
from tiny import sd3_pipeline
from tiny_run import final_tensors, settings
from torch import Tensor, nn

from align.config import memory as memory_config
from align.policy.lora import add_lora
from align.training.trainer import train
from alignflow import devices
from generators import fp8, load
from generators.base import GeneratorError

FP8 = {"quantise": "fp8", "compute": "fp8"}
SOURCE = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=SOURCE)


def stored(layer: nn.Linear) -> nn.Linear:
    """A layer whose weight is stored in fp8, with the names of torchao."""
    values, scale = fp8.rounded(layer.weight.detach())
    weight: Any = nn.Parameter(fp8.dequantised(values, scale, layer.weight.dtype), requires_grad=False)
    weight.qdata, weight.scale = values, scale
    layer.weight = weight
    return layer.requires_grad_(False)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_rounding_in_closed_form() -> None:
    """Scale 1, so that the values are float8's own: 3 bits after the leading one, and steps of 1/512 below 1/64."""
    rows = [[448.0, -225.0, 1.0, 0.3, 0.003], [0.0] * 5, [896.0, 2.0, 0.6, -896.0, 0.006]]
    values, scale = fp8.rounded(torch.tensor(rows))
    assert scale[[0, 2], 0].tolist() == [1, 2]
    assert values.float()[0].tolist() == [448, -224, 1, 0.3125, 2 / 512]
    assert values.float()[1].tolist() == [0] * 5
    torch.testing.assert_close(fp8.dequantised(values, scale, torch.float32)[2], 2 * values.float()[2])
    assert values.float()[2].tolist() == [448, 1, 0.3125, -448, 2 / 512]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_rounding_keeps_its_bound(size: float) -> None:
    x = size * rand(64, 96) ** 3
    values, scale = fp8.rounded(x)
    gap = (fp8.dequantised(values, scale, torch.float32) - x).abs()
    assert bool((gap <= torch.maximum(2**-4 * x.abs(), 2**-10 * scale) * 1.0001).all())


def emulated(x: Tensor, w: Tensor) -> Tensor:
    """Both sides are cast to float8 e4m3 and back, and multiplied in double precision."""
    scales = [part.abs().amax(1, keepdim=True).double() / 448 for part in (x, w)]
    back = [(p.double() / s).float().to(torch.float8_e4m3fn).double() * s for p, s in zip((x, w), scales, strict=True)]
    return back[0] @ back[1].T


def test_a_product_is_that_of_both_sides_cast_and_cast_back() -> None:
    x, w = rand(40, 64), rand(48, 64)
    found = fp8.product(x, *fp8.rounded(w)).double()
    torch.testing.assert_close(found, emulated(x, w), rtol=2**-8, atol=1e-4)  # bfloat16 of the sum
    exact, most = x.double() @ w.double().T, x.abs().double() @ w.abs().double().T
    assert bool(((found - exact).abs() <= (2 * 2**-4 + 2**-6) * most).all())
    assert float((found - exact).abs().mean()) > 1e-3


def test_rows_do_not_depend_on_their_batch() -> None:
    x, w = rand(40, 64), fp8.rounded(rand(48, 64))
    assert torch.equal(fp8.product(x, *w)[7:8], fp8.product(x[7:8], *w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    layer = fp8.Fp8Linear(stored(nn.Linear(64, 48).to(dtype)))
    x, given = rand(2, 5, 64).to(dtype).requires_grad_(), rand(2, 5, 48).to(dtype)
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, (2, 5, 48))
    (y * given).sum().backward()
    weight = fp8.dequantised(layer.weight.qdata, layer.weight.scale, dtype)  # type: ignore[attr-defined]
    assert torch.equal(x.grad, given @ weight)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_inputs_without_tokens_are_multiplied_with_the_dequantised_weight() -> None:
    plain = stored(nn.Linear(64, 48))
    layer, x = fp8.Fp8Linear(plain), rand(3, 64)
    assert torch.equal(layer(x), F.linear(x, plain.weight, plain.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x[:, None]).dtype == torch.bfloat16
    assert not torch.equal(layer(x[:, None])[:, 0], layer(x))


# -- in a network -----------------------------------------------------------------------------------------------------


def test_a_loras_gradient_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block's LoRA has the gradient of a network whose other layers are dequantised, to the rounding of
    inputs, which changes its activations."""
    found: list[list[Tensor]] = []
    for compute in (False, True):
        generator = generator_of(SD3)
        for layer in [one for one in generator.backbone.modules() if isinstance(one, nn.Linear)]:
            stored(layer)
        if compute:
            names = fp8.use_products(generator.backbone)
            assert all(name.startswith("transformer_blocks.") for name in names)
            assert any(name.endswith("attn.to_q") for name in names)
        parameters = add_lora(generator, 4, 4)
        for _, value in parameters:
            value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        v = generator.velocity(generator.noise([1, 2]), torch.tensor([0.3, 0.8]), generator.encode(PROMPTS))
        v.square().mean().backward()
        assert all(value.grad is not None for _, value in parameters)
        assert not any(v.grad is not None for n, v in generator.backbone.named_parameters() if "lora" not in n)
        found.append([v.detach(), *(value.grad for _, value in parameters if value.grad is not None)])
    gaps = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True) if float(a.norm())]
    assert 1e-4 < gaps[0] < 0.1
    assert max(gaps) < 0.3


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(GeneratorError, match=r"SD3Transformer2DModel: no block has a linear layer that is stored in f"):
        fp8.use_products(sd3_pipeline().transformer)


@pytest.fixture
def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Store weights in fp8 by this file's :func:`stored`, as torchao would."""

    def placed(pipeline: Any, *given: Any) -> list[Any]:
        for layer in [one for one in pipeline.transformer.modules() if isinstance(one, nn.Linear)]:
            stored(layer)
        return place(pipeline, *given)

    place = load.place
    monkeypatch.setattr(load, "place", placed)
    monkeypatch.setattr(load, "quantisation", lambda *_: None)
    monkeypatch.setattr(memory_config, "find_spec", lambda package: package)


@pytest.mark.usefixtures("without_torchao")
@pytest.mark.parametrize("recipe", ["nft", "flow_dpo", pytest.param("flow_rwr", marks=pytest.mark.slow)])
def test_forward_process_recipes_train(recipe: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, recipe, memory=FP8, train={"steps": 2}, evaluate={"every": 0})
    assert train(config)["status"] == "finished"
    found = final_tensors(config)
    assert max(float(found[n].abs().max()) for n in found if "policy/" in n and "lora_B" in n) > 0


@pytest.mark.usefixtures("without_torchao")
def test_learning_rate_0_changes_nothing(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "nft", memory=FP8, train={"steps": 1, "lr": 0.0}, evaluate={"every": 0})
    train(config)
    found = final_tensors(config)
    assert max(float(found[name].abs().max()) for name in found if "policy/" in name and "lora_B" in name) == 0


@pytest.mark.usefixtures("without_torchao")
def test_a_recomputed_rollout_has_ratio_1(model: Path, tmp_path: Path) -> None:
    config = settings(
        tmp_path, model, "grpo", memory=FP8, train={"steps": 1, "chunk": 3}, evaluate={"every": 0},
        rollout={"recompute": True},
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    train(config, on_step=lambda _, row: rows.append(row))
    assert rows[0]["logp_gap/max"] == 0


# -- beside torchao ---------------------------------------------------------------------------------------------------


def test_rounding_and_products_are_those_of_torchao() -> None:
    pytest.importorskip("torchao")
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    x, w = rand(40, 64), rand(48, 64)
    found, (values, scale) = Float8Tensor.from_hp(x, granularity=PerRow()), fp8.rounded(x)
    assert torch.equal(found.qdata.float(), values.float())
    torch.testing.assert_close(found.scale, scale, rtol=1e-6, atol=0)
    told = QuantizeTensorToFloat8Kwargs(granularity=PerRow())
    weight = Float8Tensor.from_hp(w, granularity=PerRow(), mm_config=Float8MMConfig(), act_quant_kwargs=told)
    expected = F.linear(x, weight)
    torch.testing.assert_close(fp8.product(x, weight.qdata, weight.scale).float(), expected, rtol=2**-8, atol=1e-4)


def test_a_base_that_torchao_stores_trains(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = settings(
        tmp_path, model, "nft", train={"steps": 2, "precision": "bf16"}, memory=FP8, evaluate={"every": 0},
        generator={"dtype": "bfloat16", "path": str(model), "device": "cpu", "size": [32, 32]},
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    assert train(config, on_step=lambda _, row: rows.append(row))["status"] == "finished"
    assert rows[0]["grad_norm"] > 0


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "changes", "says"),
    [
        ("nft", {"memory": {"compute": "fp8"}}, "fp8 needs weights that are stored in fp8; use memory.quantise=fp8"),
        ("nft", {"memory": {"compute": "fp8", "quantise": "int8"}}, "fp8 needs weights that are stored in fp8"),
        ("nft", {"memory": FP8, "policy": {"kind": "full"}}, "fp8 weights cannot be trained"),
        ("grpo", {"memory": FP8}, "grpo compares log-probabilities .* use rollout.recompute=true, or memory.compute="),
        ("vpo", {"memory": FP8}, "vpo compares log-probabilities"),
        ("prdp", {"memory": FP8}, r"prdp compares .* of up to 1/8; use memory.compute=dtype"),
    ],
)
def test_what_does_not_go_with_it(recipe: str, changes: Any, says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, recipe, **changes)


def test_distillation_alone_has_no_ratio(model: Path, tmp_path: Path) -> None:
    settings(tmp_path, model, "opd", memory=FP8)
    with pytest.raises(ValidationError, match="opd compares log-probabilities"):
        settings(tmp_path, model, {"kind": "opd", "policy_gradient": 0.5}, memory=FP8)


SMI = "echo 'NVIDIA A100-SXM4-40GB, 8.0'; echo 'Tesla T4, 7.5'"


def test_cards_are_asked_for_their_capability(tmp_path: Path) -> None:
    found = devices.capabilities(script(tmp_path / "smi", SMI))
    assert found == {"NVIDIA A100-SXM4-40GB": (8, 0), "Tesla T4": (7, 5)}
    assert devices.capabilities(script(tmp_path / "broken", "echo 'driver: 9.9, 9.9'; exit 9")) == {}
    assert devices.capabilities(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    ("cards", "device", "refused"),
    [
        ({"A100": (8, 0)}, "auto", True),
        ({"A100": (8, 0)}, "cuda", True),
        ({"A100": (8, 0)}, "cpu", False),
        ({"A100": (8, 0), "L4": (8, 9)}, "auto", False),
        ({"H100": (9, 0)}, "auto", False),
        ({}, "auto", False),
    ],
)
def test_a_card_without_fp8_is_refused(
    cards: Any, device: str, refused: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_config, "capabilities", lambda: cards)
    monkeypatch.setattr(memory_config, "find_spec", lambda package: package)
    config = settings(tmp_path, model, "nft", memory=FP8, generator={"device": device})
    found = memory_config.missing(config.memory, device=device)
    assert bool(found) == refused
    if refused:
        assert "need compute capability 8.9 (Ada, Hopper or newer), and this machine has A100 8.0; us" in str(found[0])


def test_a_device_without_fp8_is_refused_before_weights_are_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8.require(torch.device("cpu"))
    with pytest.raises(GeneratorError, match=r"memory.compute fp8 does not work on meta: .*; use memory.compute=dtype"):
        fp8.require(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3090")
    with pytest.raises(GeneratorError, match=r"RTX 3090 has compute capability 8.6, and fp8 needs 8.9"):
        fp8.require(torch.device("cuda"))
