"""Scoring while samples are drawn: the same scores, the same weights, less time; missing scores and patience."""

from __future__ import annotations

import ast
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import flaky as flaky_module
import pytest
import torch
from launched import launch
from safetensors.torch import load_file
from tiny import sd3_pipeline
from tiny_run import RECIPES, STOCHASTIC, final_tensors, policy_gap, settings, some_slow

from align.config.settings import Config
from align.evaluation.evaluate import evaluate_run
from align.rollout.scoring import Scoring
from align.training.missing import Missing
from align.training.trainer import train
from rewards.base import Reward, RewardError, Scores

MEDIA = (torch.arange(12) * 21).byte().view(12, 1, 1, 1).expand(12, 3, 2, 2)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3])


def noted(scope):
    """A reward that gives every sample its group's size in the call, and the list of its calls."""
    calls = []

    def function(media, prompts, group, metadata):
        calls.append(group.tolist())
        sizes = [float((group == g).sum()) for g in group]
        values = torch.tensor(sizes).masked_fill(media[:, 0, 0, 0] > 0.89, torch.nan)
        assert [m["row"] for m in metadata] == (media[:, 0, 0, 0] * 255 / 21).round().int().tolist()
        return Scores(values, {i: f"row {m['row']}" for i, m in enumerate(metadata)}, {"copy": values})

    return Reward("noted", function, wants=("metadata",), scope=scope), calls


def scored(scope, chunk, thread=None):
    reward, calls = noted(scope)
    scoring = Scoring(reward, thread)
    for rows in torch.arange(12).split(chunk):
        metadata = [{"row": i} for i in rows.tolist()]
        scoring.add(MEDIA[rows], ["p"] * len(rows), GROUP[rows], {"metadata": metadata})
    return scoring.scores(), calls


@pytest.mark.parametrize("chunk", [1, 2, 5, 12])
def test_what_belongs_together_is_scored_together(chunk: int) -> None:
    with ThreadPoolExecutor(1) as thread:
        for where in (None, thread):
            scores, calls = scored("sample", chunk, where)
            assert [len(call) for call in calls] == [min(chunk, 12 - start) for start in range(0, 12, chunk)]
            for scope in ("group", "batch"):
                scores, calls = scored(scope, chunk, where)
                assert [number for call in calls for number in call] == GROUP.tolist()
                assert scores.values[:11].tolist() == [3] * 3 + [5] * 5 + [3] * 3
                assert scores.reasons == {11: "row 11"}
                assert torch.equal(scores.parts["copy"][:11], scores.values[:11])
            assert len(calls) == 1  # the batch


def test_scoring_runs_beside_drawing() -> None:
    go, asked = threading.Event(), threading.Event()

    def function(media, prompts, group):
        asked.set()
        assert go.wait(10)
        return torch.ones(len(media))

    with ThreadPoolExecutor(1) as thread:
        scoring = Scoring(Reward("waits", function), thread)
        scoring.add(MEDIA[:6], ["p"] * 6, GROUP[:6], {})
        assert asked.wait(10)  # before the rest is there
        scoring.add(MEDIA[6:], ["p"] * 6, GROUP[6:], {})
        go.set()
        assert scoring.scores().values.tolist() == [1] * 12


def test_what_a_reward_raises_in_the_thread_is_raised_here() -> None:
    def function(media, prompts, group):
        raise RewardError("reads videos")

    with ThreadPoolExecutor(1) as thread:
        scoring = Scoring(Reward("clips", function), thread)
        scoring.add(MEDIA, ["p"] * 12, GROUP, {})
        with pytest.raises(RewardError, match="reads videos"):
            scoring.scores()


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 on disk."""
    folder = tmp_path_factory.mktemp("model") / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    return folder


def config(folder: Path, model: Path, overlap: str, recipe: str = "nft", **sections) -> Config:
    """A tiny run without evaluation, drawn in chunks of two."""
    folder.mkdir(exist_ok=True)
    sampler = {"kind": "flow_sde" if recipe in STOCHASTIC else "ode", "steps": 2}
    rollout = {"sampler": sampler, "chunk": 2, "overlap": overlap}
    sections = {"reward": {"kind": "flaky:judge"}, "rollout": rollout, **sections}
    return settings(folder, model, recipe, **{"prompts": {"heldout": None}, **sections})


def rows(run: Config) -> list[dict]:
    """Training rows."""
    found = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["event"] == "train"]


@pytest.fixture(autouse=True)
def flaky(folder_of_flaws: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that tells the flaky rewards when to fail."""
    monkeypatch.setattr(flaky_module, "calls", 0)
    return folder_of_flaws


@pytest.fixture(scope="module")
def folder_of_flaws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same for all tests of a module, so that processes they start know it too."""
    folder = tmp_path_factory.mktemp("flaky")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAKY", str(folder))
        yield folder


def test_overlapping_chunks_changes_no_bit(model: Path, tmp_path: Path) -> None:
    runs = [
        config(tmp_path / overlap, model, overlap, reward={"kind": "flaky:grouped"}) for overlap in ("none", "chunks")
    ]
    for run in runs:
        train(run)
    assert policy_gap(final_tensors(runs[0]), final_tensors(runs[1])) == 0
    assert [row["reward"] for row in rows(runs[0])] == [row["reward"] for row in rows(runs[1])]


@pytest.mark.parametrize("recipe", ["nft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_staggered_run_resumes_to_the_same_bits(recipe: str, model: Path, tmp_path: Path) -> None:
    whole = config(tmp_path / "whole", model, "next", recipe, train={"steps": 4})
    train(whole)
    train(config(tmp_path / "parts", model, "next", recipe, train={"steps": 2}))
    parts = config(tmp_path / "parts", model, "next", recipe, train={"steps": 4})
    train(parts, resume=True)
    for role in ("policy", *(["behaviour"] if recipe == "nft" else []), "ahead"):
        assert policy_gap(final_tensors(whole), final_tensors(parts), role) == 0
    evaluated = config(
        tmp_path / "whole", model, "next", recipe, prompts={"heldout": str(tmp_path / "whole/prompts.txt")}
    )
    assert evaluate_run(evaluated, whole.run_dir)["role"] == "ema"
    assert [row["reward"] for row in rows(whole)] == [row["reward"] for row in rows(parts)]
    assert sum(row["network_calls"] for row in rows(whole)) == sum(row["network_calls"] for row in rows(parts))


def test_staggered_rollouts_are_drawn_one_update_ago(model: Path, tmp_path: Path) -> None:
    """The first two rollouts are the base's; the ratio to what drew the second is 1 no more."""
    staggered, plain = (config(tmp_path / name, model, name, "grpo", train={"steps": 2}) for name in ("next", "none"))
    for run in (staggered, plain):
        train(run)
    first, second = rows(staggered)
    assert first["reward"] == rows(plain)[0]["reward"]
    assert second["reward"] != rows(plain)[1]["reward"]
    assert [row["ratio"] for row in rows(plain)] == pytest.approx([1, 1], abs=1e-6)
    assert first["ratio"] == pytest.approx(1, abs=1e-6)
    assert abs(second["ratio"] - 1) > 1e-6
    base = config(tmp_path / "base", model, "none", "grpo", train={"steps": 2, "lr": 0})
    train(base)
    assert second["reward"] == rows(base)[1]["reward"]


def test_a_slow_reward_is_hidden(model: Path, tmp_path: Path) -> None:
    """Time the step waits for a reward of 0.4 s, when drawing takes longer than that."""
    waited = {}
    for overlap in ("none", "next"):
        slow = {"sampler": {"kind": "ode", "steps": 2}, "chunk": 256, "overlap": overlap}
        run = config(tmp_path / overlap, model, overlap, rollout=slow, reward={"kind": "flaky:slow"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("align.rollout.sources.decode_to_cpu", _takes(0.6))
            train(run)
        waited[overlap] = [row["time"]["reward"] for row in rows(run)][:-1]  # the last has no next to hide behind
    assert min(waited["none"]) >= 0.4
    assert max(waited["next"]) < 0.2 * 0.4


def _takes(seconds: float):
    from align.rollout.rollout import decode_to_cpu

    def slowly(*arguments):
        time.sleep(seconds)
        return decode_to_cpu(*arguments)

    return slowly


# -- patience -------------------------------------------------------------------------------------------------------


def test_a_reward_that_never_scored_stops_at_once_and_one_that_did_is_waited_for() -> None:
    with pytest.raises(RewardError, match=r"'judge' gave no score .*: the server is away"):
        Missing("judge", 3).count(0, ["the server is away"])
    missing = Missing("judge", 1)
    missing.count(4, [])
    missing.count(0, ["away"] * 8)
    assert missing.news(["away"] * 8) == "8 samples without a score: 8 x away"
    assert missing.news(["away"] * 5) is None  # told already
    assert missing.too_many is None
    missing.count(0, ["away"] * 8)
    assert "2 rollouts in a row: 5 x away" in str(missing.too_many)
    assert "--resume" in str(missing.too_many)
    missing.count(1, [])
    assert missing.too_many is None


@pytest.mark.parametrize("recipe", some_slow(RECIPES))
def test_a_rollout_without_scores_teaches_nothing(recipe: str, model: Path, tmp_path: Path) -> None:
    """The second of two; no role changes."""
    kind = "tiny_run:BrightRegions" if recipe == "srum" else "flaky:falls_silent"
    silent = {"kind": kind, "options": {"after": 5}}
    run = config(
        tmp_path / "a", model, "none", recipe, reward=silent, train={"steps": 2, "ema": 0, "chunk": 2}
    )  # fmt: skip
    train(run)
    assert [row["missing"] for row in rows(run)] == [0, 8]
    assert [why.replace("given: ", "") for why in rows(run)[1]["reasons"]] == ["8 x the reward returned nan"]
    assert rows(run)[1]["reward"] is None
    before, after = (load_file(run.run_dir / f"checkpoints/step-00000{n}/roles.safetensors") for n in (1, 2))
    assert policy_gap(before, after, "policy/policy") == 0
    assert policy_gap(before, {name: value * 0 for name, value in after.items()}, "policy/policy") > 0


def test_patience_ends_with_a_checkpoint(model: Path, tmp_path: Path) -> None:
    silent = {"kind": "flaky:falls_silent", "options": {"after": 5}}
    options = {"steps": 8, "unscored": 1}
    run = config(tmp_path / "a", model, "none", reward=silent, train=options, checkpoint={"every": 0})
    with pytest.raises(RewardError, match=r"2 rollouts in a row: 8 x the reward returned nan.*--resume"):
        train(run)
    assert [row["missing"] for row in rows(run)] == [0, 8, 8]
    flaky_module.calls = 0
    with pytest.raises(RewardError, match=r"2 rollouts in a row"):
        train(run, resume=True)
    assert [row["missing"] for row in rows(run)] == [0, 8, 8, 0, 8, 8]


BATCH = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from align.rollout.scoring import Scoring
from align.runs.processes import Processes
from rewards.base import Reward, Scores

def function(media, prompts, group, metadata):
    values = media.mean(dim=(1, 2, 3)) * torch.tensor([row["weight"] for row in metadata])
    values = (values - values.mean()) / values.std()  # depends on every sample
    values[prompts.index("p3")] = float("nan")
    return Scores(values, {prompts.index("p3"): "no score for p3"}, {"raw": media.mean(dim=(1, 2, 3))})

processes = Processes(Accelerator(cpu=True))
reward = Reward("batch", function, scope="batch", wants=("metadata",))
scoring = Scoring(reward, None, processes)
mine = processes.share.of(5) if sys.argv[2] == "spread" else range(5) if processes.share.rank == 0 else range(0)
media = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
for i in mine:
    scoring.add(media[i:i + 1], [f"p{i}"], torch.tensor([i]), {"metadata": [{"weight": i + 1.0}]})
scores = scoring.scores()
assert len(scores.values) == len(mine)
values = [round(float(value), 6) for value in scores.values]
found = processes.objects([values, dict(scores.reasons), scores.parts["raw"].tolist()])
if processes.share.rank == 0:
    Path(sys.argv[1]).write_text(repr([found[0::3], found[1::3], found[2::3]]))
if processes.share.world > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["spread", "one has all"])
def test_two_processes_compare_all_samples_of_a_batch(how, tmp_path):
    """As on one process; a process may have none, and reasons stay with their samples."""
    found = []
    for count in (1, 2, 3):
        launch(count, tmp_path, BATCH, str(tmp_path / f"{count}.txt"), how.split()[0])
        values, reasons, raw = ast.literal_eval((tmp_path / f"{count}.txt").read_text().replace("nan", "None"))
        starts = [sum(map(len, values[:rank])) for rank in range(count)]
        whole = {start + i: why for start, known in zip(starts, reasons, strict=True) for i, why in known.items()}
        found.append(([*chain(*values)], whole, [*chain(*raw)]))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == {3: "no score for p3"}
    assert found[0][0][3] is None
    assert len(set(found[0][0])) == 5
