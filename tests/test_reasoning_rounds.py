"""Judges that ask for frames before they conclude: forms, questions with a window, rewards, and whole runs."""

from __future__ import annotations

import json

import pytest
import tiny_vlm
import torch
from test_reasoning import by_length, config, quiet, reasoner

from align.reasoning import rounds
from align.reasoning.reasoner import Reasoner
from align.reasoning.rounds import Case, Rounds, Trace, flat, verdicts
from align.reasoning.settings import Reply
from align.reasoning.train import Reasoning, read_judged, train_reasoner
from align.reasoning.words import Written, read_written, reply_of
from align.runs.owned import REASONER
from align.runs.run_folder import RunFolder
from alignflow.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_vlm.save(tmp_path_factory.mktemp("judge"))


ASKS = "<think>x</think><recommend>Video 2 is better</recommend><select>3, 9, 1</select>"


@pytest.mark.parametrize(
    ("reply", "form", "verdict", "asked"),
    [
        (ASKS, True, 2, (2, 0)),
        ("<think>x</think><recommend>Video 2 is better</recommend>", False, 0, ()),
        ("<think>x</think><select>2</select>", False, 0, (1,)),
        ("<think>x</think><recommend>Video 1 is better</recommend><select>9</select>", False, 0, ()),
        ("<think>x</think><answer>Video 1 is better</answer><select>1</select>", False, 1, ()),
        ("<think>x</think><answer>Video 1 is better</answer>", True, 1, ()),
    ],
)
def test_a_request_is_a_thought_a_verdict_so_far_and_frames_that_are_there(reply, form, verdict, asked):
    found = read_written(reply, frames=4)
    assert (found.form, found.verdict, found.asked) == (form, verdict, asked)
    assert not read_written(reply).asked


def test_every_dimension_needs_a_verdict():
    names = ("motion", "text match")
    text = reply_of("x", 2, "Video", dimensions={"motion": 1, "text match": 0})
    assert text == "<think>x</think><answer>motion = 1, text match = 0, Video 2 is better</answer>"
    assert read_written(text, names=names) == Written(True, 2, "x", (1, 0))
    part = read_written("<think>x</think><answer>Motion=2, slow motion = 1 Video 2 is better</answer>", names=names)
    assert part == Written(False, 2, "", (1, None))
    case = Case(None, None, 2, "Video", (), (1, None))
    assert case.judged(Written(True, 2, "x", (1, 0))) == (1, 1)
    assert case.judged(Written(True, 1, "x", (2, 0))) == (0, 0)
    assert Case(None, None, 2, "Video").judged(Written(True, 2, "x")) == (1, 1)


class Speaker:
    """Replies by a list; tokens are its characters."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.asked, self.seeds = list(replies), [], []

    def text(self, tokens):
        return "".join(map(chr, tokens))

    def sample(self, asked, seeds, temperature, longest):
        self.asked += asked
        self.seeds += seeds
        return [[*map(ord, self.replies.pop(0))] for _ in asked]


def shown(question) -> list:
    """Texts, and the level of each image in tenths."""
    return [part if isinstance(part, str) else round(10 * float(part.mean())) for part in question.content]


class Row:
    """A row about a prompt."""

    class prompt:  # noqa: N801
        """Its prompt."""

        text = "a"


def test_questions_hold_the_latest_frames_and_everything_that_was_written():
    videos = tuple(torch.arange(4 * n, 4 * n + 4).float().view(4, 1, 1, 1).expand(4, 3, 2, 2) / 10 for n in (0, 1))
    last = "<think>y</think><answer>Video 1 is better</answer>"
    speaker = Speaker(ASKS, ASKS.replace("3, 9, 1", "8"), last)
    how = Rounds(Reply(template="{prompt}?", rounds=2, more=2, window=1), 2, speaker)
    case = Case(Row, how.question("a", videos), 1, "Video", videos)
    (trace,) = how.think([case], [5], 1.0)
    choose = (
        "a? You see 4 of 8 frames. To see up to 2 others before you decide, write <recommend> </recommend> with the "
        "verdict so far in place of the answer, and then the numbers of the frames, <select>1, 2</select>."
    )
    first = ["Video 1: ", "Frame 2: ", 1, "Frame 4: ", 3, "Video 2: ", "Frame 6: ", 5, "Frame 8: ", 7]
    assert shown(speaker.asked[0]) == [*first, choose]
    more = ["Frames that you asked for: ", "Frame 3: ", 2, "Frame 1: ", 0]  # there is no frame 9
    assert shown(speaker.asked[1]) == [*first, *more, f"{choose}\nWhat you wrote so far:\n{ASKS}"]
    assert shown(speaker.asked[2])[len(first) :][:3] == ["Frames that you asked for: ", "Frame 8: ", 7]
    assert speaker.seeds[0] == 5
    assert len(set(speaker.seeds)) == 3
    assert [one.verdict for one in trace.written] == [2, 2, 1]
    assert trace.form
    again = how.replayed(case, trace.replies)
    assert [shown(one) for one in again.questions] == [shown(one) for one in trace.questions]
    assert again.written == trace.written
    assert flat([trace, Trace(case, [case.question], [[1]], [])])[2] == [0, 0, 0, 1]


def test_labels_are_verdicts_in_the_order_shown(tmp_path, model):
    labels = {"chosen_score.a": 1, "rejected_score.a": 0, "chosen_score.b": 2, "rejected_score.b": 2}
    row = read_judged(config(tmp_path, model, "cold", **labels).data.train)[0]
    assert verdicts(row, ["a", "b", "c"], False) == (1, 0, None)
    assert verdicts(row, ["a", "b", "c"], True) == (2, 0, None)
    row = read_judged(config(tmp_path, model, "cold", **labels | {"chosen_score.a": "high"}).data.train)[0]
    with pytest.raises(DataError, match=r'a label is a number under "chosen_score\.a"'):
        verdicts(row, ["a"], False)


def test_the_reward_of_rounds_has_the_published_numbers(tmp_path, model):
    """Form, accuracy half of the pair and half of its dimensions, 0.2 of the gain, 0.5 (0.4 - 1/4) for a look."""
    settings = config(tmp_path, model, "grpo", "method.signal={kind: frames, least: 0.4}")
    training = Reasoning(settings, RunFolder(settings.run_dir, kind=REASONER), reasoner(model), [], [], quiet)
    case = Case(None, None, 1, "Video", (), (1, 2))
    right, half = Written(True, 1, "x", (1, 2)), Written(True, 2, "x", (1, 2))
    found = [[half, right], [right], [half], [Written(False, 1, "", (None, None))]]
    traces = [Trace(case, [None] * len(one), [[0]] * len(one), one) for one in found]
    wanted = [1 + 1 + 0.2 * 0.5 + 0.5 * 0.15, 2, 1.5, 0.5]
    assert training.signal(traces).tolist() == pytest.approx(wanted)
    other = Case(None, None, 1, "Video", (), (1, 2))  # of another question no reply looked
    more = [Trace(other, [None], [[0]], [right])] * 4
    assert training.signal(traces + more).tolist() == pytest.approx([*wanted, 2, 2, 2, 2])


def restless(text: str, shows: str = "pair", names=(), frames: int = 0) -> Written:
    """Every second reply asks for a frame if it may."""
    found = by_length(text, shows)
    return Written(True, found.verdict, "x", (), (0,)) if frames and len(text) % 2 else found


@pytest.mark.few(1)
@pytest.mark.parametrize("stage", ["grpo", "rejection"])
def test_a_run_over_rounds_trains_on_all_of_them_and_goes_on_to_the_same_bits(stage, tmp_path, model, monkeypatch):
    monkeypatch.setattr(rounds, "read_written", restless)
    taught = []
    logps = Reasoner.logps
    monkeypatch.setattr(Reasoner, "logps", lambda self, asked, *more: taught.append(asked) or logps(self, asked, *more))
    signal = ["method.signal.kind=frames"] if stage == "grpo" else []
    more = ("reply.rounds=2", *signal)
    whole, parts = (config(tmp_path, model, stage, *more, out=out) for out in ("whole", "parts"))
    summary = train_reasoner(whole, say=quiet)
    assert 1 <= summary["after"]["rounds"] <= 3
    assert any("What you wrote so far" in one.content[-1] for some in taught for one in some)

    def note(line: str) -> None:
        if line.startswith("step 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reasoner(parts, say=note)
    train_reasoner(parts, resume=True, say=quiet)
    name = "adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "held_out_after.jsonl").open()]
    assert all(len(row.get("earlier", [])) <= 2 for row in rows)


def test_dimensions_of_one_sample_are_refused(tmp_path, model):
    with pytest.raises(ConfigError, match=r"reply\.dimensions.*dimensions are judged for pairs"):
        config(tmp_path, model, "cold", "reply.shows=one", "reply.dimensions=[a]")
