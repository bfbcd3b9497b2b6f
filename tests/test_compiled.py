"""Compiled blocks: one graph for sampling and learning, equal log-probabilities, and what a block saves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live
from memory_cases import EVERY, PROMPTS, generator_of
from pydantic import ValidationError
from test_estimate import HALF, NETWORKS, ready
from tiny_run import final_tensors, policy_gap, settings
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from align.checking import estimate
from align.config.load import load_config, overridden
from align.policy.lora import add_lora
from align.policy.switching import lora_off
from align.training.trainer import train
from generators import compiled
from generators.base import Generator

COMPILE = nn.Module.compile


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that torch.compile makes. Its code generator alone is left out, which takes minutes."""
    from torch._dynamo.backends.debugging import aot_eager

    made: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self: COMPILE(self, backend=backend))
    yield made
    torch._dynamo.reset()


def deeper(kind: str) -> Generator:
    """A tiny generator with four blocks of each kind."""
    generator = generator_of(EVERY[kind])
    settings: Any = {**generator.backbone.config}
    settings |= {name: 4 for name in ("num_layers", "num_single_layers", "n_layers") if name in settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = type(generator.backbone).from_config(settings).eval()  # type: ignore[attr-defined]
    generator.pipeline.transformer = generator.backbone = generator.network = network
    network.requires_grad_(False)
    return generator


def adapted(generator: Generator) -> list[nn.Parameter]:
    """Parameters of a LoRA that changes something."""
    found = [value for _, value in add_lora(generator, 4, 4)]
    for value in found:
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return found


def velocity(generator: Generator, kind: str) -> Tensor:
    case = EVERY[kind]
    cond, x = generator.encode(PROMPTS, case.inputs), generator.noise([1, 2])
    return generator.velocity(x, torch.tensor([0.3, 0.8]), cond)


class Block(nn.Module):
    """Two layers on tokens, scaled by the time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Changed tokens, and the time as it was."""
        return hidden_states + self.outer(torch.tanh(self.inner(hidden_states) * temb[:, None])), temb


class Network(nn.Module):
    """Three blocks as diffusers names them."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.requires_grad_(False)
        for block in self.blocks:
            block.inner.requires_grad_()  # type: ignore[union-attr, operator]

    def compile_repeated_blocks(self) -> None:
        """As diffusers does."""
        for block in self.blocks:
            block.compile()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """``[N, 8, L]`` with tokens last, so that the first block's have other strides."""
        x = x.transpose(1, 2)
        for block in self.blocks:
            x, _ = block(x, temb)
        return x


@pytest.mark.parametrize("outside", [False, True])
def test_blocks_run_one_graph_whatever_the_mode(outside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self: COMPILE(self, backend=counter))
    network, x = Network(), torch.randn(2, 8, 5)
    time = nn.Linear(8, 8).requires_grad_(outside)
    network.time = time
    expected = network(x, time(x[:, :, 0]))
    compiled.compile_networks([network], "blocks")
    with torch.no_grad():
        rollout = network(x, time(x[:, :, 0]))
    update = network(x, time(x[:, :, 0]))
    update.sum().backward()
    assert counter.frame_count == 1
    assert torch.equal(update, rollout)
    torch.testing.assert_close(update, expected)
    assert rollout.grad_fn is None
    assert torch._dynamo.config.recompile_limit >= compiled.GRAPHS
    found = [value.grad is not None for value in network.parameters()]
    assert found == [value.requires_grad for value in network.parameters()]
    torch._dynamo.reset()


# SD3's last block has no text output; FLUX has blocks of two classes
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "structures"), [("sd3", 2), ("flux", 2)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_rollout_and_update_run_one_graph(kind: str, structures: int, checkpointed: bool, graphs: list[Any]) -> None:
    generator = deeper(kind)
    parameters = adapted(generator)
    expected = velocity(generator, kind)
    wanted = torch.autograd.grad(expected.square().mean(), parameters, allow_unused=True)
    if checkpointed:
        generator.backbone.enable_gradient_checkpointing()  # type: ignore[operator]
    compiled.compile_networks([generator.backbone], "blocks")
    with torch.no_grad():
        rollout = velocity(generator, kind)
    assert rollout.grad_fn is None
    assert len(graphs) == structures
    for _ in range(2):
        update = velocity(generator, kind)
        found = torch.autograd.grad(update.square().mean(), parameters, allow_unused=True)
        assert torch.equal(update, rollout)
    assert len(graphs) == structures
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    for mine, plain in zip(found, wanted, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None and plain is not None:
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-6)
    with torch.no_grad(), lora_off(generator):
        velocity(generator, kind)
    assert len(graphs) == 2 * structures  # the base, without the LoRA
    with torch.no_grad():
        assert torch.equal(velocity(generator, kind), rollout)
    assert len(graphs) == 2 * structures


@pytest.mark.slow
def test_without_it_rollout_and_update_run_two(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_one_graph", lambda network: None)
    generator = deeper("sd3")
    adapted(generator)
    compiled.compile_networks([generator.backbone], "blocks")
    with torch.no_grad():
        velocity(generator, "sd3")
    before = len(graphs)
    velocity(generator, "sd3")
    assert len(graphs) > before


@pytest.mark.slow
def test_all_weights_trained_run_one_graph(graphs: list[Any]) -> None:
    """The embedding of the time is trained too, so what it gives needs a gradient in both."""
    generator = deeper("sd3")
    generator.backbone.requires_grad_()
    compiled.compile_networks([generator.backbone], "blocks")
    with torch.no_grad():
        rollout = velocity(generator, "sd3")
    update = velocity(generator, "sd3")
    update.square().mean().backward()
    assert torch.equal(update, rollout)
    assert len(graphs) == 2
    embedded = generator.backbone.time_text_embed.timestep_embedder.linear_1.weight  # type: ignore[union-attr]
    assert float(embedded.grad.abs().max()) > 0  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_a_compiled_run_has_no_gap(model: Path, tmp_path: Path) -> None:
    found = []
    for how in ("none", "blocks"):
        (tmp_path / how).mkdir()
        config = settings(
            tmp_path / how, model, "grpo", memory={"compile": how}, train={"steps": 2}, evaluate={"every": 0},
            rollout={"chunk": 8},
        )  # fmt: skip
        rows: list[dict[str, Any]] = []
        train(config, on_step=lambda _, row, rows=rows: rows.append(row))
        assert rows[0]["logp_gap/max"] < 2e-6
        found.append(final_tensors(config))
    assert policy_gap(*found) < 2e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_rollout_holds_what_one_block_saves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for two blocks and for four, and no more than the estimate says."""
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl)
    )  # counted as eager code runs; compiled code saves less
    peaks = []
    for blocks in (2, 4):
        network, forward, widths = ready(name, blocks=blocks)
        network.requires_grad_(False)
        compiled.compile_networks([network], "blocks")
        with torch.no_grad(), Live() as live:
            forward()
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)
    assert peaks[0] < max(widths) * estimate.SAVED["full"] * HALF.itemsize * 1.3


def test_the_estimate_counts_it() -> None:
    plain = load_config("configs/sd35-medium/nft.yaml", [])
    found = [estimate.estimate(one) for one in (plain, overridden(plain, "memory.compile=blocks"))]
    before, after = (one.phases["sampling"][0].bytes for one in found)
    assert after / before == pytest.approx(estimate.SAVED[estimate._way(plain)] / estimate.FORWARD)


@pytest.mark.parametrize("recipe", ["grpo", "prdp"])
def test_a_whole_compiled_network_has_no_ratio(recipe: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=rf"{recipe} compares .*; use .*memory.compile=blocks, which runs one"):
        settings(tmp_path, model, recipe, memory={"compile": "full"})
    settings(tmp_path, model, "nft", memory={"compile": "full"})
    settings(tmp_path, model, "grpo", memory={"compile": "full"}, rollout={"recompute": True})
