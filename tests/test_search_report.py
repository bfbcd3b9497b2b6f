"""What a search's page says of its result: by intervals, and with the plain sample among the candidates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.sections import Samples
from align.report.budget_curves import best_so_far, budgets, figures, mean_curve
from align.report.charts import Chart, Series, draw
from align.report.search import changes, label, notes, verdict
from align.report.search_baseline import baseline_of
from align.search.results import Candidate, Found
from align.search.run import PLAIN, Store

Row = dict[str, Any]
UNCLEAR = "Gold judge shows no clear change:"


def row(plain: float | None, best: float | None, gold: tuple[float | None, float | None] = (0.5, 0.5)) -> Row:
    return {"plain": plain, "reward": best, "gold": {"judge": {"plain": gold[0], "best": gold[1]}}, "lineage": []}


def said(rows: list[Row], golds: tuple[str, ...] = ("judge",)) -> tuple[str, str]:
    return verdict(changes({"gold": golds}, rows))


@pytest.mark.parametrize(
    ("golds", "tone", "words"),
    [
        ([(0.1, 0.5), (0.2, 0.7), (0.1, 0.6)], "good", "Gold judge rose from 0.133 (plain) to 0.600 (best)."),
        (
            [(0.1, 0.9), (0.9, 0.2), (0.3, 0.9)],
            "calm",
            "Gold judge shows no clear change: 0.433 (plain) to 0.667 (best).",
        ),
        ([(0.9, 0.5), (0.8, 0.3), (0.9, 0.4)], "bad", "Gold judge fell from 0.867 (plain) to 0.400 (best)."),
        ([(0.5, 0.5), (0.8, 0.8)], "calm", "Gold judge did not change: 0.650."),
        ([(0.1, 0.9)], "calm", f"{UNCLEAR} 0.100 (plain) to 0.900 (best)."),
        ([(None, 0.9)], "calm", "The optimised reward shows no clear change: 0.100 (plain) to 0.500 (best)."),
        ([(None, 0.9)] * 20, "good", "The optimised reward rose from 0.100 (plain) to 0.500 (best)."),
    ],
)
def test_the_verdict_s_colour_is_the_interval_s(golds: list, tone: str, words: str) -> None:
    rows = [row(0.1, 0.5, gold) for gold in golds]
    if golds[0][0] is None:
        rows = [*rows, row(0.1, 0.5, (None, None))]
    assert said(rows) == (tone, words)


def test_nothing_to_compare() -> None:
    assert said([row(None, 0.5, (None, 0.5))]) == ("calm", "No prompt has a score both before and after the search.")


def test_a_plain_sample_that_nothing_beat_is_said() -> None:
    rows = [row(0.5, 0.5), row(0.1, 0.4)]
    assert len(notes({"plain_kept": 0}, rows)) == 1
    assert "For 1 of 2 prompts nothing that the search found scored higher" in notes({"plain_kept": 1}, rows)[1]
    older = [row(0.622, 0.494), row(0.1, 0.4)]  # results written before the plain sample was a candidate
    assert notes({}, older)[1] == "For 1 of 2 prompts the best sample found scores below the plain one."


def test_gold_that_is_the_optimised_reward_is_called_so() -> None:
    gold, reward = changes({"gold": ["judge"]}, [row(0.1, 0.5)])
    clip = {"kind": "clip"}
    assert label(gold, {"gold": {"judge": clip}, "reward": clip}) == "Gold, the optimised reward itself"
    assert label(gold, {"gold": {"judge": clip}, "reward": {"kind": "ocr"}}) == "Gold, not optimised"
    assert label(reward, {}) == "Optimised reward"


@pytest.mark.parametrize(
    ("plain", "best"), [(0.622, 0.494), (0.494, 0.622), (0.5, 0.5), (0.5, math.nan), (math.nan, 0.5)]
)
def test_the_best_sample_is_never_below_the_plain_one(plain: float, best: float, tmp_path: Any) -> None:
    def found(reward: float) -> Found:
        one = Candidate(reward, torch.zeros(1), torch.zeros(3, 8, 8), ("noise 0",), 0)
        made = Found("a", 0)
        made.offer(one, {"network_calls": 1}, 2)
        return made

    config = SimpleNamespace(run_dir=tmp_path, samples=Samples(), gold={}, search=SimpleNamespace(kind="fk"))
    store = Store(config, [SimpleNamespace(media={})])  # type: ignore[arg-type, list-item]
    store.write(found(best), found(plain), {}, {})
    (written,) = store.rows()
    wins = not math.isnan(plain) and not best >= plain
    assert written["reward"] == (plain if wins else best)
    assert (written["lineage"] == [PLAIN]) == wins
    kept = [one["reward"] for one in written["kept"]]
    assert kept == sorted(kept, reverse=True)
    assert all((tmp_path / "candidates" / "0000" / one["file"]).is_file() for one in written["kept"])


# -- best-of-N --------------------------------------------------------------------------------------------------------


def against(golds: list[tuple[float, float]], calls: tuple[float, float] = (80.0, 80.0)) -> Row:
    """A summary with its rows, of prompts with these golds by best-of-N and by the search; plain has 0.1."""
    rows = []
    for rival, best in golds:
        gold = {"judge": {"plain": 0.1, "best": best, "best_of_n": rival}}
        rows.append({"plain": 0.1, "reward": 0.9, "lineage": [], "gold": gold, "best_of_n": {"reward": 0.8}})
    spent = [{"network_calls": each, "reward_calls": 8.0, "seconds": 1.5} for each in calls]
    return {"gold": ["judge"], "best_of_n": {"spent": spent[0]}, "spent": spent[1], "found": rows, "plain_kept": 0}


@pytest.mark.parametrize(
    ("golds", "words", "tone"),
    [
        ([(0.2, 0.5), (0.3, 0.7), (0.1, 0.6)], "judge is higher: 0.200 with best-of-N, 0.600 with the search", "good"),
        ([(0.5, 0.2), (0.7, 0.3), (0.6, 0.3)], "judge is lower: 0.600 with best-of-N, 0.267 with the search", "calm"),
        ([(0.5, 0.65), (0.7, 0.55), (0.6, 0.6)], "judge shows no clear difference: 0.600 with best-of-N, 0.6", "good"),
    ],
)
def test_best_of_n_is_compared_prompt_by_prompt(golds: list, words: str, tone: str) -> None:
    summary = against(golds)
    baseline = baseline_of(summary, summary["found"])
    assert baseline is not None
    assert notes(summary, summary["found"])[-1].startswith(f"At 80 network calls a prompt, {words}")
    assert verdict(changes(summary, summary["found"]), baseline)[0] == tone  # gold rose from plain in all of them
    assert dict(baseline.costs)["time"] == ["1.5 s", "1.5 s"]


def test_both_counted_budgets_are_said() -> None:
    summary = against([(0.2, 0.5), (0.3, 0.7)], (80.0, 77.5))
    told = notes(summary, summary["found"])[-1]
    assert told.startswith("With 80 network calls a prompt for best-of-N and 77.5 for the search, judge")
    assert baseline_of({"gold": []}, []) is None


# -- budgets ----------------------------------------------------------------------------------------------------------

ENDS = [  # the first prompt ends at 20 calls, the second at 30
    {"plain": 0.1, "curve": [{"network_calls": 10, "reward": 0.3}, {"network_calls": 20, "reward": 0.3}]},
    {"plain": 0.3, "curve": [{"network_calls": 20, "reward": 0.2}, {"network_calls": 30, "reward": 0.9}]},
]


def test_mean_curve_carries_the_best_of_each_prompt_forward_at_common_whole_budgets() -> None:
    x, y = mean_curve([best_so_far(one) for one in ENDS], "network_calls")
    assert x == [0, 10, 20, 30]
    assert y == pytest.approx([0.2, 0.3, 0.3, 0.6])  # 0.2 at 20 calls is below the plain sample's 0.3
    x, y = mean_curve([one["curve"] for one in ENDS], "network_calls")
    assert (x, y) == ([20, 30], pytest.approx([0.25, 0.6]))  # from where every prompt has a sample
    assert mean_curve([], "network_calls") == ([], [])
    many = [[{"network_calls": count, "reward": count} for count in range(1, 500)]]
    assert len(budgets(many, "network_calls")) == 48
    assert (budgets(many, "network_calls")[0], budgets(many, "network_calls")[-1]) == (1, 499)


def test_the_chart_has_best_of_n_as_a_dashed_line_at_the_same_budgets() -> None:
    rows = [{**one, "best_of_n": {"curve": [{"network_calls": 15, "reward": 0.5}]}} for one in ENDS]
    (figure,) = figures(rows, "fk")
    search, rival = figure.charts[0].series
    assert (search.name, rival.name, rival.tone) == ("fk", "best_of_n", "calm d1")
    assert search.x == rival.x == [0, 10, 15, 20, 30]
    assert rival.y == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.5])
    assert [one.name for one in figures(ENDS, "fk")[0].charts[0].series] == ["fk"]


def test_a_best_value_holds_until_the_next_budget() -> None:
    chart = Chart("t", "", [Series("a", [0, 10], [0.0, 1.0], stepped=True)], axis="calls")
    assert 'points="46,152.0 348.0,152.0 348.0,22.0"' in draw(chart).replace("46.0,", "46,")
    assert "<circle" not in draw(chart)
    short = Chart("t", "", [Series("a", [0.0, 0.6], [0.0, 1.0])], axis="seconds")
    assert ">0.2</text>" in draw(short)
