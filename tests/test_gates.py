"""Experts with a gate: its formula, the equalities it must have, its file, and what trains it (TLPO)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_learners import bench_of, drawn
from test_learning import BRIGHTNESS, FAST, FEW, run
from tiny_run import ZERO_AT_FIRST, experts_beside, final_tensors, settings
from torch import Tensor

from align.checking.check import check_files
from align.checking.estimate import estimate
from align.export import ExportError, export
from align.maths.gates import gate, time_features
from align.policy import gated
from align.policy.added import added_off, block_of
from align.policy.build import add_trained, build_generator
from align.policy.layers import LoraError
from align.policy.lora import load_lora, put_lora
from align.policy.switching import lora_only
from align.recipes.base import Scores
from align.recipes.flow_dpo import FlowDPO
from align.rollout.rollout import Scored
from align.runs.trained import find_policy, load_policy
from align.training.trainer import train
from alignflow.errors import ConfigError
from generators.base import Generator
from generators.load import load

FAR = 1e4
"""A bias whose softmax is 1 to the bit."""
GATE = {"kind": "gate", "experts": {"one": {"lora": "a"}, "two": {"lora": "b"}}}


def test_features_are_those_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 0.25, 1.0])
    wanted = get_timestep_embedding(1000 * t, 16, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_features(t, 16), wanted, atol=1e-4, rtol=1e-4)


def test_the_gate_is_a_softmax_of_the_features() -> None:
    t = torch.tensor([0.0, 1e-3])
    assert torch.equal(gate(t, torch.zeros(4, 2), torch.zeros(4)), torch.full((2, 4), 0.25))
    # features at 0 are (1, 0), at 0.001 (cos 1, sin 1)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, 0.0])
    ahead = [1.5, math.cos(1) + 0.5 - 2 * math.sin(1)]
    wanted = [[1 / (1 + math.exp(-z)), 1 / (1 + math.exp(z))] for z in ahead]
    torch.testing.assert_close(gate(t, weight, bias), torch.tensor(wanted))


def test_layers_of_a_block_share_its_gate() -> None:
    assert block_of("transformer_blocks.3.attn.to_out.0") == "transformer_blocks.3"
    assert block_of("proj_out") == ""


def velocities(generator: Generator) -> Tensor:
    cond = generator.encode(["a cat", "a dog", "a tree"])
    with torch.no_grad():
        return generator.velocity(generator.noise([1, 2, 3]), torch.tensor([0.1, 0.5, 0.9]), cond, 2.0)


@pytest.fixture
def experts(model: Path) -> dict[str, Path]:
    return experts_beside(model)


def mixed(model: Path, experts: dict[str, Path], features: int = 8) -> Generator:
    """The tiny SD3 with these experts and a gate of equal shares."""
    generator = load("sd3", str(model))
    gated.add_gates(generator, gated.read_experts(generator, experts), features)
    return generator


def alone(model: Path, path: Path) -> Tensor:
    generator = load("sd3", str(model))
    load_lora(generator, path)
    return velocities(generator)


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)


def test_a_gate_of_one_expert_is_that_expert(model: Path, experts: dict[str, Path]) -> None:
    generator = mixed(model, experts)
    for k, path in enumerate(experts.values()):
        for one in gated.gates(generator).values():
            one.bias.data = FAR * torch.eye(2)[k]
        close(velocities(generator), alone(model, path))


def test_identical_experts_are_that_expert_at_any_gate(model: Path, experts: dict[str, Path]) -> None:
    path = experts["two"]
    generator = mixed(model, {"a": path, "b": path, "c": path})
    for seed, one in enumerate(gated.gates(generator).values()):
        one.weight.data = torch.randn(one.weight.shape, generator=torch.Generator().manual_seed(seed))
    close(velocities(generator), alone(model, path))
    generator.velocity(generator.noise([1]), torch.tensor([0.5]), generator.encode(["a cat"])).square().sum().backward()
    for one in gated.gates(generator).values():
        assert one.weight.grad is not None
        assert one.weight.grad.abs().max() < 1e-6  # a softmax has no gradient along a shift


def test_without_experts_the_base_is_there_to_the_bit(model: Path, experts: dict[str, Path]) -> None:
    base = velocities(load("sd3", str(model)))
    generator = mixed(model, experts)
    assert not torch.equal(velocities(generator), base)
    with added_off(generator):
        assert torch.equal(velocities(generator), base)
    gated.take_off(generator)
    assert torch.equal(velocities(generator), base)
    assert not gated.gates(generator)


def test_shares_depend_on_block_and_time(model: Path, experts: dict[str, Path]) -> None:
    generator = mixed(model, experts)
    blocks = gated.gates(generator)
    assert list(blocks) == [f"transformer_blocks.{n}" for n in range(len(blocks))]
    first = next(iter(blocks.values()))
    first.weight.data[0, 0] = 3.0
    shares = gated.shares(generator, torch.tensor([0.0, 0.3]))
    assert shares.shape == (len(blocks), 2, 2)
    assert torch.equal(shares[1:], torch.full_like(shares[1:], 0.5))
    assert float(shares[0, 0, 0] - shares[0, 1, 0]) > 0.1
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(blocks), 2))


def test_only_the_gate_is_trained(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "tlpo")
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    names = [name for name, value in generator.backbone.named_parameters() if value.requires_grad]
    blocks = len(gated.gates(generator))
    assert len(names) == 2 * blocks
    assert all(name.endswith((".experts_gate.weight", ".experts_gate.bias")) for name in names)
    counted = {item.name: item.bytes for item in estimate(config).kept}
    assert counted["roles"] == 4 * 2 * sum(value.numel() for value in generator.backbone.parameters()
                                           if value.requires_grad)  # fmt: skip
    held = sum(value.nbytes for name, value in generator.backbone.named_buffers() if name.rsplit(".", 1)[1][0] in "ab")
    assert counted["experts"] == held


def scored(config: Any, generator: Generator) -> Scored:
    parts = {"a": torch.arange(8.0), "b": torch.tensor([0.0, 3, 1, 2, 3, 2, 1, 0])}
    return drawn(config, generator).become(Scored, scores=Scores(parts["a"], parts=parts))


def test_pairs_dominate_and_the_reference_is_the_base(model: Path, tmp_path: Path) -> None:
    """At equal experts of zeros the loss would be ln 2; here it is that of flow_dpo with the base as reference."""
    config = settings(tmp_path, model, "tlpo")
    generator, bench = bench_of(config)
    rollout, recipe = scored(config, generator), config.recipe
    terms = recipe.terms(rollout, rollout.scores.values)
    known = terms[terms.weight > 0]
    pairs = sorted({(int(w), int(n)) for w, n in zip(known.sample, known.loser, strict=True)})
    assert pairs == [(1, 0), (2, 0), (3, 0), (3, 2)]  # of the second group no sample is better in both
    with bench.acting("policy"):
        loss = recipe.loss(known, rollout, bench)
        again = FlowDPO.loss(recipe, known, rollout, bench)
        loss.value.sum().backward()
    assert torch.equal(loss.value, again.value)
    assert (loss.value - math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(loss.metrics["share/one"] + loss.metrics["share/two"], torch.ones(len(known)))
    assert all(one.weight.grad is not None and one.weight.grad.any() for one in gated.gates(generator).values())
    with added_off(generator), bench.acting("policy"):
        torch.testing.assert_close(recipe.loss(known, rollout, bench).value, torch.full((len(known),), math.log(2)))


def test_learning_rate_zero_leaves_the_mean_of_the_experts(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "tlpo", train={"steps": 2, "lr": 0.0})
    summary = train(config)
    assert summary["reward_after"] == summary["reward_before"]
    assert not any(value.any() for value in final_tensors(config).values())


def test_a_run_is_sampled_as_it_was_trained(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "tlpo", train={"steps": 2, "lr": 0.3, "ema": 0.0})
    train(config)
    tensors = final_tensors(config)
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    add_trained(config, generator)
    for name, value in generator.backbone.named_parameters():
        if value.requires_grad:
            value.data = tensors[f"policy/{name}"]
    assert any(value.any() for value in tensors.values())
    for place in (config.run_dir, config.run_dir / "checkpoints" / "step-000002"):
        again = build_generator(config.generator, config.memory, "cpu")
        load_policy(again, find_policy(place).folder)
        assert torch.equal(velocities(again), velocities(generator))
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"share/one", "share/two", "share/largest"} <= rows[1].keys()


def test_an_export_says_that_time_is_averaged(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "tlpo", train={"steps": 2, "lr": 0.3})
    train(config)
    run = find_policy(config.run_dir)
    with pytest.raises(ExportError, match="depends on time, and neither a LoRA nor merged weights can"):
        export(run, "diffusers")
    for to in ("diffusers", "comfyui", "merged"):
        found = export(run, to, average=True)
        assert "averaging the gate over time changed velocities" in found["warning"]
    file = config.run_dir / "export" / "diffusers" / "pytorch_lora_weights.safetensors"
    assert {len(value) for key, value in load_file(file).items() if "lora_A" in key} == {5}  # ranks 2 and 3


def test_an_average_of_equal_shares_is_exact(model: Path, experts: dict[str, Path]) -> None:
    generator = mixed(model, experts)
    before, lora = velocities(generator), gated.averaged(generator)
    gated.take_off(generator)
    put_lora(generator.backbone, lora)
    close(velocities(generator), before)
    with lora_only(generator):
        assert not torch.equal(velocities(generator), before)


def test_a_plain_run_has_no_average(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, train={"steps": 1}, prompts={"heldout": None})
    train(config)
    with pytest.raises(ExportError, match="--average belongs to experts with a gate"):
        export(find_policy(config.run_dir), "diffusers", average=True)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"policy": {"kind": "lora", "rank": 4}}, "tlpo trains a gate over expert LoRAs: use gate"),
        ({"policy": {"experts": {"one": {"lora": "a"}}}}, "at least 2 items"),
        ({"policy": {"features": 7}}, "multiple of 2"),
        ({"memory": {"compile": "blocks"}}, "a policy of kind gate acts on layers while they compute: use none"),
        (
            {"recipe": "reward_backprop", "policy": GATE, "train": {"gradient_checkpointing": True}},
            "a policy of kind gate can repeat only the last one",
        ),
        ({"recipe": "re_dmd", "policy": GATE}, "re_dmd trains a critic on the same network: use lora"),
    ],
)
def test_what_does_not_go_together_is_said(sections: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    given = {"recipe": "tlpo", **sections}
    with pytest.raises(ValueError, match=says):
        settings(tmp_path, model, **given)


def test_experts_that_cannot_be_used_are_named(model: Path, tmp_path: Path, experts: dict[str, Path]) -> None:
    (tmp_path / "gate").mkdir()
    run = settings(tmp_path / "gate", model, "tlpo", train={"steps": 1}, prompts={"heldout": None})
    train(run)
    cases = [
        (tmp_path / "gone", r"policy.experts.two.lora: no file or folder .*gone", "expert two: no file or folder"),
        (run.run_dir, "holds experts with a gate, and a LoRA is needed", "expert two"),
    ]
    for path, checked, built in cases:
        given = {"one": {"lora": str(experts["one"])}, "two": {"lora": str(path)}}
        config = settings(tmp_path, model, "tlpo", policy={"experts": given})
        with pytest.raises(ConfigError, match=checked):
            check_files(config)
        with pytest.raises(LoraError, match=built):
            add_trained(config, build_generator(config.generator, config.memory, "cpu"))


def test_a_damaged_file_is_named(model: Path, tmp_path: Path, experts: dict[str, Path]) -> None:
    generator = mixed(model, experts)
    file = gated.save_gated(tmp_path, gated.gated_tensors(generator), gated.names(generator))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LoraError, match="is not a file of experts with a gate"):
        load_policy(load("sd3", str(model)), tmp_path)


@pytest.mark.slow
def test_the_gate_learns_which_expert_helps(tmp_path: Path) -> None:
    """Of an expert that brightens and its negative, whose mean is the base."""
    rise, overrides = FAST["nft"]
    run("nft", tmp_path, *FEW, *overrides)
    bright = tmp_path / "nft" / "lora" / "pytorch_lora_weights.safetensors"
    tensors = {key: -value if "lora_B" in key else value for key, value in load_file(bright).items()}
    save_file(tensors, tmp_path / "dark.safetensors", {"format": "pt"})
    parts = "strict: null, clip: null, a: {reward: tiny_run:brightness}, b: {reward: tiny_run:mean_pixel}"
    experts = f"bright: {{lora: {bright}}}, dark: {{lora: {tmp_path / 'dark.safetensors'}}}, strict: null, clip: null"
    given = [f"policy={{experts: {{{experts}}}}}", f"reward={{kind: mixture, parts: {{{parts}}}}}"]
    summary = run("tlpo", tmp_path, *FEW, *given, *BRIGHTNESS[1:], "train.lr=0.2", "train.steps=4")
    assert summary["reward_after"] > summary["reward_before"] + rise / 2


@pytest.mark.parametrize("recipe", ["tlpo", "ppd"])
def test_recomputed_blocks_have_the_same_gradients(recipe: str, model: Path, tmp_path: Path) -> None:
    found = []
    for name in (False, True):
        (tmp_path / str(name)).mkdir()
        options = {"steps": 1, "gradient_checkpointing": name, "max_grad_norm": 1e6}
        config = settings(tmp_path / str(name), model, recipe, train=options, prompts={})
        train(config)
        state = torch.load(config.run_dir / "checkpoints/step-000001/optimizer.pt", weights_only=True)
        states = state["learners"]["policy"]["optimizer"]["state"]
        found.append([one["exp_avg"] for one in states.values()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-4)
    assert any(value.any() for value in found[0])


@pytest.mark.parametrize("recipe", ["tlpo", "ppd"])
def test_a_base_in_half_precision_is_trained(recipe: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, recipe, generator={"dtype": "bfloat16"}, train={"steps": 2, "precision": "bf16"})
    summary = train(config)
    assert summary["status"] == "finished"
    tensors = [value for name, value in final_tensors(config).items() if any(part in name for part in ZERO_AT_FIRST)]
    assert {value.dtype for value in tensors} == {torch.float32}
    assert any(value.any() for value in tensors)
