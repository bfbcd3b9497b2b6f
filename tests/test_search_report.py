"""What a search's page says of its result: by intervals, and with the plain sample among the candidates."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.settings import Samples
from align.report.search import changes, label, notes, verdict
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
        ([(None, 0.9)], "good", "The optimised reward rose from 0.100 (plain) to 0.500 (best)."),
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
