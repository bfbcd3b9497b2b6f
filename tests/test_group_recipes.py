"""AWM, DGPO and CRD beside transcriptions of their authors' loops; groups and samples stay whole under updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_training import optimizer_moments
from tiny_run import final_tensors, settings
from torch import Tensor

from align.recipes.awm import AWM
from align.recipes.base import Recipe
from align.recipes.crd import CRD
from align.recipes.dgpo import DGPO
from align.rollout.bench import Point
from align.rollout.rollout import Scored
from align.training.trainer import train
from generators.base import Conditioning
from rewards.base import Scores

NAN = float("nan")
FIELDS = {
    "policy": lambda x, t: torch.tanh(1.3 * x) * t,
    "behaviour": lambda x, t: torch.tanh(1.2 * x) * t,
    "anchor": lambda x, t: torch.sin(x) * t,
    "reference": lambda x, t: 0.5 * x,
}


class Fields:
    """A bench of given velocity fields; guidance multiplies."""

    def velocity(self, role: str, point: Point) -> Tensor:
        return point.guidance * FIELDS[role](point.x, point.t.reshape(-1, 1, 1))


def scored(values: list[float], size: int) -> Scored:
    count = len(values)
    latents = torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(3))
    return Scored(
        prompts=["a"] * count, group=torch.arange(count) // size, seeds=list(range(100, 100 + count)),
        cond=Conditioning({"e": torch.zeros(count, 1)}), row=torch.arange(count), latents=latents,
        media=torch.zeros(count, 3, 1, 1), scores=Scores(torch.tensor(values)),
    )  # fmt: skip


ROLLOUT = scored([0.1, 0.9, 0.4, 0.6, 0.3, NAN, 0.2, 0.8], 4)


def terms_of(recipe: Recipe, rollout: Scored = ROLLOUT) -> tuple[Any, Tensor]:
    credit = recipe.credit(rollout.scores, rollout.group)
    return recipe.terms(rollout, credit), credit


def mean_loss(recipe: Recipe, rollout: Scored = ROLLOUT, chunk: int = 100) -> float:
    """The trainer's reduction."""
    terms, _ = terms_of(recipe, rollout)
    parts = [terms[rows] for rows in torch.arange(len(terms)).split(chunk)]
    total = sum(float((part.weight * recipe.loss(part, rollout, Fields()).value).sum()) for part in parts)
    return total / float(terms.weight.sum())


class Copy:
    """Sample ``n`` noised to ``t`` with the noise of (``noise``, ``slot``), and the velocities there."""

    def __init__(self, n: int, t: Tensor, slot: int, noise: int) -> None:
        x0, eps = ROLLOUT.latents[n], ROLLOUT.noise(torch.tensor([noise]), torch.tensor([slot]))[0]
        x = (1 - t) * x0 + t * eps
        self.u, self.v = eps - x0, {name: field(x, t) for name, field in FIELDS.items()}

    def error(self, role: str) -> Tensor:
        return ((self.v[role] - self.u) ** 2).mean()

    def drift(self, role: str, guidance: float = 1.0) -> Tensor:
        return ((self.v["policy"] - guidance * self.v[role]) ** 2).mean()


VALID = [n for n in range(8) if n != 5]


@pytest.mark.parametrize("ratio", ["timestep", "mean"])
def test_awm_is_its_authors(ratio: str) -> None:
    """``train_sd3_awm.py``: ghuber, exp_first or sum_first, both pulls, a clip that holds for some."""
    recipe = AWM(ratio=ratio, timesteps=3, ratio_clip=0.005, kl=0.2, anchor=0.7, normalise_by="group", advantage_clip=1)
    terms, credit = terms_of(recipe)
    assert float(credit.abs().max()) == 1

    def logp(copy: Copy, role: str, t: Tensor) -> Tensor:
        return -((copy.error(role) + 1e-10) ** 0.25 - 1e-10**0.25) * t / 0.25

    losses = []
    for n in VALID:
        times = terms.t[terms.sample == n].flatten()
        copies = [Copy(n, t, k, n) for k, t in enumerate(times)]
        change = torch.stack(
            [logp(c, "policy", t) - logp(c, "behaviour", t) for c, t in zip(copies, times, strict=True)]
        )
        log_ratios = change if ratio == "timestep" else change.mean()[None]
        surrogate = [max(-credit[n] * one.exp(), -credit[n] * one.exp().clamp(0.995, 1.005)) for one in log_ratios]
        pulls = [0.2 * c.drift("reference") + 0.7 * c.drift("anchor") for c in copies]
        losses.append(float(sum(surrogate) / len(surrogate) + sum(pulls) / len(pulls)))
    loss = recipe.loss(terms, ROLLOUT, Fields())
    assert 0 < float(loss.metrics["clipped"].mean()) < 1
    assert len(terms) == (24 if ratio == "timestep" else 8)
    for chunk in (100, 5, 1):
        assert mean_loss(recipe, chunk=chunk) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("gate", ["base", "anchor"])
def test_dgpo_is_its_authors(gate: str) -> None:
    """``train_sd3_dgpo.py``: a group's noise, time and gate, the clip against the anchor, guidance."""
    recipe = DGPO(gate_reference=gate, beta=5.0, ratio_clip=0.005, kl=0.3, guidance=1.5, timesteps=2)
    terms, credit = terms_of(recipe)
    total = 0.0
    for first in (0, 4):
        members = [n for n in VALID if first <= n < first + 4]
        for slot in range(2):
            t = terms.t[(terms.members[:, 0] == first) & (terms.slot == slot)][0]
            copies = {n: Copy(n, t, slot, first) for n in members}
            base = {n: ((1.5 * c.v["reference"] - c.u) ** 2).mean() for n, c in copies.items()}
            ref = {n: base[n] if gate == "base" else c.error("anchor") for n, c in copies.items()}
            exponent = sum(credit[n] * 5.0 * (c.error("policy") - ref[n]) / len(members) for n, c in copies.items())
            for n, c in copies.items():
                total += float(
                    torch.sigmoid(exponent) * credit[n] * c.error("policy") + 0.3 * c.drift("reference", 1.5)
                )
    for chunk in (100, 3, 1):
        assert mean_loss(recipe, chunk=chunk) == pytest.approx(total / (2 * len(VALID)), rel=1e-5)
    assert 0 < float(recipe.loss(terms, ROLLOUT, Fields()).metrics["clipped"].mean()) < 1


@pytest.mark.parametrize("adaptive_kl", [True, False])
def test_crd_is_its_authors(adaptive_kl: bool) -> None:
    """``crd.py`` of Flow-Factory, within each prompt, with adaptive weights; the pull follows the reward."""
    recipe = CRD(beta=0.7, timesteps=2, kl=0.1, guidance=2.0, adaptive_kl=adaptive_kl, normalise_by="group")
    terms, credit = terms_of(recipe)
    total = 0.0
    for first in (0, 4):
        members = [n for n in VALID if first <= n < first + 4]
        for slot in range(2):
            t = terms.t[(terms.members[:, 0] == first) & (terms.slot == slot)][0]
            copies = {n: Copy(n, t, slot, n) for n in members}

            def scaled(c: Copy, role: str) -> Tensor:
                return c.error(role) / (c.v[role] - c.u).abs().mean()

            r = {n: -(scaled(c, "policy") - scaled(c, "anchor")) for n, c in copies.items()}
            r_mean, a_mean = sum(r.values()) / len(members), sum(credit[n] for n in members) / len(members)
            for n, c in copies.items():
                found, wanted = 0.7 * (r[n] - r_mean), credit[n] - a_mean
                weight = 0.1 * (1e-3 + credit[n] * (1 - 1e-3)) if adaptive_kl else 0.1
                total += float((found - wanted) ** 2 * 5 / 0.7 + weight * c.drift("reference", 2.0))
    for chunk in (100, 3, 1):
        assert mean_loss(recipe, chunk=chunk) == pytest.approx(total / (2 * len(VALID)), rel=1e-5)


@pytest.mark.parametrize("kind", [AWM, DGPO, CRD])
def test_a_reward_that_is_higher_for_a_whole_prompt_changes_nothing(kind: type[Recipe]) -> None:
    recipe = kind(timesteps=2, normalise_by="centred")
    shift = torch.tensor([0.0] * 4 + [3.0] * 4)
    other = ROLLOUT.become(Scored, scores=Scores(ROLLOUT.scores.values + shift))
    assert mean_loss(recipe, other) == pytest.approx(mean_loss(recipe), rel=1e-5)


@pytest.mark.parametrize("kind", [DGPO, CRD])
def test_terms_hold_whole_groups_and_spread_over_updates(kind: type[Recipe]) -> None:
    rollout = scored([0.1 * n for n in range(12)], 2)
    terms, credit = terms_of(kind(timesteps=1), rollout)
    assert terms.members.tolist() == [[2 * g, 2 * g + 1] for g in range(6)]
    assert torch.equal(terms.credit, credit[terms.members])
    assert terms.weight.tolist() == [2.0] * 6
    assert ((terms.sample + terms.slot) % 2).tolist() == [0, 1, 0, 1, 0, 1]  # of two updates each has half
    assert terms_of(kind(timesteps=2))[0].weight.tolist() == [4.0, 4.0, 3.0, 3.0]


def test_stored_samples_have_no_groups(model: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "a", "sample": "a.png", "reward": 1}) + "\n")
    rollout = {"kind": "samples", "file": str(tmp_path / "samples.jsonl"), "by_reward": True}
    for kind in ("dgpo", "crd"):
        with pytest.raises(ValidationError, match=f"{kind} compares the samples of a prompt"):
            settings(tmp_path, model, kind, rollout=rollout)


VARIANTS = [
    {"kind": "awm", "timesteps": 2, "ratio": "mean", "weighting": "t"},
    {"kind": "dgpo", "timesteps": 2, "gate_reference": "base", "shared_noise": False, "ratio_clip": None},
    {"kind": "crd", "timesteps": 2, "guidance": 1.0, "temperature": 0.0, "form": "bce", "shared_noise": True},
    {"kind": "grpo", "ratio": "dppo"},
]


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: recipe["kind"])
def test_accumulation_equals_a_large_batch_with_other_options(recipe: Any, model: Path, tmp_path: Path) -> None:
    """A missing score among them, and two updates: the second update's gradients agree as well."""
    moments = []
    for name, chunk in (("whole", 1000), ("chunked", 3)):
        (tmp_path / name).mkdir()
        options = {"steps": 1, "updates": 2, "chunk": chunk, "max_grad_norm": 1e6, "lr": 1e-4}
        reward = {"kind": "tiny_run:missing_by_content"}
        config = settings(tmp_path / name, model, recipe, train=options, reward=reward, prompts={"heldout": None})
        train(config)
        moments.append(optimizer_moments(config.run_dir))
    gaps = [float((a - b).norm() / (a.norm() + 1e-12)) for a, b in zip(*moments, strict=True)]
    assert max(gaps) < 1e-3


def test_the_anchors_decay_follows_its_schedule(model: Path, tmp_path: Path) -> None:
    assert [AWM().decay("anchor", step) for step in (1, 100, 400)] == [0.001, 0.1, 0.3]
    assert [CRD().decay("anchor", step) for step in (1, 100, 400)] == [0.255, 0.75, 0.999]
    assert [CRD().decay("behaviour", step) for step in (1, 74, 77)] == [0.0, 0.0, 0.015]
    assert AWM().decay("behaviour", 400) == 0
    runs = {}
    for name, decay in (("still", [1, 0, 1]), ("follows", [0, 0, 0])):
        (tmp_path / name).mkdir()
        recipe = {"kind": "awm", "timesteps": 2, "anchor_decay": decay}
        config = settings(tmp_path / name, model, recipe, train={"steps": 2}, prompts={"heldout": None})
        train(config)
        runs[name] = final_tensors(config)
    for name, moved in (("still", False), ("follows", True)):
        anchor = [value for key, value in runs[name].items() if key.startswith("anchor/") and "lora_B" in key]
        assert any(bool(value.any()) for value in anchor) is moved


def test_the_mask_of_dppo_is_logged(model: Path, tmp_path: Path) -> None:
    recipe = {"kind": "grpo", "ratio": "dppo", "mask_above": 1e-12}
    config = settings(tmp_path, model, recipe, train={"steps": 1, "updates": 2}, prompts={"heldout": None})
    train(config)
    row = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < row["masked_good"] + row["masked_bad"] < 1  # none in the first update, which is on policy
    assert row["divergence"] > 0
    assert "clipped" not in row
