"""``alignflow pairs``: from samples of any source to a table that trains."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import written
from PIL import Image
from pyarrow import parquet
from test_pair_weights import table
from test_training import stored_pairs_config
from torch import Tensor

from align.config.load import dump_config, load_config
from align.data.media import encode
from align.data.pair_table import stored_rewards
from align.data.prompts import PAIR, read_stored
from align.preference import build_pairs as building
from align.preference.pairing import Pairing, form
from align.training.trainer import train
from alignflow.errors import ConfigError, DataError
from rewards.base import Scores

run = written.run
ROOT = Path(__file__).parent.parent
LIGHT = "test_build_pairs:light"

CONFIG = """\
generator: {{path: {model}, device: cpu, size: [32, 32]}}
prompts: {{train: prompts.txt}}
reward: {{kind: "tiny_run:redness"}}
recipe: {{kind: flow_dpo}}
evaluate: {{sampler: {{steps: 2}}}}
"""


def light(media: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels, of images and videos."""
    return media.flatten(1).mean(1)


def dark(media: Tensor, prompts: list[str]) -> Tensor:
    """The opposite."""
    return -light(media, prompts)


def two_parts(media: Tensor, prompts: list[str]) -> Scores:
    """Brightness as score, with parts that agree on some samples."""
    values = light(media, prompts)
    return Scores(values, parts={"VQ": values, "TA": (values - 0.5).abs()})


def holey(media: Tensor, prompts: list[str]) -> Tensor:
    """Brightness, not a number for black images."""
    values = light(media, prompts)
    return values.masked_fill(values == 0, math.nan)


def grey(path: Path, level: int, frames: int = 0) -> None:
    """An image of one level of grey, or a video that starts with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16, 16, 3), level, np.uint8)
    if frames:
        clip = np.stack([np.full_like(pixels, max(level - 10 * i, 0)) for i in range(frames)])
        path.write_bytes(encode(clip, path.suffix))
    else:
        Image.fromarray(pixels).save(path)


@pytest.fixture
def levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of brightness 0, 51, ..., 204 of 255, in a table with two prompts."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for level in range(5):
        grey(Path(f"many/{level}.png"), 51 * level)
        rows.append({"prompt": "a cat" if level < 3 else "a dog", "image": f"many/{level}.png"})
    Path("samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def pairs_of(folder: str = "pairs") -> list[dict[str, Any]]:
    rows = parquet.read_table(f"{folder}/pairs.parquet").to_pylist()
    return [{**row, **{side: Path(row[side]).stem for side in PAIR}} for row in rows]


def sides(folder: str = "pairs") -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in pairs_of(folder)]


# -- sources ----------------------------------------------------------------------------------------------------------


def test_a_table_of_images_becomes_pairs(run, levels, capsys):
    code, out, err = run("pairs", "samples.jsonl", "--reward", LIGHT)
    assert code == 0, err
    assert "pairs    2" in out
    first, second = pairs_of()
    assert (first["prompt"], first["chosen"], first["rejected"]) == ("a cat", "2", "0")
    assert (first["chosen_score"], first["rejected_score"]) == (pytest.approx(0.4), 0.0)
    assert (second["prompt"], second["policy"], second["source"]) == ("a dog", "best_worst", "samples.jsonl")
    assert len(second["reward"]) == 64
    assert [prompt.text for prompt in read_stored("pairs/pairs.parquet", PAIR)] == ["a cat", "a dog"]
    assert not list(Path("pairs/media").iterdir())  # files stay where they are
    code, _, err = run("pairs", "samples.jsonl", "--reward", LIGHT, "--copy", "--out", "moved")
    assert code == 0, err
    shutil.rmtree("many")
    Path("moved").rename("elsewhere")
    assert len(read_stored("elsewhere/pairs.parquet", PAIR)) == 2


def test_videos_of_a_folder_become_pairs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for level in (40, 120, 200):
        grey(Path(f"clips/{level}.webp"), level, frames=3)
    code, _, err = run("pairs", "clips", "--prompt", "a cat", "--reward", LIGHT)
    assert code == 0, err
    assert sides() == [("200", "40")]


def test_images_inside_a_table_are_written_as_files(run, levels):
    content = [Path(f"many/{level}.png").read_bytes() for level in (1, 3)]
    source = [Path("many/4.png").read_bytes()] * 2
    columns = {"prompt": ["brighter"] * 2, "sample": content, "image": source}
    parquet.write_table(pyarrow.table(columns), "edits.parquet")
    code, _, err = run("pairs", "edits.parquet", "--reward", LIGHT)
    assert code == 0, err
    (pair,) = read_stored("pairs/pairs.parquet", (*PAIR, "image"))
    assert [Path(str(pair.media[name])).read_bytes() for name in PAIR] == content[::-1]
    assert Path(str(pair.media["image"])).read_bytes() == source[0]


def test_the_same_instruction_for_two_images_is_two_prompts(run, levels):
    rows = [{"prompt": "darker", "sample": f"many/{n}.png", "image": f"many/{n // 2}.png"} for n in range(4)]
    Path("edits.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run("pairs", "edits.jsonl", "--reward", LIGHT)[0] == 0
    assert sides() == [("1", "0"), ("3", "2")]


@pytest.fixture
def config(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cube\na blue ball\na cat\na dog\n")
    Path("run.yaml").write_text(CONFIG.format(model=model))
    return tmp_path


def test_a_generator_samples_and_an_interrupted_command_goes_on_to_the_same_bytes(run, config, monkeypatch):
    ask = ("pairs", "run.yaml", "--count", "3", "--chunk", "3")
    assert run(*ask, "--out", "whole")[0] == 0
    real, calls = building.score_items, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(building, "score_items", stopped)
    code, _, err = run(*ask, "--out", "part")
    assert code == 130
    assert "stopped; run the same command again to continue in part" in err
    assert len(Path("part/scored.jsonl").read_text().splitlines()) == 2
    with Path("part/scored.jsonl").open("a") as file:
        file.write('{"unit": 2, "rows": [{"na')  # as a kill leaves it
    code, _, err = run(*ask, "--out", "part")
    assert code == 0
    assert "part: 6 samples are there already" in err
    assert len(calls) == 5  # two units, the one that was interrupted, two more
    for name in ("pairs.parquet", "scored.jsonl"):
        assert Path("part", name).read_bytes() == Path("whole", name).read_bytes()
    assert len(read_stored("part/pairs.parquet", PAIR)) == 4
    code, _, err = run(*ask, "--seed", "1", "--out", "part")
    assert code == 2
    assert "part holds samples with another source; choose another folder with --out" in err
    code, _, err = run(*ask[:2], "--count", "3", "--chunk", "3", "--reward", LIGHT, "--out", "part")
    assert "another rewards" in err


def test_another_policy_pairs_the_same_scores_anew(run, config, monkeypatch):
    ask = ("pairs", "run.yaml", "--count", "3")
    assert run(*ask)[0] == 0
    monkeypatch.setattr(building, "score_items", None)
    assert run(*ask, "--policy", "all")[0] == 0
    assert len(pairs_of()) == 12
    assert run(*ask, "--policy", "all", "--per-prompt", "2")[0] == 0
    assert len(pairs_of()) == 8


def test_a_finished_search_brings_its_scores(run, config, model):
    Path("search.yaml").write_text(
        f"generator: {{path: {model}, device: cpu, size: [32, 32]}}\nprompts: {{source: prompts.txt}}\n"
        'reward: {kind: "tiny_run:redness"}\nsearch: {kind: best_of_n, n: 3, sampler: {steps: 2}}\n'
        "budget: {network_calls: 6}\n"
    )
    assert run("search", "search.yaml", "--out", "found", "--as", "pairs", "stored")[0] == 0
    assert run("pairs", "found")[0] == 0
    stored = [json.loads(line) for line in Path("stored/pairs.jsonl").read_text().splitlines()]
    names = ("prompt", "chosen_score", "rejected_score", "policy")
    assert [[row[name] for name in names] for row in stored] == [[row[name] for name in names] for row in pairs_of()]
    assert run("pairs", "found", "--reward", LIGHT, "--out", "light")[0] == 0
    assert pairs_of("light") != pairs_of()
    code, _, err = run("pairs", "found", "more")
    assert code == 2
    assert "give it alone" in err


def test_pairs_train_flow_dpo(run, config, model):
    assert run("pairs", "run.yaml", "--count", "3")[0] == 0
    summary = train(stored_pairs_config(Path("run"), model, Path("pairs/pairs.parquet"), {"kind": "flow_dpo"}))
    assert summary["steps"] > 0


# -- policies ---------------------------------------------------------------------------------------------------------


def test_several_rewards_decide_together(run, levels):
    both = ("--reward", f"a={LIGHT}", "--reward", f"b={LIGHT}")
    assert run("pairs", "samples.jsonl", *both, "--policy", "agree", "--out", "one")[0] == 0
    assert sides("one") == [("2", "1"), ("2", "0"), ("1", "0"), ("4", "3")]
    assert pairs_of("one")[0]["chosen_score.b"] == pairs_of("one")[0]["chosen_score"]
    against = ("--reward", f"a={LIGHT}", "--reward", "b=test_build_pairs:dark")
    code, _, err = run("pairs", "samples.jsonl", *against, "--policy", "agree", "--out", "two")
    assert code == 2
    assert "no pairs by policy agree: 2 prompts: no pair by the policy" in err
    assert run("pairs", "samples.jsonl", *both, "--policy", "rank_then_sift", "--out", "three")[0] == 0
    assert sides("three") == [("1", "0"), ("4", "3")]


def test_parts_decide_where_they_are_named(run, levels):
    ask = ("pairs", "samples.jsonl", "--reward", "test_build_pairs:two_parts")
    assert run(*ask, "--by", "TA")[0] == 0
    assert sides() == [("0", "2"), ("4", "3")]
    row = pairs_of()[0]
    assert (row["chosen_score"], row["chosen_score.TA"], row["chosen_score.VQ"]) == (0.5, 0.5, 0.0)
    assert run(*ask, "--policy", "dominance")[0] == 0
    assert sides() == [("4", "3")]
    assert run(*ask, "--policy", "threshold_gap", "--above", "TA=0.2", "--margin", "0.1")[0] == 0
    assert sides() == [("1", "0"), ("4", "3")]
    code, _, err = run(*ask, "--by", "MQ")
    assert code == 2
    assert "no score has the name 'MQ'; besides the reward there are VQ, TA" in err


def test_passed_and_failed_are_paired_across_prompts_and_train_a_reward_alone(run, levels, model):
    ask = ("pairs", "samples.jsonl", "--reward", LIGHT, "--policy", "pass_fail", "--passing", "0.3")
    assert run(*ask, "--per-prompt", "9")[0] == 0
    rows = pairs_of()
    assert {(row["chosen"], row["rejected"], row["tie"]) for row in rows} == {
        *((winner, loser, False) for winner in "34" for loser in "01"),
        *(("2", other, True) for other in "34"),
    }
    assert all(row["prompt"] != row["rejected_prompt"] for row in rows)
    table, config = Path("pairs/pairs.parquet"), stored_pairs_config
    with pytest.raises(DataError, match="a pair across prompts trains a reward, not a generator"):
        train(config(Path("run"), model, table, {"kind": "flow_dpo"}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "best"}, "no such policy"),
        ({"above": {"VQ": 1.0}}, "--above belongs to --policy threshold_gap"),
        ({"passing": 1.0}, "best_worst has no use for --passing"),
        ({"policy": "pass_fail"}, "pass_fail needs --passing SCORE"),
        ({"by": ("a", "b")}, "best_worst decides by one score"),
        ({"policy": "agree"}, "compares two judges, and there are one reward without parts"),
        ({"policy": "dominance"}, "needs two scores at least"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], says: str) -> None:
    rows = [{"group": 0, "score": float(n), "parts": {}} for n in range(2)]
    with pytest.raises(ConfigError, match=says):
        form(rows, Pairing(**options))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_one_bad_file_is_one_bad_row(run, levels):
    Path("many/2.png").write_bytes(b"no image")
    code, _, err = run("pairs", "samples.jsonl", "--reward", LIGHT)
    assert code == 2
    assert "1 of 5 files could not be read" in err
    assert "2.png is not an image" in err
    assert sides() == [("1", "0"), ("4", "3")]
    rows = [row for line in Path("pairs/scored.jsonl").read_text().splitlines() for row in json.loads(line)["rows"]]
    assert [bool(row["unread"]) for row in rows] == [False, False, True, False, False]


def test_missing_scores_are_in_no_pair(run, levels):
    code, _, err = run("pairs", "samples.jsonl", "--reward", "test_build_pairs:holey")
    assert code == 0
    assert "no test_build_pairs:holey score: the reward returned nan" in err
    assert sides() == [("2", "1"), ("4", "3")]


@pytest.mark.parametrize(
    ("levels_of", "says"),
    [
        ([90], "1 prompts: fewer than two scored samples"),
        ([90, 90, 90], "1 prompts: equal scores"),
        ([0, 0], r"1 prompts: fewer than two scored samples \(.*the reward returned nan"),
    ],
)
def test_groups_that_teach_nothing_are_told(run, tmp_path, monkeypatch, levels_of, says):
    monkeypatch.chdir(tmp_path)
    for number, level in enumerate(levels_of):
        grey(Path(f"few/{number}.png"), level)
    code, _, err = run("pairs", "few", "--prompt", "a cat", "--reward", "test_build_pairs:holey")
    assert code == 2
    assert re.search(says, err), err


def test_a_folder_of_something_else_is_left_alone(run, levels):
    code, _, err = run("pairs", "samples.jsonl", "--reward", LIGHT, "--out", "many")
    assert code == 2
    assert "many exists and is not empty" in err
    code, _, err = run("pairs", "samples.jsonl")
    assert "there is no reward to score with" in err
    Path("pairs").mkdir()
    Path("pairs/.alignflow.json").write_text('{"kind": "search"}')
    code, _, err = run("pairs", "samples.jsonl", "--reward", LIGHT)
    assert "pairs exists and is not empty" in err


# -- tables that train ------------------------------------------------------------------------------------------------


def by_part(folder: Path, *rows: dict[str, Any]) -> Path:
    """Pairs with further columns."""
    file = table(folder, *[(0.9, 0.1)] * len(rows))
    lines = [json.loads(line) | row for line, row in zip(file.read_text().splitlines(), rows, strict=True)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def dimension(file: Path, model: Path, **rollout: Any) -> Any:
    config = stored_pairs_config(file.parent / "run", model, file, {"kind": "flow_dpo"})
    tree = config.model_dump(mode="json")
    tree["rollout"] |= {"dimension": "VQ", **rollout}
    return type(config).model_validate(tree)


def test_a_dimension_decides_which_sample_is_better(model, tmp_path):
    row = {"chosen_score.VQ": 2.0, "rejected_score.VQ": 3.0}
    config = dimension(by_part(tmp_path, row), model)
    (pair,) = read_stored(config.rollout.file, PAIR)
    assert stored_rewards(pair, config.rollout) == [2.0, 3.0]
    assert train(dimension(by_part(tmp_path, *[row] * 4), model))["steps"] > 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen_score.VQ": 2.0, "rejected_score.VQ": 2.0}, "chosen_score.VQ 2 should differ from rejected_score.VQ"),
        ({"chosen_score.VQ": "10", "rejected_score.VQ": "9"}, "rollout.dimension VQ needs a number under"),
        ({"chosen_score.MQ": 2.0}, 'rollout.dimension VQ needs a number under "chosen_score.VQ", given None'),
    ],
)
def test_a_dimension_that_says_nothing_is_found_by_check(row, says, model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(dump_config(dimension(by_part(tmp_path, row), model)))
    code, _, err = run("check", "run.yaml")
    assert code == 2
    assert "rollout.file: " in err
    assert "line 1: " + says in err


def test_check_finds_pairs_that_prefer_nothing(model, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stored_pairs_config(tmp_path / "run", model, table(tmp_path, (0.2, 0.2)), {"kind": "flow_dpo"})
    Path("run.yaml").write_text(dump_config(config))
    assert "chosen_score 0.2 should be higher than rejected_score 0.2" in run("check", "run.yaml")[2]
    table(tmp_path, None, same=True)
    assert "chosen and rejected are the same file" in run("check", "run.yaml")[2]
    (tmp_path / "blue.png").unlink()
    table_file = tmp_path / "pairs.jsonl"
    table_file.write_text('{"prompt": "a", "chosen": "red.png", "rejected": "blue.png"}')
    assert "no rejected" in run("check", "run.yaml")[2]
    assert load_config("run.yaml").rollout.kind == "pairs"
