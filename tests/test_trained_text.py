"""Recipes of the forward process that train text encoders: their gradient, what moves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from pydantic import ValidationError
from test_learners import bench_of, drawn, shake
from test_texforce import ONE_UPDATE, RUN, assert_same_moments
from test_training import optimizer_moments
from tiny_run import final_tensors, settings

from align.config.settings import Config
from align.maths import losses
from align.training.trainer import train

KINDS = ("nft", "awm", "flow_rwr", "dgpo", "crd", "flow_dpo", "gapo", "edit_r1")
PARTS = {"text": {"text_encoder", "text_encoder_2"}}
PARTS["both"] = PARTS["text"] | {"transformer_blocks"}
ODE = {"sampler": {"kind": "ode", "steps": 3}}


def trained(folder: Path, model: Path, kind: str, trains: str = "both", **sections: Any) -> Config:
    return settings(folder, model, {"kind": kind, "trains": trains, "kl": 0.1}, **{"rollout": ODE, **sections})


@pytest.mark.parametrize("trains", ["text", "both"])
def test_the_gradient_is_that_of_text_which_every_role_encodes(trains: str, model: Path, tmp_path: Path) -> None:
    """``nft`` by hand: velocities of policy, old policy and base, each under text of its own encoders."""
    config = trained(tmp_path, model, "nft", trains)
    generator, bench = bench_of(config)
    shake(bench, 1)
    rollout = drawn(config, generator)
    recipe = config.recipe
    terms = recipe.terms(rollout, torch.linspace(0.1, 0.9, len(rollout.seeds)))
    values = [value for _, value in bench.roles.parameters]
    with bench.acting("policy"):
        found = torch.autograd.grad(recipe.loss(terms, rollout, bench).value.sum(), values)

    x0, eps = rollout.latents[terms.sample], rollout.noise(terms.sample, terms.slot)
    x_t, prompts = losses.x_at(x0, eps, terms.t), [rollout.prompts[n] for n in terms.sample.tolist()]  # type: ignore[attr-defined]
    old = {}
    for role in ("behaviour", "reference"):
        with torch.no_grad(), bench.roles.use(role):
            old[role] = generator.velocity(x_t, terms.t, generator.encode(prompts))  # type: ignore[attr-defined]
    v = generator.velocity(x_t, terms.t, generator.encode_prompts(prompts, graph=True))  # type: ignore[attr-defined]
    value = losses.nft(x0, x_t, terms.t, v, old["behaviour"], terms.credit, recipe.beta).value  # type: ignore[attr-defined]
    value = value + 0.1 * (v - old["reference"]).square().flatten(1).mean(1)
    expected = torch.autograd.grad(value.sum(), values)
    names = [name for name, _ in bench.roles.parameters]
    norms = {name: float(one.norm()) for name, one in zip(names, expected, strict=True) if "text_encoder" in name}
    assert norms
    assert all(norms.values())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-6 * float(other.abs().max()) + 1e-9)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_parts_that_are_trained_move_and_no_others(kind: str, model: Path, tmp_path: Path) -> None:
    for trains, parts in PARTS.items():
        for lr in (1e-3, 0.0):
            folder = tmp_path / f"{trains}-{lr}"
            folder.mkdir()
            config = trained(folder, model, kind, trains, train={"steps": 1, "lr": lr}, evaluate={"every": 0})
            train(config)
            moved = {name: bool(value.any()) for name, value in final_tensors(config).items() if "lora_B" in name}
            assert {name.split("/")[1].partition(".")[0] for name in moved} == parts
            changed = {name.split("/")[1].partition(".")[0] for name, one in moved.items() if one}
            assert changed == (parts if lr else set())


def test_a_run_goes_on_to_the_bit(model: Path, tmp_path: Path) -> None:
    runs = []
    for name, parts in (("whole", [3]), ("parts", [1, 3])):
        (tmp_path / name).mkdir()
        for steps in parts:
            config = trained(tmp_path / name, model, "nft", train={"steps": steps}, evaluate={"every": 0})
            train(config, resume=steps != parts[0])
        runs.append(final_tensors(config))
    whole, others = runs
    assert whole.keys() == others.keys()
    assert any("text_encoder" in name for name in whole)
    assert all(torch.equal(value, others[name]) for name, value in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nft", "dgpo", "flow_dpo"])
def test_text_on_two_processes_is_that_of_one(kind: str, model: Path, tmp_path: Path) -> None:
    moments = {}
    sections = {**ONE_UPDATE, "rollout": {"prompts": 3, "group": 2, **ODE}}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        recipe = json.dumps({"kind": kind, "trains": "both"})
        launch(count, folder, RUN, str(folder), str(model), recipe, json.dumps(sections))
        moments[count] = list(optimizer_moments(folder / "run"))
    assert_same_moments(moments[1], moments[2])


@pytest.mark.parametrize(
    ("sections", "path", "words"),
    [
        ({"memory": {"cache_prompts": "memory"}}, "memory.cache_prompts", "nft trains the text encoders"),
        ({"policy": {"kind": "full"}}, "policy.kind", "nft trains LoRAs on the text encoders"),
        (
            {"generator": {"kind": "wan", "path": "shapes-video"}},
            "generator.kind",
            "cannot load a LoRA of those of wan",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    sections: dict[str, Any], path: str, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError) as caught:
        trained(tmp_path, model, "nft", **sections)
    assert path in str(caught.value)
    assert words in str(caught.value)
