"""A run holds the roles that it uses and no others; a LoRA's reference is the LoRA switched off, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import LORA_ONLY, RECIPES, STOCHASTIC, final_tensors, policy_gap, settings

from align.checking import estimate
from align.config.load import load_config
from align.policy import held
from align.policy.build import add_trained, build_generator, build_roles
from align.policy.lora import add_lora
from align.policy.roles import Roles
from align.policy.switching import lora_off
from align.report import write_report
from align.rollout.bench import Bench, Point
from align.runs import checkpoint, manifest
from align.training.trainer import train
from alignflow.errors import CheckpointError, TrainingError

ROOT = Path(__file__).parent.parent

USED = [
    ("nft", {}, ("behaviour",), ("behaviour", "reference")),
    ("nft", {"kl": 0.0}, ("behaviour",), ("behaviour",)),
    ("grpo", {}, (), ()),
    ("grpo", {"kl": 0.1}, (), ("reference",)),
    ("prdp", {}, (), ("reference",)),
    ("flow_rwr", {}, (), ("reference",)),
    ("flow_rwr", {"control_variate": True, "kl": 0.0}, ("behaviour",), ("behaviour",)),
    ("awm", {}, ("behaviour", "anchor"), ("behaviour", "reference", "anchor")),
    ("awm", {"kl": 0.0, "anchor": 0.0}, ("behaviour",), ("behaviour",)),
    ("dgpo", {}, ("anchor",), ("reference", "anchor")),
    ("dgpo", {"kl": 0.0, "gate_reference": "base", "ratio_clip": None}, (), ("reference",)),
    ("dgpo", {"kl": 0.0}, ("anchor",), ("anchor",)),
    ("crd", {}, ("behaviour", "anchor"), ("behaviour", "reference", "anchor")),
    ("flow_dpo", {}, (), ("reference",)),
    ("flow_dpo", {"reference_every": 2}, ("anchor",), ("anchor",)),
    ("flow_dpo", {"reference_every": 2, "kl": 0.1}, ("anchor",), ("anchor", "reference")),
]


@pytest.mark.parametrize(("kind", "options", "lora", "full"), USED)
def test_roles_that_a_recipe_uses(
    kind: str, options: dict[str, Any], lora: tuple[str, ...], full: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    """Names, the tensors of a run, and the estimate's bytes."""
    for policy, names in ({"kind": "lora", "rank": 4}, lora), ({"kind": "full"}, full):
        config = settings(
            tmp_path, model, {**RECIPES[kind], **options}, policy=policy, train={"ema": 0}, evaluate={"rewards": {}},
            rollout={"sampler": {"kind": "flow_sde" if kind in STOCHASTIC else "ode", "steps": 3}},
        )  # fmt: skip
        assert held.copies(config) == names
        generator = build_generator(config.generator, config.memory, "cpu", training=True)
        add_trained(config, generator)
        roles = build_roles(config, generator)["policy"]
        assert tuple(roles.values) == names
        assert ("reference" in roles) == (policy["kind"] == "lora" or "reference" in names)
        bytes_ = dict.fromkeys(("policy", *names), 0)
        for name, value in roles.tensors().items():
            bytes_[name.partition("/")[0]] += value.numel() * value.itemsize
        counted = {item.name: item.bytes for item in estimate.estimate(config).kept}["roles"]
        # all weights are counted as the network, of which a copy is kept for each role
        assert counted == sum(bytes_.values()) - (0 if policy["kind"] == "lora" else bytes_["policy"])


def test_settings_add_roles(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "grpo", rollout={"overlap": "next"}, train={"ema": 0.9})
    assert held.copies(config) == ("ema", "ahead")
    (tmp_path / "start.safetensors").touch()
    continued = {"kind": "lora", "init": str(tmp_path / "start.safetensors")}
    config = settings(tmp_path, model, {"kind": "grpo", "kl": 0.1}, policy=continued, rollout={
        "sampler": {"kind": "flow_sde", "steps": 3}
    })  # fmt: skip
    assert held.copies(config) == ("reference", "ema")  # it starts away from the base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_switched_off_is_a_lora_of_zeros(dtype: str, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, generator={"dtype": dtype})
    generator = build_generator(config.generator, config.memory, "cpu", training=True)
    parameters = add_lora(generator, 4, 4)
    copied = Roles(parameters, ["reference"])  # B is zero
    for _, value in parameters:
        value.data += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    copied.policy_changed()
    cond, x, t = generator.encode(["a cat", "a dog"]), generator.noise([1, 2]), torch.tensor([0.3, 0.8])
    trained = [value.requires_grad for value in generator.backbone.parameters()]
    with torch.no_grad(), copied.use("reference"):
        zeros = generator.velocity(x, t, cond)
    policy = generator.velocity(x, t, cond)
    with torch.no_grad(), lora_off(generator):
        off = generator.velocity(x, t, cond)
    assert torch.equal(off, zeros)
    assert not torch.equal(off, policy)
    assert [value.requires_grad for value in generator.backbone.parameters()] == trained
    assert torch.equal(generator.velocity(x, t, cond), policy)
    gradients = torch.autograd.grad(policy.square().mean(), [value for _, value in parameters], allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_a_role_that_is_not_declared_is_named(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "grpo")
    generator = build_generator(config.generator, config.memory, "cpu")
    add_trained(config, generator)
    bench = Bench(generator, build_roles(config, generator))
    point = Point(generator.noise([1]), torch.tensor([0.5]), generator.encode(["a cat"]))
    bench.velocity("policy", point)
    bench.velocity("reference", point)
    with pytest.raises(TrainingError, match=r"the role 'behaviour': its method roles\(\) should return that name"):
        bench.velocity("behaviour", point)
    assert bench.drifts().keys() == {"kl_velocity"}


@pytest.mark.parametrize("policy", [{"kind": "lora", "rank": 4}, {"kind": "full"}], ids=["lora", "full"])
def test_rows_have_diagnostics_of_the_roles_there_are(policy: dict[str, Any], model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, "grpo", policy=policy, prompts={"heldout": None})
    train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all("contrast" not in row for row in rows)
    assert all(("kl_velocity" in row) == (policy["kind"] == "lora") for row in rows if row["event"] == "train")
    page = write_report(config.run_dir).read_text()
    assert "Contrast: numbers" not in page
    assert ("KL in velocity: numbers" in page) == (policy["kind"] == "lora")
    roles = {name.partition("/")[0] for name in final_tensors(config)}
    assert roles == {"policy", "ema"}


def with_roles(path: Path, change: dict[str, str | None]) -> None:
    """Rewrite a checkpoint: each role of ``change`` becomes a copy of another, or is left out."""
    tensors, found = load_file(path / "roles.safetensors"), manifest.read(path)
    versions = found["roles"]["policy"]
    for role, source in change.items():
        start = f"policy/{source}/"
        given = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"policy/{role}/")}
        tensors |= {f"policy/{role}/{name}": value.clone() for name, value in given.items()}
        versions = {name: value for name, value in versions.items() if name != role} | ({role: 0} if source else {})
    found["roles"] = {"policy": versions}
    save_file(tensors, path / "roles.safetensors")
    (path / "manifest.json").unlink()
    manifest.write(path, {key: found[key] for key in ("step", "counters", "roles", "identity")})


def test_a_checkpoint_with_more_roles_is_resumed_and_one_with_fewer_is_refused(model: Path, tmp_path: Path) -> None:
    runs = []
    for name, steps in (("whole", 2), ("more", 1)):
        (tmp_path / name).mkdir()
        runs.append(settings(tmp_path / name, model, "grpo", train={"steps": steps}))
        train(runs[-1])
    path = checkpoint.latest(runs[1].run_dir / "checkpoints")
    assert path is not None
    with_roles(path, {"behaviour": "policy", "reference": "policy"})
    resumed = settings(tmp_path / "more", model, "grpo", train={"steps": 2})
    train(resumed, resume=True)
    assert policy_gap(final_tensors(runs[0]), final_tensors(resumed), "ema") == 0
    path = checkpoint.latest(resumed.run_dir / "checkpoints")
    assert path is not None
    with_roles(path, {"ema": None})
    with pytest.raises(CheckpointError, match="does not hold the role ema; use the config it was made with"):
        train(settings(tmp_path / "more", model, "grpo", train={"steps": 3}), resume=True)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_table_of_roles_in_the_docs(kind: str) -> None:
    def roles(*overrides: str) -> tuple[str, float]:
        files = [ROOT / f"configs/{folder}/{kind}.yaml" for folder in ("sd35-medium", "flux-kontext", "flux-fill")]
        own = next((file for file in files if file.exists()), None)
        shared = [files[0].with_name("nft.yaml"), ROOT / f"configs/shared/{kind}.yaml"]
        config = load_config(own or shared, list(overrides))
        item = {item.name: item.bytes for item in estimate.estimate(config).kept}["roles"]
        return ", ".join(held.copies(config)), item

    lora, lora_bytes = roles()
    if kind in LORA_ONLY:  # a critic shares the network, or text encoders have LoRAs: all weights are refused
        critic = ", and the critic" if kind in ("re_dmd", "np_edit") else ""
        row = f"| `{kind}` | {lora}{critic} | {lora_bytes / 1e6:.0f} MB | refused | |"
    else:
        full, full_bytes = roles("policy={kind: full}")
        row = f"| `{kind}` | {lora} | {lora_bytes / 1e6:.0f} MB | {full} | {full_bytes / 1e9:.1f} GB |"
    assert row in (ROOT / "docs" / "memory.md").read_text().splitlines()
