"""Formulas of judges by exact numbers, and written replies read or refused."""

from __future__ import annotations

import math

import pytest
import torch

from rewards.judges.asking import per_sample, question, tournament
from rewards.judges.endpoint import among
from rewards.judges.replies import (
    ReplyError,
    fill,
    read_answer,
    read_preference,
    read_rubric,
    read_score,
    read_selection,
    spellings,
)
from rewards.judges.verdicts import best, both_orders, expectation, matches, panels, share


def test_share_of_yes_is_a_sigmoid():
    """Equal logits give 1/2, and what all answers have in common cancels."""
    lp = torch.tensor([[-1.0, -1.0], [-2.0, -3.5], [-7.0, -8.5]])
    assert share(lp).tolist() == pytest.approx([0.5, *[1 / (1 + math.exp(-1.5))] * 2])


def test_expected_digit():
    """Uniform is 1/2, a sure digit is its place, and a constant changes nothing."""
    lp = torch.full((3, 6), -100.0)
    lp[0], lp[1, 5], lp[2, 2] = 0.0, 0.0, 0.0
    assert expectation(lp).tolist() == pytest.approx([0.5, 1.0, 0.4])
    uneven = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(expectation(uneven), expectation(uneven + 7))
    assert expectation(torch.log(torch.tensor([[0.25, 0.0, 0.75]]))).item() == pytest.approx(0.75)


def test_both_orders_free_of_position():
    """A judge that adds the same to the first place says 1/2 of equals; the bias is what it adds."""
    win, bias = both_orders(torch.tensor([0.9, 0.8, 0.5]), torch.tensor([0.9, 0.2, 0.1]))
    assert win.tolist() == pytest.approx([0.5, 0.8, 0.7])
    assert bias.tolist() == pytest.approx([0.8, 0.0, -0.4])


def test_matches_stay_in_the_group():
    group = torch.tensor([3, 3, 5, 3, 3])
    assert {frozenset(pair) for pair in matches([""] * 5, group)} == {
        frozenset(pair) for pair in [(0, 1), (0, 3), (0, 4), (1, 3), (1, 4), (3, 4)]
    }
    assert matches([""] * 5, group, 1) == [(0, 1), (1, 3), (3, 4), (4, 0)]
    assert matches(["a", "a"], None, 1) == [(0, 1)]


def test_best_of_a_dominance_order():
    """Sample i beats j where i > j; a match without a reply is won by neither."""
    order = torch.arange(4.0)
    first = torch.sigmoid(order[:, None] - order)
    assert best(first, 2) == [3, 2]
    first[3] = torch.nan
    assert best(first, 2) == [2, 1]
    assert best(torch.full((1, 1), torch.nan), 2) == [0]


def test_tournament_and_missing_matches():
    pairs = [(0, 1), (0, 2), (1, 2)]
    first = torch.tensor([0.9, 0.3, 1.0, 0.0, torch.nan, 0.5])
    scores = tournament(pairs, first, {4: "lost"}, 4)
    assert scores.values[0].item() == pytest.approx((0.8 + 1.0) / 2)
    assert scores.values[1:].isnan().all()
    assert scores.reasons == {1: "lost", 2: "lost", 3: "no other sample of its prompt to compare it with"}
    assert scores.parts["position_bias"][0].item() == pytest.approx((0.2 + 0.0) / 2)


def test_mean_per_sample_keeps_the_gradient_of_the_others():
    values = torch.tensor([1.0, 3.0, torch.nan], requires_grad=True)
    scores = per_sample(values, [1, 1, 0], 2, {2: "why"})
    assert scores.values[1] == 2
    assert scores.reasons == {0: "why"}
    assert torch.autograd.grad(scores.values[1], values)[0].tolist() == [0.5, 0.5, 0.0]


def test_panels_line_by_line():
    image = torch.arange(3 * 4 * 6.0).view(3, 4, 6)
    parts = panels(image, 2, 3)
    assert [tuple(part.shape) for part in parts] == [(3, 2, 2)] * 6
    assert torch.equal(parts[4], image[:, 2:, 2:4])


def test_questions_that_are_not_asked():
    image = torch.zeros(3, 4, 4)
    assert question("Is it {prompt}? {x}", "{x}", image, x=1).content[1] == "Is it {x}? 1"
    assert "empty" in question("Is it {prompt}?", " \n", image).refused
    assert not question("Is it good?", "", image).refused
    assert "NaN" in question("Is it good?", "", image / 0).refused
    assert question("{prompt}", "a\ud800b").content == ("a?b",)
    assert fill('{"json": {prompt}}', prompt="x") == '{"json": x}'


def test_listed_tokens_are_summed_over_spellings():
    """An answer that is not listed has the most it can have: never 0, never more than the list leaves over."""
    listed = [(token, math.log(p)) for token, p in (("Yes", 0.5), (" yes", 0.2), ("no", 0.1), ("Well", 0.15))]
    yes, no = among(listed, [spellings(["Yes"]), spellings(["No"])])
    assert (math.exp(yes), math.exp(no)) == pytest.approx((0.7, 0.1))
    assert among(listed, [spellings(["Maybe"])]) is None
    known = [spellings([word]) for word in ("Yes", "Perhaps", "Never")]
    assert [math.exp(value) for value in among(listed, known)] == pytest.approx([0.7, 0.025, 0.025])
    assert among([("5", 0.0)], [("5",), ("4",)])[1] < math.log(1e-8)


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Alignment: 2\nFinal Score: 4.5", 4.5), ("final score: **3**", 3.0), ("Final Score: 2 ... Final Score: 5", 5.0)],
)
def test_final_score(reply, score):
    assert read_score(reply, "Final Score:", 1, 5) == score


@pytest.mark.parametrize("reply", ["", "Final Score: high", "Final Score: 7", "Score: 3", "x" * 500])
def test_no_final_score(reply):
    with pytest.raises(ReplyError, match="of 1 to 5") as error:
        read_score(reply, "Final Score:", 1, 5)
    assert repr(reply[:80]) in str(error.value)
    assert reply[:81] not in str(error.value) or len(reply) < 81


def test_answer_is_read_whole_and_last():
    assert read_answer("<think>3 or 4</think><answer> 7.5 </answer>", 0, 10) == 7.5
    assert read_answer("<answer>7/10</answer>", 0, 10) == 7
    assert read_answer("<answer>2</answer> no, <answer>3</answer>", 0, 10) == 3
    for bad in ("<answer>7", "<answer>7 or 8</answer>", "<answer>11</answer>", "<answer>7/5</answer>", "7"):
        with pytest.raises(ReplyError):
            read_answer(bad, 0, 10)


def test_preference():
    assert read_preference("... so Image 1 is better than Image 2.") == 1
    assert read_preference("Video 2 is better.") == 0
    assert read_preference("Both images are equally good.") == 0.5
    thought = "<think>Image 1 is better in colour</think><answer>Image 2 is better</answer>"
    assert read_preference(thought, think=True) == 0
    for bad, think in ((thought, False), ("Image 1 is better", True), ("I cannot say", False)):
        with pytest.raises(ReplyError, match="no verdict"):
            read_preference(bad, think)


def test_rubric_and_selection():
    reply = "- **Alignment**: 4\nquality: 2.5/5\n"
    assert read_rubric(reply, ["quality", "alignment"], 1, 5) == [2.5, 4]
    with pytest.raises(ReplyError, match="coherence"):
        read_rubric(reply, ["quality", "coherence"], 1, 5)
    assert read_selection("<select>3, 1, 3, 99</select>", 8) == [2, 0]
    assert read_selection("no", 8) == []
    with pytest.raises(ReplyError, match="frame of 1 to 8"):
        read_selection("<select>9</select>", 8)
