"""Judges behind an OpenAI-compatible server: exact scores from its replies, and whatever else it may reply."""

from __future__ import annotations

import base64
import io
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import endpoint, said

import rewards
from rewards.base import RewardError

KEY = "sk-very-secret"
MEDIA = torch.stack([torch.full((3, 8, 12), value) for value in (0.0, 0.4, 1.0)])
SURE = {"Yes": math.log(0.5), " yes": math.log(0.1), "No": math.log(0.2), "Well": math.log(0.05)}


def shades(body):
    """Mean of every image of a request, in [0, 1], in order."""
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            png = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))
            found.append(float(np.asarray(Image.open(io.BytesIO(png))).mean() / 255))
    return found


def texts(body):
    return "".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


def probe(body):
    return "Is this picture gray?" in texts(body)


def built(kind, url, judge=None, **options):
    made = {"kind": "endpoint", "url": url, "model": "judge-7b", "backoff": 0, "retries": 1, **(judge or {})}
    return rewards.parse({"kind": kind, "judge": made, **options}).build()


def test_yes_probability_and_what_is_sent(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with endpoint(lambda body: said("Yes", SURE)) as (url, seen):
        reward = built("yes_probability", url, {"token_env": "JUDGE_KEY", "extra": {"seed": 3}})
        assert not reward.differentiable
        scores = reward(MEDIA.clone().requires_grad_(), ["Füße 東京 🦊"] * 3)
    assert scores.values.tolist() == pytest.approx([0.75] * 3)
    assert scores.parts["answered"].tolist() == pytest.approx([0.8] * 3)
    sent = seen[1:]
    assert sorted(shades(body)[0] for body in sent) == pytest.approx([0, 0.4, 1])
    assert all('Does this figure show "Füße 東京 🦊"?' in texts(body) for body in sent)
    assert {(b["path"], b["model"], b["max_tokens"], b["logprobs"], b["top_logprobs"], b["temperature"], b["seed"],
             b["Authorization"]) for b in seen} == {("/v1/chat/completions", "judge-7b", 1, True, 20, 0, 3,
                                                     f"Bearer {KEY}")}  # fmt: skip


def test_digits_and_pairs():
    """The judge sees images in the order of the question: it likes light ones, and the first place a little."""

    def answer(body):
        if "one digit" in texts(body):
            return said("3", {"3": math.log(0.5), "5": math.log(0.5)})
        first, second = [*shades(body), 0.0][:2]
        p = 0.1 + 0.8 * (first > second)
        return said("1", {"1": math.log(p), "2": math.log(1 - p)})

    with endpoint(answer) as (url, _):
        assert built("digit_judge", url)(MEDIA, ["a"] * 3).values.tolist() == pytest.approx([0.8] * 3, abs=1e-6)
        scores = built("pairwise", url)(MEDIA, ["a"] * 3)
    assert scores.values.tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert scores.parts["position_bias"].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_reward_dance_takes_the_best_of_the_group_as_references():
    """The two lightest are the references, and neither is its own; the runner-up is the only one's."""

    def answer(body):
        first, second = [*shades(body), 0.0][:2]
        p = 0.9 if first > second else 0.2
        return said("Yes", {"Yes": math.log(p), "No": math.log(1 - p)})

    with endpoint(answer) as (url, seen):
        two = built("reward_dance", url)(MEDIA, ["a"] * 3)
        one = built("reward_dance", url, best=1)(MEDIA, ["a"] * 3)
        own = built("reward_dance", url, reference="image")(MEDIA, ["a"] * 3, None, {"image": MEDIA[[1, 1, 1]]})
    assert len(seen) == (1 + 6 + 4) + (1 + 6 + 3) + (1 + 3)
    assert two.values.tolist() == pytest.approx([0.2, 0.2, 0.9])
    assert one.values.tolist() == pytest.approx([0.2, 0.2, 0.9])
    assert own.values.tolist() == pytest.approx([0.2, 0.2, 0.9])


def test_paco_means_over_pairs_of_panels():
    """Two of four panels are alike: of six pairs two agree."""

    def answer(body):
        first, second = [*shades(body), -1.0][:2]
        p = 0.99 if abs(first - second) < 0.1 else 0.01
        return said("Yes", {"Yes": math.log(p), "No": math.log(1 - p)})

    image = torch.cat([torch.zeros(1, 3, 8, 6), torch.ones(1, 3, 8, 6)], 3)
    with endpoint(answer) as (url, seen):
        scores = built("paco", url)(image, ["a"])
    assert len(seen) == 1 + 6
    assert scores.values.item() == pytest.approx((2 * 0.99 + 4 * 0.01) / 6)


def test_no_log_probabilities_is_said_before_anything_is_scored():
    with endpoint(lambda body: said("Yes")) as (url, seen):
        with pytest.raises(RewardError, match=r"'yes_probability': .*returns no log-probabilities.*vLLM"):
            built("yes_probability", url)
        assert len(seen) == 1
        with pytest.raises(RewardError, match=r"'prompt_echo': .*returns no prompt_logprobs"):
            built("prompt_echo", url)


def test_later_failures_are_missing_scores_with_reasons():
    """Each of a call's samples fails its own way; the one that is answered has its score."""

    def answer(body):
        if probe(body):
            return said("Yes", SURE)
        prompt = texts(body).split('"')[1]
        return {
            "good": said("Yes", SURE),
            "wrong": said("As an AI", {"As": -0.1, "I": -3.0}),
            "bare": said("Yes"),
            "garbage": (200, b"<html>busy</html>"),
            "error": (500, {"error": {"message": "out of memory"}}),
            "long": (400, {"error": {"message": "maximum context length is 4096 tokens"}}),
            "empty": (200, {}),
        }[prompt.split()[0]]

    prompts = ["good", "wrong", "bare", "garbage", "error", "long " * 10_000, "empty", " "]
    with endpoint(answer) as (url, _):
        scores = built("yes_probability", url, {"parallel": 1})(MEDIA[:1].expand(8, -1, -1, -1), prompts)
    assert scores.values.isnan().tolist() == [False, *[True] * 7]
    for index, words in enumerate(["none of Yes/No among the 2 likeliest", "no log-probabilities", "not JSON",
                                   "out of memory", "maximum context length", "not a chat completion",
                                   "the prompt is empty"], 1):  # fmt: skip
        assert words in scores.reasons[index], scores.reasons[index]
    assert "(2 attempts)" in scores.reasons[3]


def test_a_server_that_stumbles_is_asked_again(caplog):
    stumbles = iter([False, True, False])
    with endpoint(lambda body: (503, {}) if next(stumbles, False) else said("Yes", SURE)) as (url, seen):
        reward = built("yes_probability", url)
        with caplog.at_level(logging.WARNING):
            assert reward(MEDIA[:1], ["a"]).values.item() == pytest.approx(0.75)
    assert len(seen) == 3
    assert "503" in caplog.text


def test_keys(monkeypatch, caplog):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RewardError, match="JUDGE_KEY is not set"):
        built("yes_probability", "http://127.0.0.1:9/v1", {"token_env": "JUDGE_KEY"})
    monkeypatch.setenv("JUDGE_KEY", KEY)
    refused = (401, {"error": {"message": "bad key"}})
    with endpoint(lambda body: refused) as (url, seen), caplog.at_level(logging.DEBUG):
        with pytest.raises(RewardError, match=r"401, bad key; set judge\.token_env") as error:
            built("yes_probability", url, {"token_env": "JUDGE_KEY"})
        assert len(seen) == 1
    assert KEY not in str(error.value) + caplog.text
    with pytest.raises(RewardError, match="cannot be reached"):
        built("yes_probability", "http://127.0.0.1:9/v1")


def test_prompt_echo_reads_the_replys_tokens():
    """The server counts 5 tokens before the reply; two of the reply's are in no other message."""

    def answer(body):
        if "prompt_logprobs" not in body:
            return 200, {"choices": [], "usage": {"prompt_tokens": 5}}
        assert body["continue_final_message"]
        assert body["add_generation_prompt"] is False
        assert body["messages"][1] == {"role": "assistant", "content": body["messages"][1]["content"]}
        rows = [None, *[{str(i): {"logprob": -9.0}} for i in range(4)], *[{"7": {"logprob": -p}} for p in (0.5, 1.5)]]
        return 200, {"choices": [], "prompt_logprobs": rows}

    with endpoint(answer) as (url, seen):
        scores = built("prompt_echo", url)(MEDIA[:1], ["roter Kreis "])
        assert built("prompt_echo", url, reduce="sum")(MEDIA[:1], ["a"]).values.item() == -2
    assert scores.values.item() == -1
    assert scores.parts["tokens"].item() == 2
    assert seen[3]["messages"][1]["content"] == "roter Kreis"


def test_unified_reward_formats():
    """A point brought to 0 .. 1; verdicts of pairs in both orders; thoughts that name another winner do not count."""

    def answer(body):
        if probe(body):
            return said("no")
        seen = shades(body)
        if len(seen) == 1:
            return said("Final Score: 4" if seen[0] < 0.9 else "I like it.")
        better = "Image 1 is better" if seen[0] > seen[1] else "Image 2 is better"
        other = "Image 2 is better" if seen[0] > seen[1] else "Image 1 is better"
        if "<think>" in texts(body):
            return said(f"<think>{other} at first sight</think><answer>{better}</answer>")
        return said(better)

    with endpoint(answer) as (url, _):
        point = built("unified_reward", url)(MEDIA, ["a"] * 3)
        pair = built("unified_reward", url, format="pair")(MEDIA, ["a"] * 3)
        think = built("unified_reward", url, format="think")(MEDIA, ["a"] * 3)
    assert point.values[:2].tolist() == [0.75, 0.75]
    assert point.values[2].isnan()
    assert "'I like it.'" in point.reasons[2]
    assert pair.values.tolist() == think.values.tolist() == [0.0, 0.5, 1.0]


def test_rubric_and_think_score():
    def answer(body):
        if "<think>" in texts(body):
            return said("<think>fine</think><answer>7.5</answer>" if shades(body)[0] < 0.9 else "<think>" + "x" * 200)
        return said("alignment: 5\nquality: 3\n")

    criteria = {"alignment": "as asked", "quality": "sharp"}
    with endpoint(answer) as (url, _):
        rubric = built("rubric", url, criteria=criteria, weights={"alignment": 3}, lowest=1, highest=5)
        scores, thought = rubric(MEDIA, ["a"] * 3), built("think_score", url)(MEDIA, ["a"] * 3)
        short = built("rubric", url, criteria={**criteria, "hands": "five fingers"})(MEDIA, ["a"] * 3)
    assert scores.values.tolist() == pytest.approx([0.75 * 1 + 0.25 * 0.5] * 3)
    assert scores.parts["quality"].tolist() == pytest.approx([0.5] * 3)
    assert thought.values[:2].tolist() == [0.75, 0.75]
    assert repr("<think>" + "x" * 73) in thought.reasons[2]
    assert short.values.isnan().all()
    assert "'hands'" in short.reasons[0]


def test_video_judge_looks_where_it_wants():
    """Frames 3 and 7 of 8 at first; frame 8 when asked for; then it must answer. A video of one frame is answered."""

    def answer(body):
        seen = shades(body)
        if "<select>" not in texts(body).split("What you wrote")[0]:
            return said(f"<answer>{len(seen)}</answer>")
        if len(seen) == 2:
            return said("<think>the end?</think><select>8, 7</select>")
        return said("<select>99</select>")

    video = (torch.arange(8.0) / 8).view(1, 8, 1, 1, 1).expand(1, 8, 3, 8, 8)
    with endpoint(answer) as (url, seen):
        scores = built("video_judge", url, frames=2, rounds=1)(video, ["a"])
        assert scores.values.item() == pytest.approx(0.3)
        assert scores.parts["frames"].item() == 3
        assert shades(seen[1]) == pytest.approx([2 / 8, 6 / 8], abs=0.01)
        assert shades(seen[2]) == pytest.approx([2 / 8, 6 / 8, 7 / 8], abs=0.01)
        assert "the end?" in texts(seen[2])
        lost = built("video_judge", url, frames=2, rounds=2)(video, ["a"])
        assert "no frame of 1 to 8" in lost.reasons[0]
        for one in (video[:, :1], video[:, 0]):
            assert built("video_judge", url, frames=2)(one, ["a"]).values.item() == pytest.approx(0.1)


def test_the_kind_of_a_judge_may_be_left_out():
    judges = [{"url": "http://h/v1", "model": "m"}, {"model": "a/b"}, "a/b"]
    made = [rewards.parse({"kind": "rubric", "judge": judge}).judge for judge in judges]
    assert [judge.kind for judge in made] == ["endpoint", "local", "local"]
    assert made[1] == made[2]


def test_settings_that_contradict_themselves():
    for bad, words in (
        ({"kind": "paco", "rows": 1, "columns": 1}, "nothing to be consistent with"),
        ({"kind": "digit_judge", "lowest": 5, "highest": 5}, "should be below"),
        ({"kind": "rubric", "weights": {"hands": 1}}, "criteria that are not there: hands"),
        (
            {"kind": "yes_probability", "judge": {"kind": "endpoint", "url": "localhost", "model": "m"}},
            "an address of a server",
        ),
        (
            {"kind": "yes_probability", "judge": {"kind": "endpoint", "url": "http://u:p@h/v1", "model": "m"}},
            "token_env",
        ),
        (
            {"kind": "yes_probability", "judge": {"kind": "remote"}},
            "no such judge remote; there are local",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            rewards.parse(bad)
