"""Every sentence of a training report, on a run where it is true and on one where it would be false."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from align.report import headline, write_report
from align.report.changes import change, comparable, relation
from align.report.facts import facts
from align.report.figures import Figure, sections
from align.report.prompts import by_prompt
from align.report.reading import Run, read_run
from align.report.verdict import changes, judge
from align.runs.per_prompt import PromptScores, write_scores

SHAPES, CLIP = {"kind": "shapes", "score": "dense"}, {"kind": "clip", "model": "shapes"}
MIXTURE = {
    "kind": "mixture",
    "parts": {
        "shapes": {"reward": SHAPES, "weight": 0.7, "normalise": "group"},
        "clip": {"reward": CLIP, "weight": 0.3, "normalise": "group"},
    },
}


def made(
    folder: Path,
    scores: dict[str, tuple[list[float | None], list[float | None]]],
    steps: tuple[int, int] = (0, 10),
    kinds: list[str | None] | None = None,
    whole: bool = True,
    ranges: dict[str, list[float | None]] | None = None,
    **config: Any,
) -> Run:
    """A run with two evaluations of the given scores, prompt by prompt where ``whole``."""
    tree = {"recipe": {"kind": "nft", "kl": 0.1}, "rollout": {"kind": "online", "prompts": 4}, "train": {"steps": 10}}
    folder.mkdir(exist_ok=True)
    with (folder / "config.yaml").open("w") as file:
        YAML(typ="safe").dump(tree | config, file)
    rows: list[dict[str, Any]] = []
    for end, step in enumerate(steps):
        columns = {name: both[end] for name, both in scores.items()}
        known = {name: [v for v in column if v is not None] for name, column in columns.items()}
        count = len(next(iter(columns.values())))
        row = {"event": "eval", "step": step, "prompts": count, "role": "ema", "range": ranges or {}}
        row["scores"] = {name: sum(v) / len(v) if v else None for name, v in known.items()}
        row["stderr"] = {name: _error(v) for name, v in known.items()}
        row["missing"] = {name: count - len(v) for name, v in known.items()}
        rows.append(row)
        if whole:
            entries = [
                PromptScores(
                    f"prompt {i}", i, {name: column[i] for name, column in columns.items()},
                    {name: "the judge was away" for name, column in columns.items() if column[i] is None},
                    kinds[i] if kinds else None,
                )
                for i in range(count)
            ]  # fmt: skip
            write_scores(folder, step, "ema", entries)
    rows.insert(1, {"event": "train", "step": steps[1], "reward": 0.0, "seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def _error(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    centre = sum(values) / len(values)
    return (sum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5


def cards(run: Run) -> dict[str, Figure]:
    return {figure.title: figure for section in sections(run) for figure in section.figures}


UP, NOISY = ([0.1, 0.5, 0.9], [0.2, 0.61, 1.0]), ([0.1, 0.5, 0.9], [0.9, 0.1, 0.6])


def test_pairs_of_prompts_tell_what_two_means_do_not(tmp_path: Path) -> None:
    told = judge(made(tmp_path / "pairs", {"gold": UP}))
    assert told.sentence.startswith("Gold rose from 0.500 to 0.603")
    assert "the interval excludes zero" in told.detail
    assert "the differences of 3 prompts" in told.detail
    older = judge(made(tmp_path / "means", {"gold": UP}, whole=False))
    assert older.sentence.startswith("Gold shows no clear change")
    assert "the interval includes zero" in older.detail
    assert "no scores by prompt were kept" in older.detail


@pytest.mark.parametrize(
    ("gold", "sentence", "detail"),
    [
        (([0.5, 0.5], [0.5, 0.5]), "Gold did not change: 0.500.", "changed by the same amount"),
        (
            ([0.25, 0.5], [0.5, 0.75]),
            "Gold went, with unknown certainty, from 0.375 to 0.625.",
            "changed by the same amount",
        ),
        (([0.25] * 20, [0.5] * 20), "Gold rose from 0.250 to 0.500.", "changed by the same amount"),
        (([0.5], [0.7]), "Gold went, with unknown certainty, from 0.500 to 0.700.", "One prompt alone has no interval"),
        (NOISY, "Gold shows no clear change: 0.500 to 0.533.", "the interval includes zero"),
    ],
)
def test_intervals_that_do_not_exist(tmp_path: Path, gold: Any, sentence: str, detail: str) -> None:
    run = made(tmp_path / "run", {"gold": gold})
    assert judge(run).sentence == sentence
    assert detail in judge(run).detail
    page = write_report(run.folder).read_text()
    assert "+0.000 to +0.000" not in page
    assert headline(run.folder).startswith(sentence)


def test_a_single_evaluation_is_no_comparison(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {"gold": UP})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    (run.folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    told = judge(read_run(run.folder))
    assert told.sentence == "Evaluated on held-out prompts once, at step 0: there is nothing to compare yet."


def test_a_comparison_that_does_not_begin_before_training_says_so(tmp_path: Path) -> None:
    assert "nothing was evaluated before training" in judge(made(tmp_path / "a", {"gold": UP}, (5, 10))).detail
    assert "nothing was evaluated" not in judge(made(tmp_path / "b", {"gold": UP})).detail


@pytest.mark.parametrize(
    ("reward", "watched", "expected"),
    [
        (SHAPES, SHAPES, "trained"),
        (SHAPES, {**SHAPES, "score": "strict"}, "other"),
        (MIXTURE, CLIP, "part"),
        ({"kind": "cached", "reward": {"kind": "placed", "reward": CLIP}}, CLIP, "part"),
        (None, CLIP, "other"),
    ],
)
def test_what_was_trained_is_not_called_watched(tmp_path: Path, reward: Any, watched: Any, expected: str) -> None:
    run = made(tmp_path / "run", {"gold": UP, "clip": NOISY}, reward=reward, evaluate={"rewards": {"clip": watched}})
    assert relation(run, "clip") == expected
    note = cards(run)["Held out: clip"].note if expected != "part" or comparable(run) else ""
    assert ("Not trained on" in note) == (expected == "other")
    assert "Watched" not in write_report(run.folder).read_text()


def test_gold_that_was_trained_on_cannot_show_hacking(tmp_path: Path) -> None:
    down = ([0.9, 0.8, 0.7], [0.1, 0.2, 0.1])
    both: dict[str, Any] = {"gold": down, "reward": UP}
    evaluate = {"gold": "gold", "rewards": {"gold": CLIP}}
    apart = judge(made(tmp_path / "a", both, reward=SHAPES, evaluate=evaluate))
    assert apart.tone == "bad"
    assert apart.sentence.startswith("The trained reward rose, but gold fell from")
    assert [title for title, _ in apart.warnings] == ["Reward hacking"]
    assert "recipe.kl" in apart.warnings[0][1]
    without = judge(made(tmp_path / "b", both, reward=SHAPES, evaluate=evaluate, recipe={"kind": "mine"}))
    assert "recipe.kl" not in without.warnings[0][1]
    part = judge(made(tmp_path / "c", both, reward={"kind": "cached", "reward": CLIP}, evaluate=evaluate))
    assert "Gold is a part of the trained reward" in part.detail


def test_a_reward_normalised_in_its_group_is_shown_by_its_members(tmp_path: Path) -> None:
    flat = ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    for name, scores in {"old": {"reward": flat, "clip": UP}, "new": {"reward/clip": UP, "clip": UP}}.items():
        run = made(tmp_path / name, scores, reward=MIXTURE, evaluate={"rewards": {"clip": CLIP}})
        assert not comparable(run)
        assert [one.name for one in changes(run)] == ["clip" if name == "old" else "reward/clip"]
        assert judge(run).sentence.endswith("rose from 0.500 to 0.603.")
        assert "0.000" not in judge(run).detail
        page = write_report(run.folder).read_text()
        assert "Trained reward</p>" not in page
        assert "its mean cannot rise" in page
    plain = made(tmp_path / "plain", {"reward": UP}, reward=SHAPES)
    assert comparable(plain)
    assert "its mean cannot rise" not in write_report(plain.folder).read_text()


def test_parts_are_called_members_of_a_mixture_only_where_it_mixes(tmp_path: Path) -> None:
    notes = {}
    for name, reward in {"one": SHAPES, "mixture": MIXTURE}.items():
        run = made(tmp_path / name, {"gold": UP}, reward=reward)
        run.train[0].update({"reward/clip": 0.3, "reward/shapes": 0.5})
        figure = cards(run)["Parts of the reward"]
        notes[name] = figure.note, [series.name for series in figure.numbers.series]
    assert "mixture" not in notes["one"][0]
    assert notes["one"][1] == ["clip", "shapes"]
    assert "the mixture's members" in notes["mixture"][0]
    assert notes["mixture"][1] == ["clip (weight 0.3)", "shapes (weight 0.7)"]


def test_bands_stay_inside_what_a_score_can_be(tmp_path: Path) -> None:
    scores: Any = {"gold": ([0.0, 0.0, 0.25], [0.0, 1.0, 1.0])}
    bounded = cards(made(tmp_path / "a", scores, ranges={"gold": [0, 1]}))["Held-out scores"].charts[0].series[0]
    assert (min(bounded.limits()), max(bounded.limits())) == (0.0, 1.0)
    free = cards(made(tmp_path / "b", scores, ranges={"gold": [None, None]}))["Held-out scores"].charts[0].series[0]
    assert min(free.limits()) < 0


def test_missing_held_out_scores_count_prompts_and_give_the_reason(tmp_path: Path) -> None:
    lost: Any = ([0.1, 0.5, None, 0.9], [0.2, 0.61, None, 1.0])
    ((title, text),) = judge(made(tmp_path / "a", {"gold": lost})).warnings
    assert title == "Held-out scores were missing"
    assert text.startswith("Gold for 1 of 4 prompts in 2 of 2 evaluations: the judge was away.")
    assert "weight 0" not in text
    assert judge(made(tmp_path / "b", {"gold": UP})).warnings == []


def test_groups_without_contrast_matter_to_recipes_that_compare(tmp_path: Path) -> None:
    for recipe, warned in (({"kind": "nft"}, True), ({"kind": "flow_rwr", "control_variate": False}, False)):
        run = made(tmp_path / recipe["kind"], {"gold": UP}, recipe=recipe)
        run.train[0]["zero_variance_groups"] = 3
        text = " ".join(text for _, text in judge(run).warnings)
        assert ("no two samples of 75% of the groups scored differently" in text) == warned


def test_gains_losses_and_kinds(tmp_path: Path) -> None:
    scores: Any = {"gold": ([0.5, 0.5, 0.5, 0.5], [0.9, 0.6, 0.5, 0.1])}
    run = made(tmp_path / "run", scores, kinds=["colors", "colors", "counting", "counting"])
    found = by_prompt(run, change(run, "gold"))
    assert found is not None
    assert found.counts == (2, 1, 1)
    assert [one.prompt for one in found.gains] == ["prompt 0", "prompt 1"]
    assert [one.prompt for one in found.losses] == ["prompt 3"]
    assert [(kind.name, kind.count, round(kind.change.delta, 3)) for kind in found.kinds] == [
        ("colors", 2, 0.25),
        ("counting", 2, -0.2),
    ]
    page = write_report(run.folder).read_text()
    assert "2 rose, 1 fell, 1 did not change" in page
    assert "By kind of prompt" in page
    older = made(tmp_path / "older", scores, whole=False)
    assert by_prompt(older, change(older, "gold")) is None
    assert "Largest gains" not in write_report(older.folder).read_text()


def test_a_run_that_goes_on_after_its_summary_is_not_finished(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {"gold": UP})
    summary = {"status": "interrupted", "steps": 10, "gold_before": 0.0, "gold_after": 9.0}
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert "was interrupted after 10 steps" in judge(read_run(run.folder)).detail
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "train", "step": 11, "reward": 0.0}) + "\n")
    told = judge(read_run(run.folder))
    assert "had not ended when this page was written: 11 of 10 steps" in told.detail
    assert "9.0" not in told.sentence


def test_costs_are_those_of_the_rows(tmp_path: Path) -> None:
    run = made(tmp_path / "run", {"gold": UP})
    assert "peak GPU memory" not in dict(facts(run))
    run.train[0].update({"samples": 96, "memory_gb": 12.34})
    assert dict(facts(run))["training samples generated"] == "96"
    assert dict(facts(run))["held-out samples generated"] == "6"
    assert dict(facts(run))["peak GPU memory"] == "12.3 GB"
