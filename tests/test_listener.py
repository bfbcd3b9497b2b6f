"""Judges whose words are read twice: by a listener, and for where a video gives itself away."""

from __future__ import annotations

import math

import pytest
import torch
from test_judge_endpoint import MEDIA, SURE, built, shades, texts
from tiny_vlm import endpoint, said, save

import rewards
from rewards.base import RewardError
from rewards.judges.replies import ReplyError, read_fakeness, read_reasons
from rewards.judges.verdicts import listener_shaped
from rewards.questions.deeptrace import read


def listened(probability):
    """An answer whose share of yes is ``probability``."""
    return said("Yes", {"Yes": math.log(probability * 0.5), "No": math.log((1 - probability) * 0.5)})


def test_the_listeners_formula():
    found = listener_shaped(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.8, 0.0, 1.0]))
    assert found.tolist() == pytest.approx([1.9, 1.0, 2.0])


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("<reason> sharp,\nred </reason><answer>Yes.</answer>", ("sharp,\nred", True)),
        ("<reason>a</reason><answer>yes</answer> wait <reason>b</reason><answer> NO </answer>", ("b", False)),
        ("<answer>yes</answer>", None),
        ("<reason> </reason><answer>yes</answer>", None),
        ("<reason>a</reason><answer>yes and no</answer>", None),
        ("<reason>a</reason> yes", None),
    ],
)
def test_reasons_and_verdict_are_read_or_refused(reply, found):
    if found:
        assert read_reasons(reply) == found
    else:
        with pytest.raises(ReplyError, match="reply has no <"):
            read_reasons(reply)


def test_a_listener_shapes_the_verdict():
    """Of a dark, a grey and a light image; the listener is told the reasons, sees the image, not the verdict."""

    def reason(body):
        dark = shades(body)[0] < 0.3
        return said(f"<reason>{'too dark' if dark else 'well lit'}</reason><answer>{'no' if dark else 'yes'}</answer>")

    def listen(body):
        return listened(0.1 if "too dark" in texts(body) else 0.2 + 0.7 * (shades(body)[0] > 0.9))

    with endpoint(reason) as (first, asked), endpoint(listen) as (second, heard):
        scores = built("listener", first, listener={"url": second, "model": "other", "backoff": 0})(MEDIA, ["lamp"] * 3)
    assert scores.values.tolist() == pytest.approx([0.05, 0.5 + 0.1, 0.5 + 0.45])
    assert scores.parts["verdict"].tolist() == [0, 1, 1]
    assert scores.parts["agreement"].tolist() == pytest.approx([0.9, 0.2, 0.9])
    assert len(asked) == len(heard) == 4
    assert all("lamp" in texts(body) and "<answer>" not in texts(body) for body in heard[1:])
    assert {body["model"] for body in heard} == {"other"}


def test_one_judge_may_listen_to_itself_and_what_it_does_not_say_is_missing():
    def answer(body):
        if "logprobs" in body:
            return said("Yes", SURE) if "fine" in texts(body) else said("Well", {"Well": -0.1, "So": -3.0})
        prompt = texts(body).split('"')[1] if '"' in texts(body) else ""
        replies = {
            "good": "<reason>fine</reason><answer>yes</answer>",
            "lost": "<reason>odd</reason><answer>no</answer>",
        }
        return said(replies.get(prompt, "I like it."))

    with endpoint(lambda body: said("Yes", SURE) if "gray?" in texts(body) else answer(body)) as (url, _):
        scores = built("listener", url)(MEDIA[:1].expand(4, -1, -1, -1), ["good", "lost", "mute", " "])
    assert scores.values[0].item() == pytest.approx(0.5 + 0.5 * 0.75)
    assert scores.values.isnan().tolist() == [False, True, True, True]
    for index, words in enumerate(["none of Yes/No", "no <reason>", "the prompt is empty"], 1):
        assert words in scores.reasons[index]


def test_what_a_judge_cannot_do_is_said_when_the_reward_is_built(tmp_path):
    with endpoint(lambda body: said("Yes")) as (url, _):
        with pytest.raises(RewardError, match=r"'listener': listener: .*returns no log-probabilities"):
            built("listener", url)
        built("deeptrace", url)
        with pytest.raises(RewardError, match="'listener': no folder"):
            built("listener", url, listener={"kind": "local", "model": str(tmp_path / "none")})


def test_local_judges_write_and_listen(tmp_path):
    """Random weights say nothing that can be read; the reward is there, without gradient, and says so."""
    model = {"kind": "local", "model": str(save(tmp_path, "Qwen3VL")), "dtype": "float32"}
    for kind, said_so in (("listener", "no <reason>"), ("deeptrace", "no REAL or FAKE")):
        reward = rewards.parse({"kind": kind, "judge": model, "longest": 4}).build()
        assert not reward.differentiable
        assert reward.fingerprint()
        scores = reward(MEDIA[:2], ["a", "b"])
        assert scores.values.isnan().all()
        assert said_so in scores.reasons[1]


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("FAKE. The video is AI-generated. The unnatural part is at [8, 2, 16, 6] starting 1.5 seconds. The reason is "
         "because the leg bends.", (True, (8, 2, 16, 6), 1.5)),
        ("**Fake** <explanation>[blur]</explanation> <start_time> 2 </start_time>", (True, None, 2)),
        ("real", (False, None, None)),
    ],
)  # fmt: skip
def test_both_published_formats_are_read(reply, found):
    assert read_fakeness(reply) == found
    with pytest.raises(ReplyError, match="no REAL or FAKE"):
        read_fakeness(f"I think: {reply}")


def test_grounding_beyond_the_video_is_missing():
    inside = read("FAKE [8, 2, 16, 6] starting at 1.5", 16, 8, 2.0)
    assert inside == [0, 0.5, 0.25, 1, 0.75, 1.5]
    for reply in (
        "FAKE [8, 2, 17, 6]",
        "FAKE [8, 6, 16, 2]",
        "FAKE [-1, 2, 16, 6] starting 2.1",
        "FAKE",
        "REAL [8, 2, 16, 6]",
    ):
        score, *grounding = read(reply, 16, 8, 2.0)
        assert score == (reply[0] == "R")
        assert all(math.isnan(value) for value in grounding)


def test_a_video_that_gives_itself_away():
    """Four frames of twelve, each behind its time; an image has no time; who does not decide has no score."""

    def answer(body):
        shade = shades(body)[0] if shades(body) else 1.0
        if shade > 0.9:
            return said("Hard to say.")
        return said(
            "FAKE <coordinates>[3, 2, 6, 8]</coordinates> <start_time>0.5</start_time>" if shade < 0.3 else "REAL"
        )

    videos = MEDIA[:, None].expand(-1, 12, -1, -1, -1)
    with endpoint(answer) as (url, seen):
        reward = built("deeptrace", url, frames=4, fps=8, judge={"parallel": 1})
        scores, still = reward(videos, ["", "a", "b"]), reward(MEDIA, ["a"] * 3)
    assert scores.values[:2].tolist() == still.values[:2].tolist() == [0, 1]
    assert scores.values[2].isnan()
    assert "'Hard to say.'" in scores.reasons[2]
    box = [scores.parts[name][0].item() for name in ("x0", "y0", "x1", "y1", "start")]
    assert box == [0.25, 0.25, 0.5, 1.0, 0.5]
    assert scores.parts["start"][1].isnan()
    assert texts(seen[1]).startswith("0.12 s: 0.50 s: 0.88 s: 1.25 s: Was this video")
    assert "pixels of 12 x 8" in texts(seen[1])
    assert texts(seen[4]).startswith("Was this image")
