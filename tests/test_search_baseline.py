"""Best-of-N as the baseline of a search: the same noises, calls and reward, in the run folder and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import written
from report_run import Page

from align.search.baseline import samples_for

run = written.run
CONFIG = """\
generator: {{path: {model}, device: cpu, size: [32, 32]}}
prompts: {{source: prompts.txt, limit: null}}
reward: {{kind: "tiny_run:redness"}}
gold: {{bright: {{kind: "tiny_run:brightness"}}}}
search: {{kind: zero_order, sampler: {{steps: 2}}}}
budget: {{network_calls: 7}}
baseline: best_of_n
"""


@pytest.fixture
def folder(model, tmp_path, monkeypatch) -> Path:
    """A working directory with a config and three prompts."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cube\na blue ball\na cat\n")
    Path("search.yaml").write_text(CONFIG.format(model=model))
    return tmp_path


@pytest.mark.parametrize(
    ("calls", "limit", "samples"),
    [(80, 80, 8), (78, 80, 8), (76, 79, 7), (76, None, 8), (74, 80, 7), (1000, None, 100), (3, 80, 1), (0, 80, 0)],
)
def test_samples_pay_for_the_calls_of_the_search(calls: int, limit: int | None, samples: int) -> None:
    assert samples_for(calls, 10, limit) == samples


def test_the_baseline_has_the_noises_and_the_calls_of_the_search(folder, run):
    code, out, err = run("search", "search.yaml", "--out", "one")
    assert code == 0, err
    summary = json.loads(Path("one/results.json").read_text())
    assert summary["spent"]["network_calls"] == summary["best_of_n"]["spent"]["network_calls"] == 6
    assert set(summary["best_of_n"]["gold"]["bright"]) == {"best_of_n", "best", "rise", "stderr"}
    assert "best_of_n" in out
    assert "At 6 network calls a prompt, bright" in out
    # the plain sample and three more are the first four of a best-of-N search
    code, _, err = run("search", "search.yaml", "search={kind: best_of_n, n: 4, sampler: {steps: 2}}",
                       "budget.network_calls=8", "baseline=null", "--out", "four")  # fmt: skip
    assert code == 0, err
    four = json.loads(Path("four/results.json").read_text())["found"]
    for row, other in zip(summary["found"], four, strict=True):
        assert row["best_of_n"]["reward"] == pytest.approx(max(other["rewards"]), abs=1e-6)
        assert row["best_of_n"]["reward"] >= row["plain"]
        assert row["gold"]["bright"]["best_of_n"] == pytest.approx(other["gold"]["bright"]["best"], abs=1e-6)
        assert (Path("one/candidates") / f"{row['number']:04d}" / row["best_of_n"]["file"]).is_file()
    assert "best_of_n" not in json.loads(Path("four/results.json").read_text())


def test_the_page_shows_best_of_n_and_colours_what_changed(folder, run):
    assert run("search", "search.yaml", "--out", "one")[0] == 0
    page = Page(Path("one/report.html"))
    for text in (
        "Against best-of-N",
        "in the middle that of best-of-N",
        "cost of a prompt",
        "rounded to whole samples",
    ):
        assert text in page.text
    assert sum("Best-of-N: " in (image["alt"] or "") for image in page.all("img")) == 3
    rows = json.loads(Path("one/results.json").read_text())["found"]
    ends = [(row["plain"], row["reward"]) for row in rows]
    ends += [(row["gold"]["bright"]["plain"], row["gold"]["bright"]["best"]) for row in rows]
    told = [("up" if after > before else "down") for before, after in ends if f"{before:.2f}" != f"{after:.2f}"]
    captions = Path("one/report.html").read_text().split("<figcaption><p>")[1:]
    text = "".join(one.split("</figcaption>")[0] for one in captions)
    assert (text.count('class="up"'), text.count('class="down"')) == (told.count("up"), told.count("down"))
    assert text.count("<small>") == 3 * 3


def test_a_search_by_best_of_n_has_no_baseline(folder, run):
    code, _, err = run("check", "search.yaml", "search.kind=best_of_n")
    assert code == 2
    assert "baseline" in err
    assert "the search is best_of_n itself; set it to null" in err
    code, out, _ = run("check", "search.yaml")
    assert code == 0
    assert "best_of_n, with the network calls of the search" in out


def test_a_latent_reward_judges_the_search_and_not_the_baseline(folder, run):
    Path("near_zero.py").write_text("def judge(x, t, prompts):\n    return -x.flatten(1).square().mean(1)\n")
    code, _, err = run("search", "search.yaml", "search={kind: fk, particles: 2, sampler: {steps: 3}}",
                       "budget.network_calls=9", "latent_reward=near_zero:judge", "--out", "one")  # fmt: skip
    assert code == 0, err
    summary = json.loads(Path("one/results.json").read_text())
    assert summary["spent"]["decodes"] < summary["spent"]["reward_calls"]
    rival = summary["best_of_n"]["spent"]
    assert rival["decodes"] == rival["reward_calls"] == rival["network_calls"] / 3
