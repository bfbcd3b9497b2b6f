"""Judges taught by tables: what they are asked and answer, what they learn, and that the LoRA comes back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_vlm
import torch
from PIL import Image
from typer.testing import CliRunner

from align.cli.app import app
from align.config.load import load_reward
from align.data.pair_table import read_judged
from align.preference.judge import Lesson, learn, lessons_of, train_judge
from align.preference.settings import JudgeLora, Steps, load_judge_training
from alignflow.errors import ConfigError, DataError, RunFolderError
from rewards.base import RewardError
from rewards.judges.loading import load_judge
from rewards.judges.lora import FILE
from rewards.judges.models import Local

TAUGHT = ["yes_probability", "reward_dance", "pairwise", "paco"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vlm.save(tmp_path_factory.mktemp("judge"))


def table(folder: Path, count: int, seed: int, brighter: bool = False, **columns) -> Path:
    """Pairs of which the darker image is chosen, or the brighter."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        for name, level in zip(
            ("chosen", "rejected")[:: -1 if brighter else 1], rng.uniform([0.1, 0.5], [0.4, 0.9]), strict=True
        ):
            pixels = np.clip(level + 0.02 * rng.standard_normal((8, 8, 3)), 0, 1)
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{seed}-{i}-{name}.png")
        names = {name: f"{seed}-{i}-{name}.png" for name in ("chosen", "rejected")}
        rows.append({"prompt": "light", **names, **columns})
    path = folder / f"{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, model: Path, kind: str, *overrides: str, brighter: bool = False, **columns):
    path = folder / "judge.yaml"
    train, heldout = table(folder, 24, 0, brighter, **columns), table(folder, 16, 1, brighter)
    path.write_text(
        f"data: {{train: {train}, heldout: {heldout}}}\n"
        f"reward: {{kind: {kind}, judge: {{model: {model}, dtype: float32, chunk: 64}}}}\n"
        f"lora: {{rank: 8, alpha: 16}}\nfit: {{steps: 25, batch: 12, lr: 5e-3, log_every: 10}}\nout: {folder / 'out'}\n"
    )
    return load_judge_training(path, overrides)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "paco")) for kind in TAUGHT])
def test_the_held_out_pairs_are_told_apart_after_it_and_not_before(kind, model, tmp_path):
    brighter = kind == "reward_dance"  # the opposite of what the untaught model happens to prefer
    found = train_judge(config(tmp_path, model, kind, brighter=brighter))
    assert found["before"]["value"] < 0.6
    assert found["after"]["value"] >= 0.9


def test_without_a_learning_rate_nothing_is_learned(model, tmp_path):
    found = train_judge(config(tmp_path, model, "pairwise", "fit.lr=1e-12", "fit.steps=2"))
    assert found["after"] == found["before"]


def test_the_lora_comes_back_under_any_reward(model, tmp_path):
    """The folder's LoRA on the model answers as the judge that was taught; without it the model is as it was."""
    made = config(tmp_path, model, "yes_probability", "fit.steps=5")
    judge = load_judge(made.asking.judge, "cpu")
    from align.preference import judge as room

    room.fit(made, judge, read_judged(made.data.train), lambda line: None)
    train_judge(made)
    media = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    taught = made.asking.around(judge)(media, ["light"] * 3).values
    local = {"model": str(model), "dtype": "float32", "lora": str(tmp_path / "out")}
    again = load_reward(json.dumps({"kind": "yes_probability", "judge": local})).build()(media, ["light"] * 3).values
    plain = load_reward(json.dumps({"kind": "yes_probability", "judge": {**local, "lora": None}})).build()
    assert torch.allclose(again, taught, atol=1e-6)
    assert not torch.allclose(again, plain(media, ["light"] * 3).values, atol=1e-3)


def test_what_is_asked_and_what_should_be_said(model, tmp_path):
    row = read_judged(str(table(tmp_path, 1, 0, reason="it is darker")))[0]
    for kind, words in (("yes_probability", "Yes No"), ("reward_dance", "Yes No"), ("pairwise", "1 2")):
        lessons = lessons_of(config(tmp_path, model, kind).asking, row)
        assert [one.reply for one in lessons] == [f"{word}\nit is darker" for word in words.split()]
        levels = [[float(part.mean()) for part in one.question.content if not isinstance(part, str)] for one in lessons]
        if kind == "yes_probability":
            assert levels[0][0] < levels[1][0]
        else:
            assert levels[0] == levels[1][::-1]
            assert levels[0][0] < levels[0][1]


def test_sub_images_of_the_chosen_image_are_consistent_and_those_of_the_rejected_one_are_not(model, tmp_path):
    row = read_judged(str(table(tmp_path, 1, 0)))[0]
    lessons = lessons_of(config(tmp_path, model, "paco", "reward.rows=1", "reward.columns=3").asking, row)
    assert [one.reply for one in lessons] == ["Yes"] * 3 + ["No"] * 3
    shown = [[part for part in one.question.content if not isinstance(part, str)] for one in lessons]
    assert all(len(pair) == 2 for pair in shown)
    levels = [float(torch.cat(pair, -1).mean()) for pair in shown]
    assert max(levels[:3]) < min(levels[3:])


@pytest.mark.parametrize("batch", [64, 3])
def test_the_loss_weighs_the_verdict_against_the_mean_of_the_rest(batch, model, tmp_path):
    """Beside the log-probabilities of the beginnings of each reply."""
    judge = load_judge(Local(model=str(model), dtype="float32", chunk=batch), "cpu")
    judge.model.requires_grad_(False)
    extra = torch.nn.Parameter(torch.zeros(()))
    judge.model.lm_head.register_forward_hook(lambda module, args, out: out + 0 * extra)
    asking = config(tmp_path, model, "pairwise").asking
    row = read_judged(str(table(tmp_path, 1, 5)))[0]
    questions = [one.question for one in lessons_of(asking, row)]
    replies = ["1\nthe first", "2"]
    found = learn(judge, [Lesson(q, r) for q, r in zip(questions, replies, strict=True)], 0.1)
    with torch.no_grad():
        whole = judge.likelihoods(questions, replies).values.double()
        first = judge.likelihoods(questions, ["1", "2"]).values.double()
    assert whole[:, 1].tolist() == [11, 1]
    rest = (whole[0, 0] - first[0, 0]) / 10
    assert found["loss"] == pytest.approx(float(-(0.1 * first[0, 0] + 0.9 * rest + first[1, 0]) / 2), rel=1e-5)
    assert found["verdict_probability"] == pytest.approx(float(first[:, 0].exp().mean()), rel=1e-5)


def test_a_reason_is_learned_beside_the_verdict(model, tmp_path):
    found = train_judge(config(tmp_path, model, "pairwise", reason="bright"))
    assert found["after"]["value"] >= 0.9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("reward.kind=prompt_echo", "a judge cannot be trained on pairs for prompt_echo; it can for"),
        ("reward={kind: clip}", "a judge cannot be trained on pairs for clip; it can for"),
        ("reward.source=true", "shows image of the prompt, which training on pairs does not support"),
        ("lora.targets=[]", "lora.targets"),
    ],
)
def test_what_cannot_be_taught_is_said_before_anything_is_read(override, said, model, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, model, "pairwise", override)


def test_a_judge_behind_a_server_is_not_trained(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text(
        "data: {train: a.jsonl}\nreward: {kind: pairwise, judge: {url: 'http://127.0.0.1:1/v1', model: m}}\n"
    )
    with pytest.raises(ConfigError, match=r"reward\.judge .*: a judge behind a server is not trained from here"):
        load_judge_training(path)
    with pytest.raises(
        ConfigError, match=r"reward\.judge\.dtype .*: no such setting 'dtype'; known here: kind, url, model"
    ):
        load_judge_training(path, ["reward.judge.dtype=float32"])


def test_bad_input_is_named(model, tmp_path):
    made = config(tmp_path, model, "pairwise", "lora.targets=[nothing]")
    with pytest.raises(RewardError, match=r"lora.targets \['nothing'\] match no linear layer; there are .*q_proj"):
        train_judge(made)
    assert not made.run_dir.exists()
    made.run_dir.mkdir()
    (made.run_dir / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="exists; --overwrite"):
        train_judge(made)
    with pytest.raises(RunFolderError, match="is not a judge's LoRA that alignflow made"):
        train_judge(made, overwrite=True)
    assert (made.run_dir / "notes.txt").read_text() == "mine"
    (tmp_path / "0-3-chosen.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0-3-chosen\.png"):
        train_judge(
            made.model_copy(update={"lora": JudgeLora(), "out": str(tmp_path / "other"), "fit": Steps(batch=24)})
        )
    ties = table(tmp_path, 2, 7, tie=True)
    with pytest.raises(DataError, match="holds only ties"):
        train_judge(config(tmp_path, model, "pairwise", f"data.train={ties}", f"out={tmp_path / 'other'}"))
    wrong = table(tmp_path, 2, 8, reason=3)
    with pytest.raises(DataError, match='"reason" should be a text, given 3'):
        train_judge(config(tmp_path, model, "pairwise", f"data.train={wrong}", f"out={tmp_path / 'other'}"))
    long = table(tmp_path, 2, 9, reason="long " * 900)
    with pytest.raises(DataError, match=r"the limit is 4096"):
        train_judge(config(tmp_path, model, "pairwise", f"data.train={long}", f"out={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


def test_a_lora_that_does_not_fit_is_refused(model, tmp_path):
    def load(folder):
        load_judge(Local(model=str(model), dtype="float32", lora=str(folder)), "cpu")

    with pytest.raises(RewardError, match=f"judge.lora: no {FILE} in"):
        load(tmp_path / "nowhere")
    train_judge(config(tmp_path, model, "pairwise", "fit.steps=1"))
    whole = (tmp_path / "out" / FILE).read_bytes()
    (tmp_path / "out" / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RewardError, match="not a whole safetensors file"):
        load(tmp_path / "out")
    (tmp_path / "out" / FILE).write_bytes(whole)
    with pytest.raises(RewardError, match=r"was not made for this Qwen3VL.*pairs do not fit"):
        load_judge(Local(model="shapes", dtype="float32", lora=str(tmp_path / "out")), "cpu")
    (tmp_path / "out" / "adapter_config.json").write_text("{")
    with pytest.raises(RewardError, match=r"judge\.lora"):
        load(tmp_path / "out")


def test_the_command_says_how_to_use_it(model, tmp_path):
    config(tmp_path, model, "reward_dance")
    found = CliRunner().invoke(app, ["reward", "train", str(tmp_path / "judge.yaml"), "fit.steps=2"])
    assert found.exit_code == 0, found.output
    assert "held out before value" in found.output
    assert f'judge: {{model: "{model}", lora: "{tmp_path / "out"}"}}' in found.output
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        FILE,
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
    }
