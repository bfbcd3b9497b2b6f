"""Searches on Gaussian data with a linear reward, where the tilted law, marginals and noises are known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from toy_search import PROMPTS, SHAPE, SLOPE, SPREAD, Gaussian, Linear, law, task_of

from align.maths import samplers
from align.search import interpolant, smc
from align.search.noises import add_noise, as_long_as, neighbour, renew, surprise
from generators.base import Conditioning

STRENGTH, PLENTY = 1.5, {"network_calls": 10**7}


@pytest.fixture
def clouds(monkeypatch):
    """Every cloud of particles that a method makes."""
    made = []

    run = smc.Cloud.run

    def watched(cloud, *purpose):
        made.append(cloud)
        run(cloud, *purpose)

    monkeypatch.setattr(smc.Cloud, "run", watched)
    return made


def tilted_error(clouds, kind, steps, level) -> tuple[float, float]:
    """Distance of the weighted mean along the reward from the tilted law's, and its standard error, over all seeds."""
    errors, variances = [], []
    direction = SLOPE / SLOPE.norm()
    for cloud in clouds:
        table = smc.weights(cloud.now.log_weight.view(cloud.task.prompts, -1))
        place = (cloud.now.x * direction).flatten(1).sum(1).view_as(table)
        for b, text in enumerate(PROMPTS):
            mean, variance = law(kind, steps, level, 0.1 * len(text))
            wanted = float((mean * direction).sum() + STRENGTH * variance * SLOPE.norm())
            got = float((table[b] * place[b]).sum())
            errors.append(got - wanted)
            variances.append(float((table[b].square() * (place[b] - got) ** 2).sum()))
    return sum(errors) / len(errors), math.sqrt(sum(variances)) / len(errors)


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "fk", "potential": "diff"},
        {"kind": "fk", "potential": "max"},
        {"kind": "fk", "potential": "sum", "every": 3},
        {"kind": "fk", "resample_below": 1.0},
        {"kind": "fk", "resample_below": 1e-9},
        {"kind": "das"},
        {"kind": "das", "cap": None, "resample_below": 1.0},
        {"kind": "psi", "particles": 300, "chains": 60},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_weighted_particles_reach_the_tilted_mean(method, clouds):
    """Whatever the potential, the resampling and the proposal: p(x) exp(strength r) of the sampler's law p."""
    steps, level = 8, 1.0
    for seed in (0, 1, 2):
        settings = {"particles": 400, "strength": STRENGTH, "sampler": {"steps": steps}, **method}
        task = task_of(settings, PLENTY, seed=seed, keep=1, chunk=4096, decode_chunk=4096)
        once(task)
        settings_of(settings).search(task)
    assert len(clouds) == 3
    error, stderr = tilted_error(clouds, "ddim", steps, level)
    # copies of one ancestor are not independent, so the spread of the means decides as well
    assert stderr < 0.05
    assert abs(error) < 4 * max(stderr, 0.02)
    plain = SPREAD**2 * STRENGTH * float(SLOPE.norm())
    assert plain > 0.6  # what an untilted population would be wrong by


def settings_of(settings):
    from align.search.driver import parse

    return parse(settings, PLENTY).search


def once(task) -> None:
    """Let the task's budget pay for one round only."""
    rounds = task.rounds

    def first(cost, wanted):
        yield next(rounds(cost, wanted))

    task.rounds = first


def test_potentials_multiply_to_the_tilt_whatever_is_resampled(clouds):
    """Weights where nothing is resampled are exactly strength times the reward; accumulated, not forgotten."""
    for potential in ("diff", "max", "sum"):
        settings = {"kind": "fk", "potential": potential, "resample_below": 1e-9, "strength": STRENGTH, "particles": 8}
        task = task_of(settings, PLENTY)
        once(task)
        settings_of(settings).search(task)
        cloud = clouds[-1]
        rewards = (cloud.now.x * SLOPE).flatten(1).sum(1)
        assert torch.allclose(cloud.now.log_weight, STRENGTH * rewards.double(), atol=1e-5)


def test_every_line_of_ancestors_pays_the_whole_tilt(clouds):
    """With resampling, what a particle's line was charged (weights given up and kept) is the tilt of its end."""
    settings = {"kind": "fk", "resample_below": 1.0, "strength": STRENGTH, "particles": 8}
    task = task_of(settings, PLENTY)
    once(task)
    settings_of(settings).search(task)
    cloud = clouds[-1]
    rewards = (cloud.now.x * SLOPE).flatten(1).sum(1).double()
    assert torch.allclose(cloud.now.log_weight + cloud.now.charged, STRENGTH * rewards, atol=1e-5)
    assert any("of particle" in word for line in cloud.now.lineage for word in line)


def test_copies_part_at_the_next_step(clouds):
    """No two particles end equal, however often one was copied."""
    settings = {"kind": "fk", "strength": 50.0, "particles": 16, "resample_below": 1.0}
    task = task_of(settings, PLENTY)
    once(task)
    settings_of(settings).search(task)
    ends = clouds[-1].now.x.flatten(1)
    assert len(torch.unique(ends, dim=0)) == len(ends)


def test_systematic_resampling_keeps_the_expected_number_of_copies():
    log_weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]], dtype=torch.double).log()
    for offset in torch.linspace(0, 0.999, 23, dtype=torch.double):
        ancestors = smc.systematic(log_weights, torch.stack([offset, offset]))
        copies = torch.stack([row.bincount(minlength=4) for row in ancestors])
        expected = 4 * log_weights.exp()
        assert bool((copies >= expected.floor() - 1e-9).all())
        assert bool((copies <= expected.ceil() + 1e-9).all())
    assert torch.allclose(smc.effective_size(log_weights), torch.tensor([1 / 0.3, 1.0], dtype=torch.double))
    dead = torch.full((1, 5), -torch.inf, dtype=torch.double)
    assert torch.equal(smc.systematic(dead, torch.full((1,), 0.5, dtype=torch.double)), torch.arange(5)[None])


# -- noises -----------------------------------------------------------------------------------------------------------


def noise(count: int, seed: int = 0, shape=(4, 6, 5)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("cosine", [0.95, 0.0, -0.3])
def test_neighbours_have_the_length_and_the_angle(cosine):
    x = noise(7)
    near = neighbour(x, noise(7, 1), cosine)
    a, b = x.flatten(1), near.flatten(1)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=1), rtol=1e-12)
    assert torch.allclose((a * b).sum(1) / a.norm(dim=1) ** 2, torch.full((7,), cosine).double(), atol=1e-12)
    assert torch.allclose(as_long_as(near * 3, x).flatten(1).norm(dim=1), a.norm(dim=1))


def test_surprise_is_least_at_the_likeliest_length():
    x = noise(1)
    size = x[0].numel()
    lengths = torch.tensor([0.98, 1.0, 1.02]).double() * math.sqrt(size - 1)
    values = surprise(x / x.norm() * lengths.view(-1, 1, 1, 1))
    assert values.argmin() == 1


def test_renewed_and_added_noise_keep_the_marginal():
    """x_t = (1 - t) x0 + t eps stays one, with any share renewed and at any later time."""
    t, share = 0.6, 0.3
    x0, eps, fresh = noise(4000, 0, (4,)), noise(4000, 1, (4,)), noise(4000, 2, (4,))
    x = (1 - t) * x0 + t * eps
    again = (renew(x, eps, fresh, t, share) - (1 - t) * x0) / t
    assert abs(float(again.var()) - 1) < 0.03
    assert torch.allclose((again * eps).mean(), torch.tensor((1 - share**2) ** 0.5).double(), atol=0.03)
    later = (add_noise(x, fresh, t, 0.8) - 0.2 * x0) / 0.8
    assert abs(float(later.var()) - 1) < 0.03
    assert abs(float((later * x0).mean())) < 0.03


# -- the SDE of a flow ------------------------------------------------------------------------------------------------


def sampled(times, path: str, diffusion: float) -> tuple[float, float]:
    """(mean, variance) of what the SDE makes of N(0, 1): every step is affine."""
    generator, m, s = Gaussian(), 0.0, 1.0
    cond = Conditioning({"mean": torch.full((2, *SHAPE), 0.5, dtype=torch.double)})
    x = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)]).double()
    for (t, t_next), level in zip(pairwise(times), interpolant.levels(times, path, diffusion), strict=True):
        v = generator.velocity(x, torch.tensor(t, dtype=torch.double), cond)
        made = samplers.step("cps", x, v, t, t_next, noise_level=level, x_next=x)
        offset, slope = float(made.mean[0, 0, 0, 0]), float((made.mean[1] - made.mean[0])[0, 0, 0])
        m, s = offset + slope * m, slope**2 * s + float(made.std[0]) ** 2
    return m, s


@pytest.mark.parametrize("path", ["vp", "linear"])
def test_sde_of_any_diffusion_keeps_the_marginals(path):
    """Mean and variance are the data's up to the length of the steps, and hardly depend on the diffusion."""
    for times in (lambda n: torch.linspace(1, 0, n + 1).tolist(), lambda n: interpolant.slow_start(n, path)):
        errors = []
        for steps in (40, 160):
            laws = [sampled(times(steps), path, diffusion) for diffusion in (1e-3, 1.0, 3.0)]
            assert all(abs(mean - 0.5) < 1e-3 for mean, _ in laws)
            assert all(abs(variance - laws[0][1]) < 0.015 for _, variance in laws)
            errors.append(abs(laws[-1][1] - SPREAD**2))
        assert errors[1] < 0.5 * errors[0]
    assert sampled(torch.linspace(1, 0, 161).tolist(), path, 3.0)[1] == pytest.approx(SPREAD**2, abs=0.01)


def test_noise_kept_by_the_sde_is_the_integral():
    assert math.cos(interpolant.levels([1.0, 0.0], "linear", 1.0)[0] * math.pi / 2) == pytest.approx(math.exp(-1 / 6))
    for path in ("vp", "linear"):
        times = interpolant.slow_start(10, path)
        assert times[0] == 1.0
        assert times[-1] == 0.0
        assert all(b < a for a, b in pairwise(times))
        low, high = (interpolant.levels(times, path, diffusion) for diffusion in (0.5, 3.0))
        assert all(0 <= a < b <= 1 for a, b in zip(low[:-1], high[:-1], strict=True))


# -- gradients --------------------------------------------------------------------------------------------------------


def posterior_mean_reward(x, t, texts):
    """Log of the mean of exp(reward) given x_t, up to a constant: the exact latent reward."""
    mean = torch.stack([torch.full(SHAPE, 0.1 * len(text), dtype=torch.double) for text in texts])
    t = t.view(-1, 1, 1, 1)
    gain = (1 - t) * SPREAD**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
    return ((mean + gain * (x - (1 - t) * mean)) * SLOPE).flatten(1).sum(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "guidance", "scale": "score", "strength": STRENGTH, "latest": 1.0},
        {"kind": "nrg", "strength": STRENGTH, "latest": 0.999},
    ],
    ids=["guidance", "nrg"],
)
def test_guidance_by_score_samples_the_tilted_law(settings):
    """The gradient is exact for a linear reward of Gaussian data, through the network or a latent reward."""
    settings = {**settings, "particles": 300, "sampler": {"steps": 100}}
    options = {"latent_reward": posterior_mean_reward} if settings["kind"] == "nrg" else {}
    task = task_of(settings, PLENTY, keep=300, chunk=4096, decode_chunk=4096, **options)
    once(task)
    settings_of(settings).search(task)
    for found, text in zip(task.found, PROMPTS, strict=True):
        x = torch.stack([one.latents for one in found.kept])
        wanted = 0.1 * len(text) + STRENGTH * SPREAD**2 * SLOPE
        assert float((x.mean(0) - wanted).abs().max()) < 4 * SPREAD / math.sqrt(300) + 0.02
        assert abs(float(x.std()) - float((wanted.var() + SPREAD**2).sqrt())) < 0.1


def test_noise_ascent_follows_the_exact_gradient():
    """Gradients through checkpointed steps are those of the affine map from noise to sample."""
    task = task_of({"kind": "reno", "sampler": {"steps": 5}}, PLENTY, decode_chunk=2)
    begun = task.begin(2)
    grad = task.reward_grad_through_ode(begun)
    _, variance = law("ode", 5, 0.0, 0.3)
    assert torch.allclose(grad, variance**0.5 * SLOPE.expand_as(grad), atol=1e-9)
    assert task.generator.network_calls == sum(task.meter.counts["network_calls"]) == 2 * 5 * len(begun)


def test_ascent_without_regulariser_climbs_and_regulariser_holds_the_length():
    budget = {"reward_calls": 40}
    from align.search import search

    free = search(Gaussian(), Linear().reward, PROMPTS, {"kind": "reno", "regularise": 0}, budget)
    held = search(Gaussian(), Linear().reward, PROMPTS, {"kind": "reno", "regularise": 10.0}, budget)
    plain = search(Gaussian(), Linear().reward, PROMPTS, {"kind": "best_of_n", "n": 1}, budget)
    for a, b, base in zip(free, held, plain, strict=True):
        assert a.reward > b.reward > base.reward - 1e-9
