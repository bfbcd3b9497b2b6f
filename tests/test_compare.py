"""Comparisons: paired intervals in closed form, what cannot be compared said in words, the page, the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import written
from compared_runs import benchmark, search, training
from report_run import Page, build_run

from align.comparison import Comparison, compare, write_page
from align.comparison.matching import difference
from align.report.intervals import difference as independent
from align.runs.owned import REWARD, mark
from alignflow.errors import RunFolderError

run = written.run
T3, T2 = 3.182, 4.303
"""Student's t at 97.5 % with 3 and 2 degrees of freedom."""


def refused(*folders: Path) -> str:
    with pytest.raises(RunFolderError) as caught:
        compare(folders)
    return str(caught.value)


def told(found: Comparison) -> str:
    return "\n".join(f"{title}: {text}" for title, text in found.notes)


# -- intervals --------------------------------------------------------------------------------------------------------


def test_welch_in_closed_form():
    error, freedom = independent([1, 2, 3], [2, 4, 6])  # variances 1 and 4, three values each
    assert error == pytest.approx(math.sqrt(5 / 3))
    assert freedom == pytest.approx((5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2))
    assert independent([1, 1], [2, 2]) == (0.0, None)
    assert independent([1], [2, 3]) == (None, None)


def test_runs_with_their_own_evaluation_noise_are_one_setting_over_all_prompts(tmp_path):
    gold = {"a": ([0.1, 0.5], [0.3, 0.7]), "b": ([0.2, 0.7], [0.4, 0.9])}
    runs = [
        training(tmp_path / f"{arm}{seed}", values[seed], seeds=[10 * seed, 10 * seed + 1], recipe__kind=arm,
                 seed=seed, evaluate__seed=seed)
        for arm, values in gold.items()
        for seed in (0, 1)
    ]  # fmt: skip
    found = compare(runs)
    assert [(arm.label, arm.seeds) for arm in found.arms] == [("a", [0, 1]), ("b", [0, 1])]
    (one,) = found.scores[0].differences
    assert (one.pairing, one.prompts.pairs, one.prompts.delta) == ("noise", 4, pytest.approx(0.15))
    assert one.seeds is not None
    assert one.seeds.delta == pytest.approx(0.15)
    mixed = [*runs[:3], training(tmp_path / "b2", gold["b"][1], recipe__kind="b", seed=1)]  # evaluated with seed 0
    assert [arm.seeds for arm in compare(mixed).arms] == [[0, 1], [0, 1]]


def test_the_difference_is_paired_by_prompt_and_noise(tmp_path):
    a = training(tmp_path / "a", [0.1, 0.5, 0.3, 0.9])
    b = training(tmp_path / "b", [0.2, 0.7, 0.4, 1.1], recipe__kind="awm")
    found = compare([a, b])
    (one,) = found.scores[0].differences
    assert (found.judged, one.pairing, one.prompts.pairs, one.seeds) == ("gold", "noise", 4, None)
    reach = T3 * math.sqrt(4 * 0.05**2 / 3) / 2  # differences 0.1, 0.2, 0.1, 0.2
    assert one.prompts.delta == pytest.approx(0.15)
    assert one.prompts.interval == pytest.approx((0.15 - reach, 0.15 + reach))
    tone, sentence, detail = found.verdict()
    assert (tone, sentence) == ("good", "Gold is higher with b: 0.600 against 0.450 with a.")
    assert "+0.150, with a 95 % interval of +0.058 to +0.242 over 4 prompts (the same prompts and noise)" in detail
    assert "one run of each" in detail


def test_prompts_without_a_score_are_left_out_of_the_pairs(tmp_path):
    a = training(tmp_path / "a", [0.1, None, 0.3])
    b = training(tmp_path / "b", [0.2, 0.9, 0.5], recipe__kind="awm")
    (one,) = compare([a, b]).scores[0].differences
    assert one.prompts.pairs == 2
    assert one.prompts.delta == pytest.approx(0.15)


def test_runs_that_differ_in_their_seed_are_one_setting(tmp_path):
    ends = {"nft": [(0.1, 0.3), (0.2, 0.4), (0.3, 0.5)], "awm": [(0.3, 0.4), (0.5, 0.6), (0.4, 0.8)]}
    folders = [
        training(tmp_path / f"{kind}-seed-{seed}", values, [0.1, 0.1], recipe__kind=kind, seed=seed)
        for kind, runs in ends.items()
        for seed, values in enumerate(runs)
    ]
    found = compare(folders)
    assert [(arm.label, arm.seeds) for arm in found.arms] == [("nft", [0, 1, 2]), ("awm", [0, 1, 2])]
    nft, awm = (one.change for one in found.scores[0].results)
    assert (nft.before, nft.after) == pytest.approx((0.1, 0.3))  # means 0.2, 0.3, 0.4 over the seeds
    reach = T2 * 0.1 / math.sqrt(3)
    assert nft.interval == pytest.approx((0.2 - reach, 0.2 + reach))
    assert awm.after == pytest.approx(0.5)
    (one,) = found.scores[0].differences
    assert one.paired_seeds
    spread = math.sqrt(((0.15 - 0.2) ** 2 + (0.25 - 0.2) ** 2) / 2 / 3)  # 0.15, 0.25, 0.2 by seed
    assert one.seeds.interval == pytest.approx((0.2 - T2 * spread, 0.2 + T2 * spread))
    assert one.prompts.delta == pytest.approx(0.2)  # prompt by prompt, each the mean over the seeds
    assert one.prompts.pairs == 2
    assert found.verdict()[1] == "Gold is higher with awm: 0.500 against 0.300 with nft."
    assert "over 3 seeds" in found.verdict()[2]
    assert len(compare(folders, each=True).arms) == 6


def test_unequal_seeds_are_compared_as_two_groups(tmp_path):
    folders = [training(tmp_path / f"a{seed}", [0.1 * seed], seed=seed) for seed in (1, 2, 3)]
    folders += [training(tmp_path / f"b{seed}", [0.2 * seed], seed=seed, recipe__kind="awm") for seed in (1, 2)]
    (one,) = compare(folders).scores[0].differences
    assert not one.paired_seeds
    assert one.seeds.error == pytest.approx(math.sqrt(0.01 / 3 + 0.02 / 2))


def test_two_seeds_alone_are_compared_with_each_other(tmp_path):
    found = compare([training(tmp_path / name, [0.1, 0.2], seed=seed) for seed, name in enumerate("ab")])
    assert [arm.label for arm in found.arms] == ["a", "b"]


# -- what is not the same ---------------------------------------------------------------------------------------------


def test_other_noise_is_paired_by_prompt_and_other_prompts_by_the_means(tmp_path):
    a = training(tmp_path / "a", [0.1, 0.2, 0.3])
    noise = training(tmp_path / "noise", [0.2, 0.3, 0.4], seeds=[7, 8, 9], evaluate__seed=1)
    found = compare([a, noise])
    assert found.scores[0].differences[0].pairing == "prompt"
    assert "Other noise: a and noise: no prompt has the same noise in both" in told(found)
    others = training(tmp_path / "others", [0.2, 0.3, 0.4], prompts=["x", "y", "z"], seeds=[7, 8, 9], evaluate__seed=1)
    (one,) = compare([a, others]).scores[0].differences
    assert (one.pairing, one.prompts.pairs) == ("none", None)
    assert one.prompts.error == pytest.approx(math.sqrt(2 * 0.01 / 3))


def test_nothing_in_common_is_refused_with_reasons(tmp_path):
    a = training(tmp_path / "a", [0.1, 0.2])
    words = {"prompts__heldout": "my.txt", "prompts__train": "mine.txt"}
    other = training(tmp_path / "other", [0.2, 0.3], prompts=["x", "y"], **words)
    assert "nothing in these runs can be compared" in refused(a, other)
    assert "a and other have no held-out prompt in common" in refused(a, other)
    strict = {"kind": "shapes", "score": "strict"}
    reward = training(tmp_path / "reward", [0.2, 0.3], evaluate__rewards={"gold": strict}, reward=strict)
    assert "gold is another reward in reward than in a (score: 'strict', not None)" in refused(a, reward)


def test_what_can_be_compared_is_and_the_rest_is_said(tmp_path):
    a, b = training(tmp_path / "a", [0.1, 0.2]), training(tmp_path / "b", [0.2, 0.4], train__lr=2e-3)
    odd = training(tmp_path / "odd", [0.9, 0.9], evaluate__rewards={"gold": {"kind": "ocr"}})
    found = compare([a, b, odd])
    assert len(found.scores[0].differences) == 1
    assert "Not comparable: Gold is another reward in odd than in a (kind: 'ocr', not 'shapes')." in told(found)


def test_other_samplers_generators_and_bases_are_said(tmp_path):
    a = training(tmp_path / "a", [0.5, 0.6], [0.1, 0.2])
    sampler = training(tmp_path / "b", [0.5, 0.6], [0.1, 0.2], evaluate__sampler={"kind": "ode", "steps": 4})
    assert "Other sampler: b and a were evaluated with different samplers" in told(compare([a, sampler]))
    model = training(tmp_path / "c", [0.5, 0.7], [0.1, 0.2], generator__path="mine")
    assert "Other generator: a and c have different generators" in told(compare([a, model]))
    assert compare([a, model]).scores[0].differences[0].pairing == "prompt"
    base = training(tmp_path / "d", [0.5, 0.7], [0.1, 0.3], train__lr=2e-3)
    assert "Other base: a and d begin with different gold scores of the base for 50%" in told(compare([a, base]))


def test_runs_without_an_evaluation_share_their_curves(tmp_path):
    a = training(tmp_path / "a", [0.1])
    b = training(tmp_path / "b", [0.1], evaluated=False, recipe__kind="awm")
    found = compare([a, b])
    assert found.scores == []
    assert found.verdict()[1] == "No held-out score can be compared."
    assert "Not evaluated: b has no held-out scores" in told(found)
    assert "Training reward" in Page(write_page(found, tmp_path / "page.html")).text


def test_unfinished_runs_are_said_and_left_out_of_means_over_seeds(tmp_path):
    folders = [training(tmp_path / f"a{seed}", [0.2 * seed, 0.3], seed=seed) for seed in (0, 1)]
    folders.append(training(tmp_path / "a2", [0.9, 0.9], seed=2, status=None))
    folders.append(training(tmp_path / "b", [0.5, 0.5], recipe__kind="awm", status="interrupted"))
    found = compare(folders)
    assert [len(arm.entries) for arm in found.arms] == [2, 1]
    assert "Not finished: a2 is not finished (4 of 4 steps); it is left out of the means over the seeds." in told(found)
    assert "Not finished: b was interrupted (4 of 4 steps); its last evaluation counts." in told(found)


def test_runs_without_scores_by_prompt_are_compared_by_their_means(tmp_path):
    folders = [build_run(tmp_path / kind, kind) for kind in ("honest", "hacked")]
    found = compare(folders)
    assert found.scores[0].differences[0].pairing == "none"
    assert "No scores by prompt: shapes-nft-honest" in told(found)
    assert "Reward hacking: shapes-nft-hacked" in told(found)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    a = training(tmp_path / "a", [0.1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "reward").mkdir()
    mark(tmp_path / "reward", REWARD)
    assert "no run folder" in refused(a, tmp_path / "gone")
    assert "is a file" in refused(a, tmp_path / "file")
    assert "run folder" in refused(a, tmp_path / "empty")
    assert "reward is a trained reward; compare reads training runs" in refused(a, tmp_path / "reward")
    assert f"{a} is the only run" in refused(a)
    assert "is named twice" in refused(a, tmp_path / "empty" / ".." / "a")


def test_a_copy_of_a_run_is_said(tmp_path):
    a = training(tmp_path / "a", [0.1, 0.2])
    shutil.copytree(a, tmp_path / "copy")
    found = compare([a, tmp_path / "copy"])
    assert "are copies of the same run" in told(found)
    assert [arm.label for arm in found.arms] == ["a", "copy"]
    assert found.verdict()[1].startswith("Gold is the same with")


# -- searches and benchmarks ------------------------------------------------------------------------------------------


def test_searches_are_paired_by_noise_and_with_a_training_run_by_prompt(tmp_path):
    a = search(tmp_path / "a", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    b = search(tmp_path / "b", [0.1, 0.2, 0.3], [0.5, 0.7, 0.9], search__kind="smc")
    found = compare([a, b])
    (one,) = found.scores[0].differences
    assert (found.judged, one.pairing, one.prompts.pairs) == ("gold", "noise", 3)
    assert one.prompts.delta == pytest.approx(0.2)
    assert [one.name for one in found.scores] == ["gold"]  # the reward has the same numbers
    assert found.scores[0].results[0].change.delta == pytest.approx(0.3)
    text = Page(write_page(found, tmp_path / "page.html")).text
    assert "Reward against network calls" in text
    assert "network calls a prompt" in text
    trained = training(tmp_path / "trained", [0.2, 0.3, 0.4])
    (mixed,) = compare([a, trained]).scores[0].differences
    assert (mixed.pairing, mixed.prompts.delta) == ("prompt", pytest.approx(-0.2))


def test_benchmarks_count_a_prompt_once(tmp_path):
    a = benchmark(tmp_path / "a", [[0.1, 0.3], [0.4, 0.4]])
    b = benchmark(tmp_path / "b", [[0.3, 0.5], [0.4, 0.6]], generator__lora="x")
    (one,) = compare([a, b]).scores[0].differences
    assert (one.prompts.pairs, one.prompts.delta) == (2, pytest.approx(0.15))
    with (a / "samples.jsonl").open("a") as file:
        file.write('{"file": "000')  # an interrupt
    assert compare([a, b]).scores[0].differences[0].prompts.pairs == 2
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "benchmark.json").write_text("{}")
    assert "c has no samples yet" in refused(a, tmp_path / "c")
    (tmp_path / "d" / "candidates").mkdir(parents=True)
    assert "d has no results.json yet" in refused(a, tmp_path / "d")


# -- the page and the command -----------------------------------------------------------------------------------------


def test_the_page_stands_alone(tmp_path):
    prompts = ["a <script>alert(1)</script> circle", "prompt 1"]
    a = training(tmp_path / "a", [0.1, 0.2], prompts=prompts)
    b = training(tmp_path / "b", [0.5, 0.6], prompts=prompts, train__lr=2e-3, recipe__kind="awm")
    path = write_page(compare([a, b]), tmp_path / "page.html")
    page, raw = Page(path), path.read_text()
    assert "Content-Security-Policy" in raw
    assert "url(" not in raw
    assert not page.all("link")
    assert len(page.all("script")) == 1
    assert "<script>alert" not in raw
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.all("img"))
    assert len(page.all("img")) == 2 * 3  # before, a and b
    for text in ("gold against network calls", "KL in velocity", "recipe.kind", "train.lr", "network calls of training",
                 "Made by alignflow, only from the files of these runs"):  # fmt: skip
        assert text in page.text
    assert "Loss" not in page.text  # of different recipes
    assert page.text.count("0.002") >= 1


def test_charts_have_one_line_per_setting_and_bands_over_seeds(tmp_path):
    folders = [
        training(tmp_path / f"{kind}{seed}", [0.1 * seed, 0.2], recipe__kind=kind, seed=seed)
        for kind in ("nft", "awm")
        for seed in (0, 1)
    ]
    page = Page(write_page(compare(folders), tmp_path / "page.html"))
    lines = [one["class"] for one in page.all("polyline")]
    assert {"line c0", "line c3"} == set(lines)
    assert {"band c0", "band c3"} == {one["class"] for one in page.all("polygon")}


def test_the_command_prints_tables_and_writes_the_page(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training(tmp_path / "a", [0.1, 0.2], [0.1, 0.1])
    training(tmp_path / "b", [0.3, 0.6], [0.1, 0.1], train__lr=2e-3)
    code, out, err = run("compare", "a", "b")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["gold", "runs", "before", "after", "change", "95", "%", "interval"]
    assert out.splitlines()[1].split()[:5] == ["b", "1", "0.100", "0.450", "+0.350"]
    assert out.rstrip().endswith("comparison: compare.html")
    assert run("compare", "a", "b")[0] == 0  # a page of its own is replaced
    found = json.loads(run("compare", "a", "b", "--json")[1])
    assert found["scores"][0]["differences"][0]["over_prompts"]["delta"] == pytest.approx(0.3)
    assert run("compare", "a", "b", "--out", "pages/of/mine.html")[0] == 0
    (tmp_path / "mine.html").write_text("mine")
    code, _, err = run("compare", "a", "b", "--out", "mine.html")
    assert code == 2
    assert "mine.html exists and is not a page of alignflow" in err


def test_differences_of_an_arm_with_itself_are_nothing(tmp_path):
    folders = [training(tmp_path / name, [0.1, 0.4], recipe__kind=name) for name in ("nft", "awm")]
    arms = compare(folders).arms
    found = difference(arms[0], arms[1], "gold")
    assert not isinstance(found, str)
    assert (found.prompts.direction, found.prompts.interval) == ("same", None)
    assert "has no held-out score called other" in str(difference(arms[0], arms[1], "other"))
