"""Blocks whose frozen weights wait on the CPU, and roles that do: the same numbers, fewer bytes on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live
from pydantic import ValidationError
from tiny import sd3_pipeline
from tiny_run import final_tensors, policy_gap, settings
from torch import nn

from align.checking import fitting
from align.checking.estimate import GB, estimate, swapped
from align.config.load import load_config
from align.training.trainer import train
from generators.errors import GeneratorError
from generators.swap import Swap, blocks, spread

CHECKPOINTED = {"gradient_checkpointing": True, "steps": 2}


class Block(nn.Module):
    """A residual block of two products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Stack(nn.Module):
    """Repeated blocks, checkpointed as diffusers checkpoints them."""

    _no_split_modules = ("Block",)

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.enter, self.layers = nn.Linear(width, width), nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x


def test_swapped_blocks_are_spread_evenly() -> None:
    assert spread(8, 0) == []
    assert spread(8, 1) == [4]
    assert spread(8, 4) == [1, 3, 5, 7]
    assert spread(5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 3, 6])
def test_values_and_gradients_are_those_of_a_whole_network(count: int) -> None:
    torch.manual_seed(0)
    network = Stack(6, 8)
    x, frozen = torch.randn(3, 8), {name: value.clone() for name, value in network.state_dict().items()}
    results = []
    for swap in (False, True):
        if swap:
            Swap(network, count, torch.device("cpu"))
        network.layers.requires_grad_(False)
        for _ in range(2):
            network.zero_grad()
            out = network(x)
            out.square().sum().backward()
        results.append([out.detach(), network.enter.weight.grad.clone()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert results[0][1].any()
    assert all(torch.equal(value, frozen[name]) for name, value in network.state_dict().items())


def test_two_swapped_blocks_are_on_the_device_at_once() -> None:
    """In sampling, and in backward, where a repeated forward pass copies weights again."""
    width = 256
    network, block = Stack(8, width), 2 * width * width * 4
    Swap(network, 8, torch.device("cpu"))
    network.layers.requires_grad_(False)
    x = torch.randn(1, width)
    with torch.no_grad(), Live() as sampling:
        network(x)
    with Live() as learning:
        network(x).sum().backward()
    assert 2 * block <= sampling.peak < 2.2 * block
    assert 2 * block <= learning.peak < 4.2 * block  # the gradient of the first layer, and its seed, are there too


def test_a_block_that_fails_keeps_its_weights_on_the_cpu() -> None:
    network = Stack(2, 4)
    Swap(network, 2, torch.device("cpu"))
    kept = [value.data_ptr() for value in network.parameters()]
    with pytest.raises(RuntimeError):
        network.layers[0](torch.randn(1, 5))
    assert [value.data_ptr() for value in network.parameters()] == kept


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(GeneratorError, match=r"swap_blocks 3: Stack names 2 blocks; use a smaller number, or 0"):
        Swap(Stack(2, 4), 3, torch.device("cpu"))
    with pytest.raises(GeneratorError, match="its class names no blocks"):
        Swap(nn.Linear(2, 2), 1, torch.device("cpu"))


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", ["nft", "grpo", "reward_backprop", "re_dmd"])
def test_a_run_with_everything_on_the_cpu_trains_the_same_weights(recipe: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sd3_pipeline(t5=False).save_pretrained(folder)
    found = []
    for name, memory in (("card", {}), ("cpu", {"swap_blocks": 1, "roles": "cpu", "trajectories": "cpu"})):
        (tmp_path / name).mkdir()
        config = settings(tmp_path / name, folder, recipe, train=CHECKPOINTED, memory=memory)
        train(config)
        found.append(final_tensors(config))
    assert [role for role in ("policy", "ema") if policy_gap(*found, role)] == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"memory": {"swap_blocks": 1}}, "use train.gradient_checkpointing=true, or 0"),
        ({"memory": {"swap_blocks": 1}, "train": CHECKPOINTED, "policy": {"kind": "full"}}, "cannot be trained"),
        ({"memory": {"swap_blocks": 1, "compile": "blocks"}, "train": CHECKPOINTED}, "does not go with memory.swap_b"),
        ({"memory": {"swap_blocks": 1, "quantise": "nf4"}, "train": CHECKPOINTED}, "does not go with memory.swap_b"),
        ({"memory": {"swap_blocks": -1}}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_go_together(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, **sections)


def test_shards_are_not_swapped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.config.sharding import problems

    config = settings(tmp_path, model, train=CHECKPOINTED, memory={"swap_blocks": 1, "roles": "cpu"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert [problem.path for problem in problems(config)] == ["memory.swap_blocks", "memory.roles"]


def test_the_estimate_counts_two_swapped_blocks() -> None:
    network = Stack(8, 16)
    block = 2 * 16 * 16
    assert swapped(network, 0) == 16 * 17 + 8 * block
    assert swapped(network, 1) == 16 * 17 + 8 * block
    assert swapped(network, 5) == 16 * 17 + 5 * block
    assert len(blocks(network)) == 8


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("model", "preset", "card"),
    [
        ("flux-dev", "24gb", 12), ("flux-dev", "24gb", 16), ("flux-dev", "24gb", 24),
        ("qwen-image", "24gb", 16), ("qwen-image", "24gb", 24), ("wan22-i2v", "80gb", 80),
    ],
)  # fmt: skip
def test_large_models_fit_without_quantised_weights(model: str, preset: str, card: int) -> None:
    config = load_config(f"configs/{model}/nft.yaml", [f"memory={preset}", "memory.quantise=none"])
    changes = fitting.fitting_swap(config, card * GB)
    assert changes[-1].startswith("memory.swap_blocks=")
    fits = load_config(f"configs/{model}/nft.yaml", [f"memory={preset}", "memory.quantise=none", *changes])
    assert fits.memory.swap_blocks > 0
    assert estimate(fits).bytes <= card * GB
    fewer = fits.model_copy(
        update={"memory": fits.memory.model_copy(update={"swap_blocks": fits.memory.swap_blocks - 1})}
    )
    assert estimate(fewer).bytes > card * GB
    assert any(" ".join(changes) in line for line in fitting.lines(config, f"{card}gb"))


def test_a_compiled_network_is_not_told_to_swap() -> None:
    given = ["memory=24gb", "memory.quantise=none", "memory.compile=blocks"]
    config = load_config("configs/qwen-image/nft.yaml", given)
    assert fitting.fitting_swap(config, 24 * GB) == []
    assert any(line.startswith(fitting.MISFIT) for line in fitting.lines(config, "24gb"))


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", ["nft", {"kind": "grpo", "kl": 0.1}])
def test_roles_of_all_weights_on_the_cpu_train_the_same_weights(recipe: Any, model: Path, tmp_path: Path) -> None:
    found = []
    for place in ("device", "cpu"):
        (tmp_path / place).mkdir()
        config = settings(tmp_path / place, model, recipe, policy={"kind": "full"}, memory={"roles": place})
        train(config)
        found.append(final_tensors(config))
    assert [role for role in ("policy", "reference", "ema") if policy_gap(*found, role)] == []
