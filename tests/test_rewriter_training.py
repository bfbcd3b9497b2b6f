"""Training of a rewriter: what it learns, that it goes on exactly, and that everything else stays as it is."""

from __future__ import annotations

import json
import math

import pytest
import tiny_rewriter
import torch
import written
from tiny_rewriter import PROMPTS

from align.data.prompts import Prompt
from align.rewriting.environment import Environment, Judged
from align.rewriting.settings import LocalWriter, Reply, load_rewriter
from align.rewriting.train import Training, new_learner, train_rewriter
from align.rewriting.words import REWRITE, instruction
from align.rewriting.writer import LocalLM
from align.runs.owned import REWRITER
from align.runs.run_folder import RunFolder
from alignflow.errors import CheckpointError, ConfigError, DataError, RunFolderError
from rewards.base import RewardError

run = written.run
ALL = list(tiny_rewriter.METHODS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_rewriter.save(tmp_path_factory.mktemp("rewriter"))


def quiet(line: str) -> None:
    """Says nothing."""


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def table(folder, scores=(0.1, 0.9, 0.5)) -> str:
    """Three rewrites of each prompt, the second of which is best."""
    path = folder / "rewrites.jsonl"
    rows = [
        {"prompt": prompt, "rewrite": text, "score": score, "parts": {"dense": score}}
        for prompt in PROMPTS
        for text, score in zip(("a cross", "two circles", "a square"), scores, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ALL)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, model, method):
    whole = load_rewriter(tiny_rewriter.training(tmp_path, model, method, "whole"))
    before = Environment.build(whole).generator.network.state_dict()

    def note(line: str) -> None:
        if line.startswith("step 2/"):
            raise KeyboardInterrupt

    train_rewriter(whole, say=quiet)
    parts = load_rewriter(tiny_rewriter.training(tmp_path, model, method, "parts"))
    with pytest.raises(KeyboardInterrupt):
        train_rewriter(parts, say=note)  # after the second step and before its checkpoint
    summary = train_rewriter(parts, resume=True, say=quiet)
    found, wanted = (weights(tmp_path / name) for name in ("parts", "whole"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert any(value.abs().max() > 0 for key, value in wanted.items() if "lora_B" in key)
    rows = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("parts", "whole")]
    assert rows[0] == rows[1]
    assert summary["before"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["before"]
    after = Environment.build(whole).generator.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_finished_run_goes_on_for_more_steps(tmp_path, model):
    path = tiny_rewriter.training(tmp_path, model, "grpo")
    train_rewriter(load_rewriter(path, ["method.steps=1"]), say=quiet)
    summary = train_rewriter(load_rewriter(path), resume=True, say=quiet)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [(row["event"], row["step"]) for row in rows] == [
        ("before", 0), ("train", 1), ("after", 1), ("train", 2), ("train", 3), ("after", 3),
    ]  # fmt: skip
    assert summary["steps"] == 3
    assert summary["after"] == pytest.approx({**rows[-1]["after"], "reward": summary["after"]["reward"]}, nan_ok=True)


@pytest.mark.parametrize("method", ALL)
def test_at_learning_rate_0_nothing_is_learned(tmp_path, model, method):
    config = load_rewriter(tiny_rewriter.training(tmp_path, model, method), ["method.lr=0", "method.weight_decay=0"])
    summary = train_rewriter(config, say=quiet)
    assert all(value.abs().max() == 0 for key, value in weights(config.run_dir).items() if "lora_B" in key)
    same = ("reward", "strict", "missing")
    assert json.dumps([summary["before"].get(name) for name in same]) == json.dumps(
        [summary["after"].get(name) for name in same]
    )


def learner(tmp_path, model, method, *overrides):
    config = load_rewriter(tiny_rewriter.training(tmp_path, model, method), overrides)
    writer = LocalLM.load(LocalWriter(model=str(model), dtype="float32", chunk=4), "cpu")
    return new_learner(config, writer), writer


def lesson(writer, prompt=PROMPTS[0], *texts):
    asked = writer.tokens(instruction(REWRITE, prompt))
    return [asked] * len(texts), [[*writer.encode(text), writer.end] for text in texts]


def test_chunks_change_no_gradient(tmp_path, model):
    found = []
    for chunk in (1, 4):
        one, writer = learner(tmp_path, model, "sft")
        writer.chunk = chunk
        asked, replies = lesson(writer, PROMPTS[0], "a cross", "two circles", "a square on a gray background")
        metrics = one.imitate(asked, replies)
        found.append((metrics["loss"], [value.detach().clone() for value in one.parameters]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(first, second, atol=1e-4)


def test_imitation_makes_the_best_rewrite_the_likeliest(tmp_path):
    one, writer = learner(tmp_path, "shapes", "sft", "method.lr=5e-3", "lora.rank=8")
    asked, replies = lesson(writer, PROMPTS[0], "two circles")
    losses = [one.imitate(asked, replies)["loss"] for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    said = writer.write([instruction(REWRITE, PROMPTS[0])], [0], Reply(temperature=0, longest=6))
    assert said == ["two circles"]


def test_preferences_start_at_log_2_and_widen_the_gap(tmp_path, model):
    one, writer = learner(tmp_path, model, "dpo")
    asked, (better, worse) = lesson(writer, PROMPTS[0], "two circles", "a cross")
    losses = [one.prefer(asked[:1], [better], [worse], 0.1)["loss"] for _ in range(12)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    with one.reference():
        first = writer.logps(asked[:1], [better])[0]
    fresh = LocalLM.load(LocalWriter(model=str(model), dtype="float32"), "cpu")
    assert torch.allclose(first, fresh.logps(asked[:1], [better])[0], atol=1e-6)


def test_reinforcement_follows_the_advantage_and_leaves_missing_scores_out(tmp_path, model):
    one, writer = learner(tmp_path, model, "grpo", "method.kl=0", "method.updates=1")
    asked, replies = lesson(writer, PROMPTS[0], "two circles", "a cross", "a square")
    known = torch.tensor([True, True, False])
    before = writer.logps(asked, replies)[0].sum(1).detach()
    found = one.reinforce(asked, replies, torch.tensor([1.0, -1.0, 0.0]), known)
    assert (found["loss"], found["ratio"]) == (pytest.approx(0.0, abs=1e-6), pytest.approx(1.0, abs=1e-6))
    for _ in range(5):
        one.reinforce(asked, replies, torch.tensor([1.0, -1.0, 0.0]), known)
    after = writer.logps(asked, replies)[0].sum(1)
    assert after[0] > before[0]
    assert after[1] < before[1]
    start = [value.detach().clone() for value in one.parameters]
    assert one.reinforce(asked, replies, torch.zeros(3), torch.zeros(3, dtype=torch.bool))["grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(start, one.parameters, strict=True))


class Likes:
    """An environment that likes a word and renders nothing."""

    def __init__(self, word: str) -> None:
        self.word = word

    def judge(self, rewrites, noise, gold=False):
        return [Judged({"reward": float(self.word in one.text)}) for one in rewrites]


@pytest.mark.slow
def test_grpo_raises_what_the_environment_likes_on_held_out_prompts(tmp_path):
    """The embedded rewriter seldom names a gray background; after training nearly always, also for other prompts."""
    path = tiny_rewriter.training(tmp_path, "shapes", "grpo")
    how = ["method.steps=25", "method.batch=4", "method.rewrites=8", "method.kl=0", "method.updates=1", "lora.rank=8"]
    config = load_rewriter(path, [*how, "reply.longest=24", "writer.chunk=64"])
    folder = RunFolder(config.run_dir, kind=REWRITER)
    config.run_dir.mkdir()
    writer = LocalLM.load(config.writer, "cpu")
    words = ("a red circle", "the green square", "a photo of two crosses", "a large triangle", "a cyan cross")
    heldout = [Prompt(text) for text in ("a blue square", "a picture of a small circle", "three triangles")]
    found = Training(config, folder, Likes("gray"), writer, [Prompt(t) for t in words], heldout, quiet).run()
    assert found["before"]["reward"] < 0.5
    assert found["after"]["reward"] > 0.9


def test_a_trained_rewriter_is_loaded_and_trained_further(tmp_path, model):
    first = load_rewriter(
        tiny_rewriter.training(tmp_path, model, "sft", "first"), [f"prompts.rewrites={table(tmp_path)}"]
    )
    train_rewriter(first, say=quiet)
    trained = LocalLM.load(LocalWriter(model=str(model), dtype="float32", lora=str(tmp_path / "first")), "cpu")
    plain = LocalLM.load(LocalWriter(model=str(model), dtype="float32"), "cpu")
    asked, replies = lesson(plain, PROMPTS[0], "two circles")
    assert trained.logps(asked, replies)[0].sum() > plain.logps(asked, replies)[0].sum()
    second = load_rewriter(
        tiny_rewriter.training(tmp_path, model, "dpo", "second"), [f"writer.lora={tmp_path / 'first'}", "method.lr=0"]
    )
    train_rewriter(second, say=quiet)
    found, wanted = weights(tmp_path / "second"), weights(tmp_path / "first")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_dpo_says_where_no_pair_is_far_enough_apart(tmp_path, model):
    path = tiny_rewriter.training(tmp_path, model, "dpo")
    given = f"prompts.rewrites={table(tmp_path)}"
    with pytest.raises(DataError, match=r"none of 9 pairs of rewrites has a gap above 0\.8"):
        train_rewriter(load_rewriter(path, [given, "method.gap=0.8"]), say=quiet)
    config = load_rewriter(path, [given, "method.gap=0.1", "method.above={dense: 0.9}"])
    with pytest.raises(DataError, match="above the thresholds"):  # thresholds are exclusive
        train_rewriter(config, overwrite=True, say=quiet)


def test_a_damaged_checkpoint_is_said(tmp_path, model):
    config = load_rewriter(tiny_rewriter.training(tmp_path, model, "grpo"))
    train_rewriter(config, say=quiet)
    file = config.run_dir / "checkpoint" / "state.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="start again with --overwrite"):
        train_rewriter(config, resume=True, say=quiet)
    with pytest.raises(RunFolderError, match=r"method\.rewrites: 3 then, 4 now"):
        train_rewriter(load_rewriter(tmp_path / "grpo.yaml", ["method.rewrites=4"]), resume=True, say=quiet)


def test_a_lora_of_another_model_is_said(tmp_path, model):
    with pytest.raises(RewardError, match=r"writer\.lora: no adapter_model\.safetensors"):
        LocalLM.load(LocalWriter(model=str(model), dtype="float32", lora=str(tmp_path)), "cpu")


@pytest.mark.parametrize(
    ("method", "override", "why"),
    [
        ("grpo", "prompts.rewrites=a.jsonl", "grpo writes its own rewrites"),
        ("grpo", "reply.temperature=0", "grpo compares different rewrites"),
        (
            "sft",
            "writer={kind: endpoint, url: http://127.0.0.1:1/v1, model: m}",
            "a model behind a server is not trained from here",
        ),
        ("dpo", "method.kind=dop", "no such method"),
        ("dpo", "method.kl=0.1", "only valid for kind=grpo"),
    ],
)
def test_a_wrong_config_is_refused_with_its_place(tmp_path, model, method, override, why):
    path = tiny_rewriter.training(tmp_path, model, method)
    with pytest.raises(ConfigError) as caught:
        load_rewriter(path, [override])
    assert why in str(caught.value)


def test_the_command(tmp_path, model, run):
    path = str(tiny_rewriter.training(tmp_path, model, "grpo"))
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert "method     grpo" in out
    code, out, _ = run("prompts", "train", path, "method.steps=1")
    assert code == 0
    assert f'lora: "{tmp_path / "out"}"' in out
    assert "held out reward: plain" in out
    code, _, err = run("check", path, "prompts.heldout=gone.txt")
    assert code == 2
    assert "prompts.heldout: file gone.txt does not exist" in err
