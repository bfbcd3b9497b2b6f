"""PRDP beside a transcription of its paper, at its optimum, and under chunks, updates and passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_training import optimizer_moments
from tiny_run import settings
from torch import Tensor

from align.config.sampling import Sampler
from align.maths import samplers
from align.maths.samplers import Trajectory
from align.recipes.prdp import PRDP
from align.rollout.bench import Bench, Point
from align.rollout.rollout import Scored
from align.training.trainer import train
from generators.base import Conditioning
from rewards.base import Scores

SAMPLES, STEPS, SHAPE = 4, 2, (3, 2)
T, T_NEXT = torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.7])


class Fields:
    """A bench of given velocity fields: role -> function of the latents and times."""

    def __init__(self, **roles) -> None:
        self.roles = roles

    steps = Bench.steps

    def velocity(self, role: str, point: Point) -> Tensor:
        return self.roles[role](point.x, point.t)


def rolled(old, values: Tensor, group: Tensor, same: bool = False, steps: int = STEPS) -> Scored:
    """A rollout whose stochastic steps the field ``old`` took; with ``same`` all from one starting point."""
    noise = torch.randn(steps + 1, len(values), *SHAPE, generator=torch.Generator().manual_seed(0))
    x = noise[0, :1].expand(len(values), *SHAPE) if same else noise[0]
    taken = {name: [] for name in ("x", "x_next", "mean", "logp", "std")}
    for s in range(steps):
        step = samplers.step("flow_sde", x, old(x, T[s]), T[s], T_NEXT[s], noise_level=0.7, noise=noise[s + 1])
        std = torch.as_tensor(step.std).expand(len(values))
        for name, value in zip(taken, (x, step.x, step.mean, step.logp, std), strict=True):
            taken[name].append(value)
        x = step.x
    path = Trajectory(
        **{name: torch.stack(parts, 1) for name, parts in taken.items()},
        t=T[:steps], t_next=T_NEXT[:steps], t_second=0.9, steps=tuple(range(steps)),
    )  # fmt: skip
    count = len(values)
    return Scored(
        prompts=["a"] * count, group=group, seeds=list(range(count)), cond=Conditioning({"e": torch.zeros(count, 1)}),
        row=torch.arange(count), sampler=Sampler(kind="flow_sde", steps=4, noise_level=0.7), latents=x,
        media=torch.zeros(count, 3, 1, 1), trajectory=path, scores=Scores(values),
    )  # fmt: skip


def seen(recipe: PRDP, rollout: Scored, bench: Fields, chunk: int = 3) -> Scored:
    """The rollout with the results of the look, taken in chunks as the trainer does."""
    parts = [recipe.look(rows, rollout, bench) for rows in torch.arange(len(rollout.seeds)).split(chunk)]
    return rollout.become(Scored, seen={"logp_ref": torch.cat([part["logp_ref"] for part in parts])})


def transcribed(recipe: PRDP, rollout: Scored, policy, reference, behaviour) -> list[float]:
    """The paper's loss of every two samples of a group: the appendix's loop over pairs and steps, in plain numbers."""
    path, values = rollout.trajectory, rollout.scores.values

    def logp(field, n: int, s: int) -> Tensor:
        x, t, dt = path.x[n, s], path.t[s], path.t_next[s] - path.t[s]
        variance = 0.7**2 * t / (1 - t)
        v = field(x[None], t[None])[0]
        mean = x + (v + variance / (2 * t) * (x + (1 - t) * v)) * dt
        return -((path.x_next[n, s] - mean) ** 2).mean() / (2 * variance * -dt)

    losses = []
    for i in range(SAMPLES):
        for j in range(i + 1, SAMPLES):
            if rollout.group[i] != rollout.group[j]:
                continue
            a, b = (i, j) if values[i] >= values[j] else (j, i)
            plain = clipped = 0.0
            for n, sign in ((a, 1), (b, -1)):
                for s in range(STEPS):
                    now = logp(policy, n, s) - logp(reference, n, s)
                    old = logp(behaviour, n, s) - logp(reference, n, s)
                    plain += sign * now
                    clipped += sign * torch.clamp(now, old - recipe.ratio_clip, old + recipe.ratio_clip)
            scale = STEPS if recipe.reduce == "mean" else 1
            target = (values[a] - values[b]) / recipe.beta
            losses.append(recipe.beta * float(max((plain / scale - target) ** 2, (clipped / scale - target) ** 2)))
    return losses


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_its_loss_is_the_papers(reduce: str) -> None:
    """With a clipping range that holds for some pairs and not for others."""
    fields = {
        "policy": lambda x, t: 0.3 * torch.tanh(x),
        "reference": lambda x, t: 0.2 * x,
        "behaviour": lambda x, t: 0.25 * torch.sin(x),
    }
    recipe = PRDP(beta=10.0, ratio_clip=0.002, reduce=reduce, normalise_by="none", pairs=None)
    values = torch.tensor([0.5, 0.1, 0.9, 0.3])
    rollout = rolled(fields["behaviour"], values, torch.zeros(SAMPLES, dtype=torch.long))
    bench = Fields(**fields)
    terms = recipe.terms(rollout, recipe.credit(rollout.scores, rollout.group))
    loss = recipe.loss(terms, seen(recipe, rollout, bench), bench)
    wanted = transcribed(recipe, rollout, *fields.values())
    torch.testing.assert_close(loss.value.sort().values, torch.tensor(sorted(wanted)), rtol=1e-3, atol=1e-8)
    assert 0 < float(loss.metrics["clipped"].sum()) < len(terms)
    alone = [
        recipe.loss(terms[n : n + 1], seen(recipe, rollout, bench, chunk=1), bench).value for n in range(len(terms))
    ]
    torch.testing.assert_close(torch.cat(alone), loss.value)


def test_it_is_zero_at_the_optimum() -> None:
    """A Gaussian step, a reward linear in what it reaches: ``exp(r / beta)`` moves the mean by ``a S^2 / beta``."""
    slope, recipe = 2.0, PRDP(beta=0.5, normalise_by="none", pairs=None, ratio_clip=None)
    group = torch.zeros(SAMPLES, dtype=torch.long)

    def reference(x: Tensor, t: Tensor) -> Tensor:
        return 0.2 * x

    rollout = rolled(reference, torch.zeros(SAMPLES), group, same=True, steps=1)
    reached = rollout.trajectory.x_next[:, 0]
    rollout = rollout.become(Scored, scores=Scores(slope * reached.flatten(1).mean(1)))
    zero = torch.zeros(1, *SHAPE)
    means = [
        samplers.step("flow_sde", zero, zero + v, T[0], T_NEXT[0], noise_level=0.7, x_next=zero).mean for v in (0, 1)
    ]
    shift = slope / recipe.beta * rollout.trajectory.std[0, 0] ** 2 / (means[1] - means[0]).mean()
    found = []
    for factor in (1.0, 0.0, 1.1):
        bench = Fields(reference=reference, policy=lambda x, t, k=factor: reference(x, t) + k * shift)
        terms = recipe.terms(rollout, recipe.credit(rollout.scores, group))
        loss = recipe.loss(terms, seen(recipe, rollout, bench), bench)
        found.append(loss.value / recipe.beta)
    assert float(found[0].max()) < 1e-8
    gaps = terms.gap / recipe.beta
    torch.testing.assert_close(found[1], gaps.square())
    torch.testing.assert_close(found[2], (0.1 * gaps).square(), rtol=1e-3, atol=1e-7)


def test_pairs_of_groups_with_ties_and_missing_scores() -> None:
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    values = torch.tensor([0.1, 0.4, float("nan"), 0.2, 0.5, 0.5, 0.5, 0.5])
    rollout = rolled(lambda x, t: x, values, group)
    for pairs, count, trained in ((4, 4, 3), (None, 12, 9)):
        recipe = PRDP(pairs=pairs, passes=2)
        terms = recipe.terms(rollout, recipe.credit(Scores(values), group))
        assert len(terms) == 2 * count
        assert int(terms.weight.sum()) == 2 * trained
        kept = terms[terms.weight.nonzero().flatten()]
        assert not {2} & {*kept.sample.tolist(), *kept.loser.tolist()}
        assert all(group[kept.sample] == group[kept.loser])
        assert bool((kept.gap >= 0).all())
        for update in range(2):  # every pair is in both updates
            part = kept[((kept.slot + kept.sample) % 2 == update).nonzero().flatten()]
            assert len(set(zip(part.sample.tolist(), part.loser.tolist(), strict=True))) == trained


@pytest.mark.parametrize("pairs", [1, 2, None])
def test_terms_and_rows_that_it_announces(pairs: int | None, model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model, {"kind": "prdp", "pairs": pairs, "passes": 2}, train={"updates": 2})
    group = torch.arange(2).repeat_interleave(config.rollout.group)
    rollout = rolled(lambda x, t: x, torch.arange(8.0), group)
    terms = config.recipe.terms(rollout, config.recipe.credit(rollout.scores, group))
    assert len(terms) == 8 * config.recipe.terms_per_sample(config)
    assert config.recipe.rows_per_term(config) == 2 * 2


def test_more_passes_than_updates_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe.passes\s.*at most train.updates, 2"):
        settings(tmp_path, model, {"kind": "prdp", "passes": 3}, train={"updates": 2})


def test_chunks_change_no_update(model: Path, tmp_path: Path) -> None:
    """Two updates of a rollout with every pair in both: the second one's policy is no longer the one that sampled."""
    found = []
    for name, chunk in (("whole", 1000), ("chunked", 1)):
        (tmp_path / name).mkdir()
        config = settings(
            tmp_path / name, model, {"kind": "prdp", "passes": 2}, prompts={"heldout": None},
            train={"steps": 1, "updates": 2, "chunk": chunk, "max_grad_norm": 1e6, "lr": 1e-4},
        )  # fmt: skip
        train(config)
        found.append(optimizer_moments(config.run_dir))
    whole, chunked = (torch.cat([moment.flatten() for moment in moments]) for moments in found)
    assert float((whole - chunked).norm() / whole.norm()) < 1e-3
