"""What holds for every search method: budgets, seeds, chunks, refusals, the best per prompt."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_search import PROMPTS, SLOPE, Gaussian, Linear, task_of

from align.config import registry
from align.search import search
from align.search.budget import LIMITS, Budget, BudgetSpent, Cost, Meter
from align.search.driver import spend
from alignflow.errors import ConfigError, SearchError

METHODS = {
    kind: {"kind": kind, "sampler": {"steps": 3}, **{"reno": {"iterations": 3}, "svdd": {"children": 3}}.get(kind, {})}
    for kind, cls in registry.searches().items()
    if not cls.amortised
}
EVERY = pytest.mark.parametrize("kind", METHODS)


def results(kind, budget=None, prompts=PROMPTS, reward=None, generator=None, **options):
    judge = reward or Linear().reward
    if registry.searches()[kind].latent:
        options.setdefault("latent_reward", lambda x, t, prompts: (x * SLOPE).flatten(1).sum(1))
    return search(generator or Gaussian(), judge, prompts, METHODS[kind], budget or {"network_calls": 60}, **options)


def same(a, b) -> bool:
    """Whether two results of a prompt are equal in everything but the time they took."""

    def told(found):
        curve = [{name: value for name, value in row.items() if name != "seconds"} for row in found.curve]
        kept = [(one.reward, one.lineage, one.number) for one in found.kept]
        return found.prompt, found.number, found.rewards, kept, curve

    return told(a) == told(b) and all(torch.equal(x.latents, y.latents) for x, y in zip(a.kept, b.kept, strict=True))


@EVERY
def test_best_is_the_highest_of_its_own_prompt_and_its_curve_rises(kind):
    for found in results(kind):
        assert found.best is not None
        assert found.reward == max(found.rewards) == found.rewards[found.best.number]
        again = float((found.best.latents * SLOPE).sum())
        assert found.reward == pytest.approx(again, rel=1e-6, abs=1e-6)
        assert torch.equal(found.best.media, found.best.latents)
        assert found.best.lineage[0].startswith("noise")
        heights = [row["reward"] for row in found.curve]
        assert heights == sorted(heights)
        for name in ("network_calls", "decodes", "reward_calls", "backward_calls", "seconds"):
            costs = [row[name] for row in found.curve]
            assert costs == sorted(costs)
            assert costs[-1] == found.spent[name]


@EVERY
def test_counts_are_those_of_generator_decoder_and_reward(kind):
    generator, judge = Gaussian(), Linear()
    found = results(kind, reward=judge.reward, generator=generator)
    assert sum(one.spent["network_calls"] for one in found) == generator.network_calls
    assert sum(one.spent["decodes"] for one in found) == generator.decodes
    if not registry.searches()[kind].latent:
        assert sum(one.spent["reward_calls"] for one in found) == judge.calls


@EVERY
def test_same_seed_same_result_at_any_size_of_chunk_and_batch(kind):
    whole = results(kind, batch=3, chunk=64, decode_chunk=64)
    for batch, chunk, decode_chunk in ((3, 4, 2), (1, 5, 3)):
        generator = Gaussian()
        parts = results(kind, batch=batch, chunk=chunk, decode_chunk=decode_chunk, generator=generator)
        assert all(same(a, b) for a, b in zip(whole, parts, strict=True))
        assert generator.largest <= max(chunk, decode_chunk)
    other = results(kind, seed=1)
    assert not any(same(a, b) for a, b in zip(whole, other, strict=True))


LEAST = {"network_calls": 40, "decodes": 12, "reward_calls": 12}


@EVERY
@settings(max_examples=4, deadline=None)
@given(limit=st.sampled_from(sorted(LEAST)), extra=st.integers(0, 40), guidance=st.sampled_from([1.0, 3.0]))
def test_no_limit_is_ever_exceeded(kind, limit, extra, guidance):
    method = {**METHODS[kind], "sampler": {"steps": 3, "guidance": guidance}}
    amount = LEAST[limit] + extra
    generator, judge = Gaussian(), Linear()
    options = {"latent_reward": lambda x, t, prompts: x.flatten(1).sum(1)} if registry.searches()[kind].latent else {}
    found = search(generator, judge.reward, PROMPTS[:2], method, {limit: amount}, **options)
    for one in found:
        assert one.best is not None
        assert 0 < one.spent[limit] <= amount
    assert generator.network_calls == sum(one.spent["network_calls"] for one in found)


@EVERY
def test_a_search_uses_what_it_is_given(kind):
    """Best of N spends all but less than one sample; no method leaves more than a round."""
    found = results(kind, {"network_calls": 150}, prompts=["one"])[0]
    left = 150 - found.spent["network_calls"]
    assert left < (3 if kind in ("best_of_n", "zero_order", "trust_region") else 50)


@EVERY
def test_seconds_end_a_search(kind):
    found = results(kind, {"seconds": 0.05})
    assert all(one.best is not None for one in found)
    assert sum(one.spent["seconds"] for one in found) < 5


@EVERY
def test_a_budget_below_one_sample_is_refused_with_its_cost(kind):
    with pytest.raises(SearchError, match=r"a budget of 2 network calls is less than one sample, which takes 3 net"):
        results(kind, {"network_calls": 2})


@EVERY
def test_particles_without_a_score_are_never_chosen(kind):
    judge = Linear(missing=lambda values: (values * 1000).long() % 3 == 0)
    for found in results(kind, {"network_calls": 60}, reward=judge.reward):
        known = [value for value in found.rewards if not math.isnan(value)]
        assert found.reward == max(known)
        assert all(math.isfinite(one.reward) for one in found.kept)
        assert all(one.latents.isfinite().all() for one in found.kept)


@EVERY
def test_no_score_at_all_is_an_error_that_says_why(kind):
    judge = Linear(missing=lambda values: torch.ones_like(values, dtype=torch.bool))
    with pytest.raises(SearchError, match=r"no sample of 3 prompts has a score by reward 'linear': the judge fell asl"):
        results(kind, reward=judge.reward)


def test_a_prompt_without_scores_leaves_the_others_theirs():
    judge = Linear()
    judge.missing = lambda values: values > 1e9
    real = judge.reward.function

    def function(media, prompts, group):
        values = real(media, prompts, group).values.clone()
        values[[i for i, prompt in enumerate(prompts) if prompt == "two"]] = float("nan")
        return values

    found = search(Gaussian(), type(judge.reward)("partial", function), PROMPTS, "best_of_n", {"decodes": 3})
    assert [one.best is not None for one in found] == [True, False, True]
    assert "nan" in found[1].reason


@pytest.mark.parametrize("kind", [kind for kind in METHODS if registry.searches()[kind].gradients])
def test_gradient_methods_refuse_rewards_without(kind):
    with pytest.raises(SearchError, match=rf"{kind} follows the gradient of the reward, and 'linear' has none"):
        results(kind, reward=Linear(differentiable=False).reward)


def test_a_latent_reward_is_asked_for():
    with pytest.raises(SearchError, match="nrg needs a latent reward"):
        results("nrg", latent_reward=None)


@pytest.mark.parametrize("kind", [kind for kind, cls in registry.searches().items() if cls.stochastic])
@pytest.mark.parametrize(
    ("sampler", "said"), [({"kind": "ode"}, "sampler.kind: ode, but"), ({"steps": 1}, "sampler.steps: 1, but")]
)
def test_methods_of_noisy_steps_refuse_samplers_without(kind, sampler, said):
    with pytest.raises(ConfigError, match=rf"{said} \w+ needs noise between its steps.*One-step generators"):
        search(Gaussian(), Linear().reward, PROMPTS, {"kind": kind, "sampler": sampler}, {"decodes": 99})


@pytest.mark.parametrize("kind", ["best_of_n", "zero_order", "trust_region", "reno"])
def test_one_step_generators_are_searched(kind):
    method = {**METHODS[kind], "sampler": {"steps": 1}}
    generator = Gaussian()
    found = search(generator, Linear().reward, PROMPTS, method, {"network_calls": 12})
    assert generator.network_calls == 36
    assert all(len(one.rewards) == 12 for one in found)


def test_mistakes_are_explained_all_at_once():
    with pytest.raises(ConfigError) as error:
        search(Gaussian(), Linear().reward, PROMPTS, {"kind": "fk", "particle": 3}, {"networkcalls": 3})
    said = str(error.value)
    assert "search.particle: no such setting 'particle'; did you mean 'particles'?" in said
    assert "budget.networkcalls" in said
    with pytest.raises(ConfigError, match="needs at least one of network_calls"):
        search(Gaussian(), Linear().reward, PROMPTS, "fk", {})
    with pytest.raises(ConfigError, match="no such search method 'fkk'; did you mean 'fk'"):
        search(Gaussian(), Linear().reward, PROMPTS, "fkk", {"decodes": 3})


# -- the meter --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_meter_counts_and_stops_before_not_after():
    meter = Meter(Budget(network_calls=10, decodes=3), 2)
    row = torch.tensor([0, 0, 1])
    meter.require(Cost(5), row)
    with meter.measured("network_calls", row, 5):
        pass
    assert meter.counts["network_calls"] == [10, 5]
    with pytest.raises(BudgetSpent):
        meter.require(Cost(1), row)
    meter.require(Cost(5), torch.tensor([1]))
    assert meter.affordable(Cost(1, 1, 1), 99) == 0
    assert meter.affordable(Cost(0, 1, 1), 99) == 3
    assert meter.affordable(Cost(0, 1, 1), 99, reserve=Cost(0, 2)) == 1


def test_meter_plans_by_the_pace_and_ends_with_the_time():
    clock = Clock()
    meter = Meter(Budget(seconds=10), 2, clock)
    row = torch.tensor([0, 1])
    with meter.measured("network_calls", row):
        clock.now = 1.0
    assert meter.affordable(Cost(1), 99) == 19  # 19 of the 20 seconds left, 1/2 s a call, for two prompts
    assert meter.spent(0)["seconds"] == 0.5
    clock.now = 20.0
    assert meter.affordable(Cost(1), 99) == 0
    with pytest.raises(BudgetSpent):
        meter.require(Cost(1), row)


def test_what_a_budget_interrupts_keeps_the_best_so_far():
    """A method that plans badly is stopped by the budget itself."""
    task = task_of("best_of_n", {"network_calls": 25})

    class Greedy:
        def search(self, task):
            for _ in range(10**6):
                task.score(task.sample(task.begin(1), "sample"))

    found = spend(Greedy(), task)
    assert [len(one.rewards) for one in found] == [2, 2, 2]
    assert all(one.spent["network_calls"] == 20 + 5 for one in found)
    assert set(LIMITS) <= set(found[0].spent)


def test_interrupt_keeps_what_was_found_and_the_rest_is_as_if_never_stopped():
    kept = []

    def stop(found):
        kept.append(found)
        if len(kept) == 2:
            raise KeyboardInterrupt

    whole = results("fk", batch=1)
    with pytest.raises(KeyboardInterrupt):
        results("fk", batch=1, on_found=stop)
    rest = results("fk", batch=1, done=[found.number for found in kept])
    assert all(same(a, b) for a, b in zip(whole, [*kept, *rest], strict=True))


def test_objectives_of_a_latent_reward_have_weights():
    def two(x, t, prompts):
        total = (x * SLOPE).flatten(1).sum(1)
        return torch.stack([total, -total], 1)

    def one(x, t, prompts):
        return two(x, t, prompts)[:, 0]

    def guided(latent_reward, **options):
        method = {**METHODS["nrg"], "strength": 1.0, **options}
        budget = {"network_calls": 6}
        found = search(Gaussian(), Linear().reward, PROMPTS, method, budget, latent_reward=latent_reward)
        return torch.stack([each.best.latents for each in found])

    plain = guided(one)
    torch.testing.assert_close(guided(two, weights=[1.0, 0.0]), plain)
    torch.testing.assert_close(guided(two, weights=[1.5, 0.5]), plain)
    torch.testing.assert_close(guided(one, weights=[2.0]), guided(one, strength=2.0))
    assert not torch.allclose(guided(two), plain)  # they cancel
    with pytest.raises(SearchError, match=r"search\.weights: 3 weights, and the latent reward has 2 objectives"):
        guided(two, weights=[1.0, 1.0, 1.0])


def test_a_latent_reward_judges_the_way_without_decodes():
    def latent_reward(x, t, prompts):
        assert len(x) == len(t) == len(prompts)
        return x.flatten(1).sum(1)

    for kind in ("fk", "beam", "svdd", "paths", "rbf", "prune"):
        generator = Gaussian()
        method = {**METHODS[kind], "sampler": {"steps": 6}}
        judge, options = Linear().reward, {"latent_reward": latent_reward}
        found = search(generator, judge, PROMPTS, method, {"network_calls": 99}, **options)
        finished = sum(len(one.rewards) for one in found)
        assert generator.decodes == finished < sum(one.spent["reward_calls"] for one in found)


def test_children_are_fewer_where_the_budget_pays_for_fewer():
    """One beam of 8 steps takes 1 + 7 M calls: of 80 calls M is 11, not 20."""
    method = {"kind": "svdd", "sampler": {"steps": 8}}
    found = search(Gaussian(), Linear().reward, PROMPTS, method, {"network_calls": 80})
    assert [len(one.rewards) for one in found] == [11, 11, 11]
    assert [one.spent["network_calls"] for one in found] == [78, 78, 78]
