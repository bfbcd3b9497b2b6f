"""Mixtures by hand: weights, ranges, groups, and what a missing member does."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignflow.errors import ConfigError
from rewards.base import Reward, RewardError, RewardSettings, Scores
from rewards.combine import geometric, harmonic, knn_smooth, log_tame, lower_bound, product, standardised, weighted
from rewards.reference import measure
from rewards.wrappers.mixture import Mixture


class Fixed(RewardSettings):
    """Given numbers."""

    kind: Literal["fixed"] = "fixed"
    values: tuple[float | None, ...]
    deviations: tuple[float, ...] = ()
    span: tuple[float, float] = (-math.inf, math.inf)
    why: str = ""

    def build(self, device="cpu"):
        def function(media, prompts, group):
            missing = {i: self.why for i, value in enumerate(self.values) if value is None and self.why}
            parts = {"sigma": torch.tensor(self.deviations)} if self.deviations else {}
            return Scores(torch.tensor([math.nan if v is None else v for v in self.values]), missing, parts)

        return Reward("fixed", function, range=self.span)


def mixture(group=None, prompts=None, settings=None, **parts):
    count = len(next(iter(parts.values()))["reward"].values)
    reward = Mixture(parts=parts, **(settings or {})).build()
    return reward, reward(torch.zeros(count, 3, 2, 2), prompts or ["x"] * count, group)


def test_mixture_adds_up():
    reward, scores = mixture(
        raw={"reward": Fixed(values=(1, 2, 3, 6)), "weight": 0.5},
        ranged={"reward": Fixed(values=(10, 20, 30, 15), span=(10, 30)), "normalise": "range", "weight": -2},
    )
    assert scores.values.tolist() == [0.5, 1 - 1, 1.5 - 2, 3 - 0.5]
    assert scores.parts["raw"].tolist() == [1, 2, 3, 6]
    assert scores.parts["ranged"].tolist() == [10, 20, 30, 15]
    assert reward.range == (-math.inf, math.inf)
    assert not reward.differentiable
    only, _ = mixture(a={"reward": Fixed(values=(1, 2), span=(0, 5)), "weight": -2}, b={
        "reward": Fixed(values=(1, 2), span=(0, 5)), "normalise": "range", "weight": 3})  # fmt: skip
    assert only.range == (-10, 3)


def test_mixture_normalises_in_groups_and_batches():
    group = torch.tensor([0, 0, 1, 1, 2])
    # group 0: mean 2, deviation 1; group 1: no spread; group 2: alone
    _, scores = mixture(group, a={"reward": Fixed(values=(1, 3, 5, 5, 9)), "normalise": "group"})
    assert scores.values.tolist() == [-1, 1, 0, 0, 0]
    # the same groups, told by the prompts
    _, scores = mixture(None, list("ppqqr"), a={"reward": Fixed(values=(1, 3, 5, 5, 9)), "normalise": "group"})
    assert scores.values.tolist() == [-1, 1, 0, 0, 0]
    # batch: mean 4, squares 9 + 1 + 1 + 9 = 20 over 4, deviation sqrt 5
    _, scores = mixture(a={"reward": Fixed(values=(1, 3, 5, 7)), "normalise": "batch", "weight": math.sqrt(5)})
    torch.testing.assert_close(scores.values, torch.tensor([-3.0, -1, 1, 3]))
    # 0.1 three times has a tiny deviation from rounding, which must not be blown up
    _, scores = mixture(a={"reward": Fixed(values=(0.1, 0.1, 0.1)), "normalise": "batch"})
    assert scores.values.tolist() == [0, 0, 0]


def test_mixture_names_the_member_that_failed():
    _, scores = mixture(
        a={"reward": Fixed(values=(1, None, 3), why="too dark"), "normalise": "batch"},
        b={"reward": Fixed(values=(None, None, 1))},
    )
    # of a only 1 and 3 count: mean 2, deviation 1
    assert scores.values.isnan().tolist() == [True, True, False]
    assert scores.values[2] == 1 + 1
    assert scores.reasons == {0: "b: the reward returned nan", 1: "a: too dark; b: the reward returned nan"}
    assert scores.parts["a"][0] == 1


def test_mixture_of_mixtures():
    inner = Mixture(parts={"x": {"reward": Fixed(values=(1, None))}})
    _, scores = mixture(a={"reward": Fixed(values=(1, 2))})
    outer = Mixture(parts={"in": {"reward": inner, "weight": 2}}).build()
    scores = outer(torch.zeros(2, 3, 2, 2), ["p", "q"])
    assert scores.values[0] == 2
    assert scores.reasons == {1: "in: x: the reward returned nan"}
    assert set(scores.parts) == {"in", "in/x"}


def test_mixture_needs_a_range_to_normalise_by():
    with pytest.raises(RewardError, match="'a' has no finite range"):
        mixture(a={"reward": Fixed(values=(1, 2)), "normalise": "range"})


def test_normalised_statistics_are_constants_to_the_gradient():
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    standardised(values, torch.zeros(2))[0].backward()
    assert values.grad.tolist() == [1, 0]  # 1 / deviation, and nothing through mean or deviation


# -- ways to combine, as numbers ----------------------------------------------------------------------------------

NAN = math.nan


def one(how, values, weights, *options):
    return how(torch.tensor([values]), torch.tensor(weights), *options).item()


def test_harmonic_is_the_published_one():
    assert one(harmonic, [1.0, 0.5], [0.5, 0.5]) == pytest.approx(2 / 3, abs=1e-6)
    assert one(harmonic, [1.0, 0.5], [1.0, 0.0]) == pytest.approx(1, abs=1e-6)
    assert one(harmonic, [1.0, 0.5], [0.0, 1.0]) == pytest.approx(0.5, abs=1e-6)
    assert one(harmonic, [1.0, 0.0], [0.5, 0.5]) == pytest.approx(0, abs=1e-6)
    assert math.isnan(one(harmonic, [1.0, -0.5], [0.5, 0.5]))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.1, 3)), min_size=1, max_size=5))
def test_harmonic_below_geometric_below_arithmetic(pairs):
    values, weights = map(list, zip(*pairs, strict=True))
    share = [weight / sum(weights) for weight in weights]
    means = [one(how, values, share) for how in (harmonic, geometric, weighted)]
    assert min(values) - 1e-5 <= means[0] <= means[1] + 1e-5 <= means[2] + 2e-5 <= max(values) + 3e-5


def test_product_and_geometric():
    assert one(product, [0.5, 4.0], [1.0, 0.5]) == 1
    assert one(product, [0.0, 4.0], [1.0, 1.0]) == 0
    assert math.isnan(one(product, [-1.0, -1.0], [1.0, 1.0]))
    assert one(geometric, [2.0, 8.0], [3.0, 3.0]) == pytest.approx(4)
    assert math.isnan(one(geometric, [NAN, 0.0], [1.0, 1.0]))


def test_lower_bound_discounts_disagreement():
    # mean 2, deviation 1
    assert one(lower_bound, [1.0, 3.0], [1.0, 1.0], 0.5) == 1.5
    # shares 3/4, 1/4: mean 1.5, variance 3/4 1/4 + 1/4 9/4 = 3/4
    assert one(lower_bound, [1.0, 3.0], [3.0, 1.0], 1.0) == pytest.approx(1.5 - math.sqrt(0.75))
    assert one(lower_bound, [2.0, 2.0], [1.0, 1.0], 9.0) == 2
    agreed = torch.tensor([[2.0, 2.0]], requires_grad=True)
    lower_bound(agreed, torch.ones(2), 9.0).backward()
    assert agreed.grad.tolist() == [[0.5, 0.5]]


def test_log_tame_tames_the_wild_one_only():
    calm, wild = torch.tensor([1.0, 1.1, 0.9, 1.0]), torch.tensor([0.1, 5.0, 0.2, 0.1])
    rewards = torch.stack([calm, wild], 1)
    for threshold in ("mean", "median", 0.5):
        tamed = log_tame(rewards, threshold)
        assert torch.equal(tamed[:, 0], calm)
        torch.testing.assert_close(tamed[:, 1], wild.log1p())
    assert torch.equal(log_tame(rewards, 10.0), rewards)


@given(st.floats(0.1, 50), st.floats(0.1, 50))
@settings(deadline=None)  # the first call may wait for a busy processor
def test_log_tame_leaves_equally_spread_rewards_alone(first, second):
    base = torch.tensor([0.5, 1.0, 2.0, NAN])
    rewards = torch.stack([first * base, second * base], 1)
    assert torch.equal(log_tame(rewards)[:3], rewards[:3])


def test_log_tame_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="positive mean"):
        log_tame(torch.tensor([[1.0, -1.0], [2.0, -2.0]]))
    with pytest.raises(ValueError, match="above -1"):
        log_tame(torch.tensor([[1.0, -2.0], [1.1, 9.0]]))


def test_knn_smoothing_is_the_published_one():
    # cosines of 0.95 and 0.92 to the first, and the third is a neighbour of neither other
    angles = torch.tensor([0.0, math.acos(0.95), -math.acos(0.92), math.pi])
    embedding = torch.stack([angles.cos(), angles.sin()], 1)
    values, group = torch.tensor([0.2, 0.6, 0.7, 5.0]), torch.zeros(4)
    smooth = knn_smooth(values, embedding, group)
    assert smooth[0].item() == pytest.approx(0.492683, abs=1e-6)
    assert smooth[3].item() == 5
    assert knn_smooth(values, embedding, group, neighbours=1)[0].item() == pytest.approx((0.2 + 0.95 * 0.6) / 1.95)
    assert torch.equal(knn_smooth(values, embedding, torch.arange(4)), values)  # nobody shares a prompt
    holed = knn_smooth(torch.tensor([0.2, NAN, 0.7, 5.0]), embedding, group)
    assert holed[0].item() == pytest.approx((0.2 + 0.92 * 0.7) / 1.92)
    assert holed[1].isnan()


# -- ways to combine, as settings -----------------------------------------------------------------------------------


def test_a_score_below_zero_is_missing_where_there_is_no_mean_of_it():
    for how in ("harmonic", "geometric", "product"):
        _, scores = mixture(
            settings={"how": how}, a={"reward": Fixed(values=(1, -2))}, b={"reward": Fixed(values=(1, 1))}
        )
        assert scores.values[0] == pytest.approx(1)
        assert scores.values[1].isnan()
        assert scores.reasons == {1: f"a: {how} accepts no scores below 0, got -2"}


def test_gates():
    parts = {
        "a": {"reward": Fixed(values=(1, 2, 3, 4))},
        "safe": {"reward": Fixed(values=(0.9, 0.5, 0.4, None)), "gate": 0.5},
    }
    reward, scores = mixture(settings={"gated": -1}, **parts)
    assert scores.values[:3].tolist() == [1, 2, -1]
    assert scores.reasons == {3: "safe: the reward returned nan"}
    assert reward.range == (-math.inf, math.inf)
    _, scores = mixture(settings={"gated": None}, **parts)
    assert scores.values[:2].tolist() == [1, 2]
    assert scores.reasons[2] == "safe: 0.4 is below the gate at 0.5"
    with pytest.raises(ConfigError, match="all parts are gates"):
        mixture(a={"reward": Fixed(values=(1,)), "gate": 0})


def test_a_failed_gate_hides_no_missing_score():
    _, scores = mixture(a={"reward": Fixed(values=(None,))}, safe={"reward": Fixed(values=(0,)), "gate": 0.5})
    assert scores.values.isnan().all()
    assert scores.reasons == {0: "a: the reward returned nan"}


def test_own_uncertainty_is_subtracted():
    part = {"reward": Fixed(values=(1, 2), deviations=(0.5, 0)), "uncertainty": "sigma"}
    _, scores = mixture(settings={"discount": 2}, a=part)
    assert scores.values.tolist() == [0, 2]
    with pytest.raises(RewardError, match="'a' has no part 'tau', only sigma"):
        mixture(a={**part, "uncertainty": "tau"})


def test_ranges():
    bounded = {"reward": Fixed(values=(1,), span=(0, 4)), "weight": 0.5}
    for how, span in {"weighted": (0, 4), "product": (0, 4), "harmonic": (0, 4), "lower_bound": (-math.inf, 4)}.items():
        assert mixture(settings={"how": how}, a=bounded, b=bounded)[0].range == span, how


def test_scopes_follow_the_normalisation():
    plain, grouped, batched = ({"reward": Fixed(values=(1,)), "normalise": how} for how in ("none", "group", "batch"))
    assert mixture(a=plain)[0].scope == "sample"
    assert mixture(a=plain, b=grouped)[0].scope == "group"
    assert mixture(a=batched, b=grouped)[0].scope == "batch"
    assert mixture(settings={"how": "log_tamed"}, a=plain)[0].scope == "batch"


def test_weights_that_make_no_mean():
    with pytest.raises(ConfigError, match="harmonic needs weights above 0; 'a' has -1"):
        mixture(settings={"how": "harmonic"}, a={"reward": Fixed(values=(1,)), "weight": -1})


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_by_numbers_and_by_file(tmp_path):
    given = {"mean": 2.0, "std": 4.0, "quantiles": [0.0, 1.0, 1.0, 5.0]}
    fixed = Fixed(values=(2, 10, None), span=(0, 20))
    part = {"reward": fixed, "normalise": "reference", "reference": given}
    _, scores = mixture(a=part)
    assert scores.values[:2].tolist() == [0, 2]
    part = {"reward": Fixed(values=(-3, 0.5, 1, 3, 9, None)), "normalise": "quantile", "reference": given}
    reward, scores = mixture(a=part)
    torch.testing.assert_close(scores.values[:5], torch.tensor([0, 1 / 6, 2 / 3, 5 / 6, 1]))
    assert scores.values[5].isnan()
    assert reward.range == (0, 1)
    assert reward.scope == "sample"
    file = tmp_path / "reference.json"
    sample = torch.tensor([0.0, 4.0, NAN, 2.0])
    file.write_text(measure(sample, fixed.model_dump(mode="json")).model_dump_json())
    _, scores = mixture(a={"reward": fixed, "normalise": "reference", "reference": str(file)})
    torch.testing.assert_close(scores.values[:2], torch.tensor([0.0, 8 / math.sqrt(8 / 3)]))
    assert json.loads(file.read_text())["missing"] == 1


def test_calibration_that_does_not_fit(tmp_path):
    fixed, file = Fixed(values=(1, 2)), tmp_path / "reference.json"
    part = {"reward": fixed, "normalise": "reference", "reference": str(file)}
    with pytest.raises(RewardError, match=r"No such file.*alignflow reward calibrate"):
        mixture(a=part)
    file.write_text("{}")
    with pytest.raises(RewardError, match="not a file of format alignflow-calibration/1"):
        mixture(a=part)
    file.write_text(measure(torch.tensor([1.0, 2.0]), {"kind": "clip"}).model_dump_json())
    with pytest.raises(RewardError, match=r"measured of .*clip.*measure it again"):
        mixture(a=part)
    with pytest.raises(RewardError, match="scores that differ; it has 2 scores, all equal"):
        measure(torch.tensor([1.0, 1.0, NAN]), {})
    with pytest.raises(ConfigError, match="reference needs normalise"):
        mixture(a={"reward": fixed, "normalise": "reference"})
