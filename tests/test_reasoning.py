"""Judges that write their verdict: forms of replies, rewards, what each stage learns, and that it goes on exactly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_vlm
import torch
import written
from PIL import Image
from safetensors.torch import load_file

from align.data.media import read_media
from align.reasoning import rounds
from align.reasoning import train as room
from align.reasoning.reasoner import Drawn, Reasoner
from align.reasoning.rounds import Case, Trace
from align.reasoning.settings import load_reasoning
from align.reasoning.train import Reasoning, Signals, train_reasoner
from align.reasoning.words import Written, read_written, reply_of, thought_of
from align.rewriting.learner import Learner
from align.runs.owned import REASONER
from align.runs.run_folder import RunFolder
from alignflow.errors import ConfigError, DataError, RunFolderError
from rewards.base import RewardError
from rewards.judges.local import LocalJudge
from rewards.judges.models import Local
from rewards.judges.replies import read_preference, read_reasons

run = written.run
STAGES = {
    "cold": "method: {kind: cold, steps: 3, batch: 2, lr: 1e-2}\n",
    "rejection": "method: {kind: rejection, steps: 3, batch: 2, lr: 1e-2, replies: 2, best: 2}\n",
    "grpo": "method: {kind: grpo, steps: 3, batch: 2, replies: 3, lr: 1e-2, kl: 0.1, updates: 2}\n",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm.save(tmp_path_factory.mktemp("judge"))


def quiet(line: str) -> None:
    """Says nothing."""


def config(folder, model, stage: str, *overrides: str, out: str = "out", **columns):
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("heldout", 3)):
        rows = []
        for i in range(count):
            files = {side: f"{split}-{i}-{side}.png" for side in ("chosen", "rejected")}
            for file in files.values():
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / file)
            critique = {"chosen_critique": "light", "rejected_critique": "dark"}
            rows.append({"prompt": "a", **files, **critique, **columns})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / f"{stage}.yaml"
    path.write_text(
        f"data: {{train: {folder}/train.jsonl, heldout: {folder}/heldout.jsonl}}\n"
        f"judge: {{model: {model}, dtype: float32, chunk: 4}}\nlora: {{rank: 2, alpha: 4}}\ncheckpoint: 1\n"
        f"reply: {{longest: 6, template: '{{prompt}}'}}\n" + STAGES[stage]
    )
    return load_reasoning(path, [f"out={folder / out}", *overrides])


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def by_length(text: str, shows: str = "pair", names=(), frames: int = 0) -> Written:
    """A verdict for every reply, so that a model of random weights has right and wrong ones."""
    return Written(True, 1 + sum(map(ord, text)) % 2, text or "nothing")


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "form", "verdict"),
    [
        (reply_of(thought_of("a", "b", "Image"), 2, "Image"), True, 2),
        ("<think>x</think>\n<answer>Video 1 is better</answer>", True, 1),
        ("<think> </think><answer>Image 1 is better</answer>", False, 1),
        ("Sure! <think>x</think><answer>Image 1 is better</answer>", False, 1),
        ("<answer>Image 2 is better</answer>", False, 2),
        ("<think>x<think>y</think><answer>Image 2 is better</answer>", False, 2),
        ("<think>x</think><answer>Both images are equally good</answer>", False, 0),
        ("<think>x</think><answer>Image 1 is better, or Image 2 is better</answer>", False, 0),
        ("<think>Image 1 is better</think>", False, 0),
        ("", False, 0),
    ],
)
def test_form_and_verdict_of_a_reply(reply, form, verdict):
    found = read_written(reply)
    assert (found.form, found.verdict) == (form, verdict)


@pytest.mark.parametrize(
    ("reply", "form", "verdict"),
    [
        (reply_of("a circle", 1, "Image", "one"), True, 1),
        ("<reason>a circle</reason> <answer>no.</answer>", True, 2),
        ("<think>a circle</think><answer>Yes</answer>", False, 1),
        ("<reason> </reason><answer>Yes</answer>", False, 1),
        ("<reason>a circle</reason><answer>Maybe</answer>", False, 0),
        ("yes", False, 0),
    ],
)
def test_form_and_verdict_of_a_reply_about_one_sample(reply, form, verdict):
    found = read_written(reply, "one")
    assert (found.form, found.verdict) == (form, verdict)


def test_a_reply_about_one_sample_is_read_by_the_reward_listener():
    assert read_reasons(reply_of("No, a circle", 2, "Image", "one")) == ("No, a circle", False)
    assert read_preference(reply_of("a circle", 2, "Image"), think=True) == 0.0


def test_a_critique_names_the_samples_in_the_order_shown():
    assert thought_of(" a circle ", "a cross", "Image") == "Image 1: a circle. Image 2: a cross."
    assert thought_of("a circle", "a cross", "Video") == "Video 1: a circle. Video 2: a cross."


# -- the writer -------------------------------------------------------------------------------------------------------


def reasoner(model, chunk: int = 4) -> Reasoner:
    judge = LocalJudge.load(Local(model=str(model), dtype="float32", chunk=chunk), "cpu")
    return Reasoner(judge)


def test_a_token_is_picked_from_the_cumulative_distribution():
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4, 1)
    chance = torch.tensor([[0.1, 0.0], [0.51, 0.0], [0.85, 0.0], [0.85, 0.0]])
    assert Drawn(chance, 1.0)(torch.zeros(4, 1), scores).argmax(1).tolist() == [0, 1, 2, 2]
    sharp = Drawn(chance, 0.1)(torch.zeros(4, 1), scores).argmax(1).tolist()  # 0.5^10 is 0.994 of the sum
    assert sharp == [0, 0, 0, 0]
    assert Drawn(chance, 1.0, [0])(torch.zeros(4, 1), scores).argmax(1).tolist() == [1, 1, 2, 2]  # 0.6 and 0.4
    assert Drawn(chance, 0.0, [0])(torch.zeros(4, 1), scores).argmax(1).tolist() == [1, 1, 1, 1]


def test_a_reply_follows_from_its_own_seed_and_has_the_log_probability_it_was_drawn_with(tmp_path, model):
    writer, settings = reasoner(model), config(tmp_path, model, "cold")
    training = Reasoning(settings, RunFolder(settings.run_dir, kind=REASONER), writer, [], [], quiet)
    row = room.read_judged(settings.data.train)[0]
    asked = [training.case(row, swapped).question for swapped in (False, True, False)]
    together = writer.sample(asked, [5, 6, 7], 1.0, 6)
    assert writer.sample(asked[1:2], [6], 1.0, 6)[0] == together[1]
    assert together[0] != together[2]
    with torch.no_grad():
        logs, mask = writer.logps(asked, together)
        warm, _ = writer.logps(asked, together, 2.0)
    assert mask.sum(1).tolist() == [len(reply) for reply in together]
    inputs = writer.judge.inputs([[*writer.judge.tokens(asked[0]), *together[0]]], asked[:1])
    with torch.no_grad():
        logits = writer.model(**inputs).logits[0].float()
    assert not set(writer.banned) & {token for reply in together for token in reply}
    assert writer.judge.image_token in writer.banned
    logits[:, writer.banned] = -torch.inf
    count = len(together[0])
    each = logits[-count - 1 : -1].log_softmax(-1).gather(1, torch.tensor(together[0])[:, None])[:, 0]
    assert torch.allclose(logs[0][mask[0]], each, atol=1e-4)
    half = (logits[-count - 1 : -1] / 2).log_softmax(-1).gather(1, torch.tensor(together[0])[:, None])[:, 0]
    assert torch.allclose(warm[0][mask[0]], half, atol=1e-4)
    greedy = writer.sample(asked[:1], [0], 0.0, 6)[0]
    assert greedy[0] == int(logits[-count - 1].argmax())


def test_one_sample_is_shown_with_its_own_critique(tmp_path, model, monkeypatch):
    settings = config(
        tmp_path, model, "cold", "reply.shows=one", "reply.template=null", "data.limit=1", "method.batch=1"
    )
    taught = []
    monkeypatch.setattr(Learner, "imitate", lambda self, asked, replies: taught.append((asked[0], replies[0])) or {})
    row = room.read_judged(settings.data.train)[0]
    training = Reasoning(settings, RunFolder(settings.run_dir, kind=REASONER), reasoner(model), [row], [], quiet)
    for step in range(12):
        training.method_step()(step)
    said = {training.writer.text(reply): question.content for question, reply in taught}
    sides = {"light": "chosen", "dark": "rejected"}
    assert set(said) == {f"<reason>{thought}</reason><answer>{verdict}</answer>"
                         for thought, verdict in (("light", "Yes"), ("dark", "No"))}  # fmt: skip
    for text, content in said.items():
        side = sides[text.split(">")[1].split("<")[0]]
        pixels = read_media(tmp_path / f"train-0-{side}.png")
        assert torch.equal(content[0], pixels)
        assert content[1].startswith('Does this image show "a"?')


# -- rewards ----------------------------------------------------------------------------------------------------------


def signals(tmp_path, model, *overrides: str) -> tuple[Signals, list[Case], Reasoning]:
    settings = config(tmp_path, model, "grpo", *overrides)
    writer = reasoner(model)
    training = Reasoning(settings, RunFolder(settings.run_dir, kind=REASONER), writer, [], [], quiet)
    row = room.read_judged(settings.data.train)[0]
    assert training.signal is not None
    return training.signal, [training.case(row, False), training.case(row, True)] * 2, training


def traces(cases: list[Case], found: list[Written]) -> list[Trace]:
    return [Trace(case, [case.question], [[0]], [one]) for case, one in zip(cases, found, strict=True)]


FOUND = [Written(True, 1, "x" * 1600), Written(True, 1, "y"), Written(True, 2, "z"), Written(False, 2, "")]


@pytest.mark.parametrize(
    ("signal", "wanted"),
    [
        ("verdict", [2, 1, 1, 1]),
        ("listener", [1 + 0.5 + 0.4, 1 + 0.4, 1 + 0.4, 0.5]),
        ("rubric", [2.0, -0.5, -0.5, 0.5]),
        ("{kind: rubric, additive: true}", [2.5, 0.5, 0.5, 0.0]),
        ("thought", [0.7 + 0.1 + 0.12, 0.1, 0.1, 0.7]),
        ("frames", [2, 1, 1, 1]),
    ],
)
def test_rewards_have_the_published_numbers(signal, wanted, tmp_path, model, monkeypatch):
    """Right, wrong, wrong, and right without form, with a listener that is sure to 0.8 wherever there is a form."""
    heard = torch.tensor([0.8, 0.8, 0.8, 0.0])
    monkeypatch.setattr(Signals, "heard", lambda self, traces: heard)
    override = f"method.signal={signal}" if signal.startswith("{") else f"method.signal.kind={signal}"
    reward, cases, _ = signals(tmp_path, model, override)
    assert reward(traces(cases, FOUND)).tolist() == pytest.approx(wanted)


def test_a_listener_reads_the_thought_and_is_the_judge_of_the_start(tmp_path, model):
    reward, cases, training = signals(tmp_path, model, "method.signal.kind=listener")
    found = [Written(True, 1, "light"), Written(True, 2, "dark"), Written(False, 1, ""), Written(True, 1, "other")]
    heard = reward.heard(traces(cases, found))
    judge = LocalJudge.load(Local(model=str(model), dtype="float32", chunk=4), "cpu")
    for row, one in enumerate(found):
        if not one.form:
            assert heard[row] == 0
            continue
        texts = [reply_of(one.thought, place, "Image") for place in (1, 2)]
        with torch.no_grad():
            logs, _ = Reasoner(judge).logps([cases[row].question] * 2, [training.writer.encode(t) for t in texts])
        both = logs.sum(1).softmax(0)
        assert heard[row].item() == pytest.approx(both[cases[row].right - 1].item(), abs=1e-4)
    with torch.no_grad():
        for value in training.learner.parameters:
            value += 0.3
    assert torch.allclose(reward.heard(traces(cases, found)), heard, atol=1e-5)  # the listener does not learn
    other, _, _ = signals(
        tmp_path, model, f"method.signal={{kind: rubric, listener: {{model: {model}, dtype: float32}}}}"
    )
    assert torch.allclose(other.heard(traces(cases, found)), heard, atol=1e-4)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, model, stage, monkeypatch):
    monkeypatch.setattr(rounds, "read_written", by_length)
    whole, parts = (config(tmp_path, model, stage, out=out) for out in ("whole", "parts"))
    train_reasoner(whole, say=quiet)

    def note(line: str) -> None:
        if line.startswith("step 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reasoner(parts, say=note)
    with pytest.raises(RunFolderError, match="add --resume to continue"):
        train_reasoner(parts, say=quiet)
    train_reasoner(parts, resume=True, say=quiet)
    found, wanted = (weights(tmp_path / name) for name in ("parts", "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert any(value.abs().max() > 0 for key, value in wanted.items() if "lora_B" in key)
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("parts", "whole")]
    assert rows[0] == rows[1]
    with pytest.raises(RunFolderError, match=r"lora\.rank: 2 then, 3 now"):
        train_reasoner(config(tmp_path, model, stage, "lora.rank=3", out="parts"), resume=True, say=quiet)
    with pytest.raises(RunFolderError, match="other content of data"):
        train_reasoner(config(tmp_path, model, stage, out="parts", note="new"), resume=True, say=quiet)


@pytest.mark.parametrize("stage", STAGES)
def test_at_learning_rate_0_nothing_is_learned(tmp_path, model, stage, monkeypatch):
    monkeypatch.setattr(rounds, "read_written", by_length)
    summary = train_reasoner(config(tmp_path, model, stage, "method.lr=0"), say=quiet)
    assert summary["before"] == summary["after"]
    held = weights(tmp_path / "out")
    assert all(value.abs().max() == 0 for key, value in held.items() if "lora_B" in key)


def test_groups_of_equal_replies_teach_nothing(tmp_path, model, monkeypatch):
    monkeypatch.setattr(rounds, "read_written", lambda *_: Written(False, 0, ""))
    train_reasoner(config(tmp_path, model, "grpo", "method.kl=0"), say=quiet)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    steps = [row for row in rows if row["event"] == "train"]
    assert [row["zero_variance_groups"] for row in steps] == [2, 2, 2]
    assert {(row["reward"], row["grad_norm"]) for row in steps} == {(0.0, 0.0)}
    assert all(value.abs().max() == 0 for key, value in weights(tmp_path / "out").items() if "lora_B" in key)


def test_replies_without_a_reward_are_left_out(tmp_path, model, monkeypatch):
    """A listener that returns NaN: its replies have weight 0, and where none is left nothing is learned."""
    monkeypatch.setattr(rounds, "read_written", by_length)
    monkeypatch.setattr(Signals, "heard", lambda self, traces: torch.full((len(traces),), math.nan))
    train_reasoner(config(tmp_path, model, "grpo", "method.signal.kind=listener"), say=quiet)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    steps = [row for row in rows if row["event"] == "train"]
    assert [(row["missing"], row["grad_norm"]) for row in steps] == [(6, 0.0)] * 3
    assert all(value.abs().max() == 0 for key, value in weights(tmp_path / "out").items() if "lora_B" in key)


def test_imitation_makes_the_critique_the_likeliest_reply(tmp_path, model):
    """After many steps on one pair the judge writes the critique and the verdict, in either order."""
    more = ("method.steps=120", "method.batch=4", "method.lr=2e-2", "lora.rank=8", "reply.longest=90", "checkpoint=200")
    settings = config(tmp_path, model, "cold", "data.limit=1", f"data.heldout={tmp_path / 'train.jsonl'}", *more)
    text = (tmp_path / "train.jsonl").read_text().splitlines()[0] + "\n"
    (tmp_path / "train.jsonl").write_text(text)
    summary = train_reasoner(settings, say=quiet)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert losses[-1] < 0.3 * losses[0]
    assert summary["before"]["form"] == 0


def test_reinforcement_follows_the_advantage(tmp_path, model):
    _, cases, training = signals(tmp_path, model, "method.kl=0", "method.updates=1")
    asked, replies = [one.question for one in cases[:2]], [training.writer.encode(text) for text in ("light", "dark")]
    with torch.no_grad():
        before = training.writer.logps(asked, replies)[0].sum(1)
    found = training.learner.reinforce(asked, replies, torch.tensor([1.0, -1.0]), torch.ones(2).bool())
    assert (found["loss"], found["ratio"]) == (pytest.approx(0.0, abs=1e-5), pytest.approx(1.0, abs=1e-5))
    for _ in range(4):
        training.learner.reinforce(asked, replies, torch.tensor([1.0, -1.0]), torch.ones(2).bool())
    with torch.no_grad():
        after = training.writer.logps(asked, replies)[0].sum(1)
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_the_next_stage_trains_the_lora_further(tmp_path, model, monkeypatch):
    train_reasoner(config(tmp_path, model, "cold"), say=quiet)
    monkeypatch.setattr(rounds, "read_written", by_length)
    train_reasoner(
        config(tmp_path, model, "grpo", f"judge.lora={tmp_path / 'out'}", "method.lr=0", out="next"), say=quiet
    )
    found, wanted = weights(tmp_path / "next"), weights(tmp_path / "out")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_right_replies_alone_are_kept(tmp_path, model, monkeypatch):
    monkeypatch.setattr(rounds, "read_written", by_length)
    settings = config(tmp_path, model, "rejection", "method.best=1", "method.replies=3", "method.steps=1")
    train_reasoner(settings, say=quiet)
    rows = [row for file in sorted((tmp_path / "out" / "collected").iterdir()) for row in json.loads(file.read_text())]
    assert len(rows) == 30
    kept = [row for row in rows if row["kept"]]
    assert len({row["row"] for row in kept}) == len(kept) > 3
    writer = reasoner(model)
    for row in rows:
        right = by_length(writer.text(row["tokens"])).verdict == (2 if row["swapped"] else 1)
        assert right or not row["kept"]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "override", "why"),
    [
        ("grpo", "reply.temperature=0", "0 writes the same one each time"),
        ("rejection", "reply.temperature=0", "0 writes the same one each time"),
        ("cold", "method.kind=cool", "no such method 'cool'; did you mean 'cold'"),
        ("cold", "reply.template=Which one?", "does not show {prompt}"),
        ("grpo", "method.signal.kind=listner", "no such signal 'listner'; did you mean 'listener'"),
        ("cold", "method.replies=2", "only valid for kind=rejection"),
    ],
)
def test_a_wrong_config_is_refused_with_its_place(stage, override, why, tmp_path, model):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, model, stage, override)
    assert why in str(caught.value)


def test_a_judge_behind_a_server_is_not_trained(tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text("data: {train: a.jsonl}\njudge: {url: 'http://127.0.0.1:1/v1', model: m}\nmethod: {kind: cold}\n")
    with pytest.raises(ConfigError, match="a judge behind a server is not trained from here; name a local one"):
        load_reasoning(path)


def test_tables_that_do_not_serve_are_named(tmp_path, model):
    def trained(stage: str, *overrides: str, **columns) -> None:
        train_reasoner(config(tmp_path, model, stage, *overrides, **columns), overwrite=True, say=quiet)

    with pytest.raises(DataError, match=r'line 1: method cold needs a text under "chosen_critique", given None'):
        trained("cold", chosen_critique=None)
    with pytest.raises(DataError, match="holds only ties"):
        trained("cold", tie=True)
    with pytest.raises(DataError, match="chosen and rejected are the same file"):
        trained("grpo", rejected="train-0-chosen.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        trained("grpo", chosen="gone.png")
    with pytest.raises(DataError, match="rejected_prompt is another"):
        trained("grpo", rejected_prompt="b")
    with pytest.raises(DataError, match="no reply has the form and the right verdict"):
        trained("rejection")
    with pytest.raises(DataError, match=r"the limit is 20.*set a smaller reply\.longest"):
        trained("grpo", "judge.longest=20", "out=" + str(tmp_path / "long"))
    with pytest.raises(RewardError, match=r"lora\.targets \['nothing'\] match no linear layer"):
        trained("cold", "lora.targets=[nothing]", "out=" + str(tmp_path / "targets"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Reasoner, "logps", lambda self, asked, replies, temperature=1.0: (
        torch.full((len(replies), 2), math.nan, requires_grad=True), torch.ones(len(replies), 2).bool()))  # fmt: skip
    with pytest.raises(RunFolderError, match=r"the loss is nan at step 0; try a smaller method\.lr"):
        train_reasoner(config(tmp_path, model, "cold"), say=quiet)


def test_the_command_and_its_check(tmp_path, model, run):
    config(tmp_path, model, "cold")
    path = str(tmp_path / "cold.yaml")
    code, out, err = run("check", path)
    assert (code, err) == (0, "")
    assert "method     cold" in out
    code, out, _ = run("reward", "reason", path, "method.steps=1", "--out", str(tmp_path / "mine"))
    assert code == 0
    assert f'lora: "{tmp_path / "mine"}"' in out
    assert "held out after  accuracy 0, form 0" in out
    code, _, err = run("check", path, "data.train=gone.jsonl", "judge.lora=nowhere")
    assert code == 2
    assert "data.train: file gone.jsonl does not exist" in err
    assert err.count("judge.lora") == 1
