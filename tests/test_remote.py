"""Rewards behind HTTP: the same scores, refusals in words, and runs that outlive their servers."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the reward server needs: pip install 'alignflow[serve]'")

import served
from test_overlap import config, flaky, folder_of_flaws, model, rows  # noqa: F401
from tiny_run import final_tensors, policy_gap

import rewards
from align.training.trainer import train
from rewards.base import RewardError
from rewards.serving import wire
from rewards.serving.limits import Limits

MEDIA = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = list("aabbcc")
QUICK = {"retries": 0, "backoff": 0.01}


def remote(url, **options):
    return rewards.parse({"kind": "remote", "url": url, **QUICK, **options}).build()


def post(url, body, headers=None):
    """(status, JSON) of a request that no client of ours would make."""
    request = urllib.request.Request(f"{url}/score", body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def url():
    """The judge, in this process."""
    with served.in_thread({"kind": "flaky:judge"}, batch=8) as address:
        yield address


# -- the same scores ------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_reward_itself(url):
    here = rewards.parse("flaky:judge").build()
    for media in (MEDIA, MEDIA[:, None, :, :8].contiguous()):
        assert torch.equal(remote(url, chunk=4)(media, PROMPTS).values, here(media, PROMPTS).values)
    rounded = remote(url, payload="png")(MEDIA, PROMPTS).values
    torch.testing.assert_close(rounded, here((MEDIA * 255).round() / 255, PROMPTS).values)
    assert not torch.equal(rounded, here(MEDIA, PROMPTS).values)


def test_inputs_groups_and_parts_travel():
    settings = {"kind": "mixture", "parts": {"edit": {"reward": "flaky:edits", "normalise": "group"}}}
    inputs = {"image": MEDIA.flip(0), "metadata": [{"bonus": i} for i in range(6)]}
    asked = (MEDIA, PROMPTS, torch.tensor([0, 1, 0, 1, 0, 1]), inputs)
    here = rewards.parse(settings).build()(*asked)
    with served.in_thread(settings) as url:
        reward = remote(url, chunk=2)  # groups of three are not torn apart
        assert reward.scope == "group"
        assert set(reward.wants) == {"image", "metadata"}
        there = reward(*asked)
    torch.testing.assert_close(there.values, here.values)
    assert there.parts.keys() == here.parts.keys() == {"edit"}
    assert there.reasons == here.reasons == {}


def test_requests_that_come_together_are_scored_together():
    with served.in_thread({"kind": "flaky:counted"}, batch=6, window=0.5) as url:
        found: list[float] = []
        reward = remote(url)
        ask = lambda: found.extend(reward(MEDIA[:2], PROMPTS[:2]).values.tolist())  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [6.0] * 6


def test_one_bad_request_spoils_no_other():
    with served.in_thread({"kind": "flaky:poisoned"}, batch=8, window=0.5) as url:
        reward, found = remote(url), {}
        asked = {"good": ["a", "b"], "bad": ["a", "poison"]}
        threads = [
            threading.Thread(target=lambda n=name, p=prompts: found.update({n: reward(MEDIA[:2], p)}))
            for name, prompts in asked.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found["good"].reasons == {}
    assert found["bad"].reasons[1].startswith("ValueError: poison (flaky.py, line ")


# -- refusals -------------------------------------------------------------------------------------------------------


def test_nobody_there(url):
    with pytest.raises(RewardError, match=r"127.0.0.1:\d+ cannot be reached: Connection refused; start it with"):
        remote(f"http://127.0.0.1:{served.free_port()}")
    with pytest.raises(RewardError, match="no reward server at this address"):
        remote(f"{url}/elsewhere")


def test_tokens(monkeypatch):
    monkeypatch.setenv("RIGHT", "s3cret")
    monkeypatch.setenv("WRONG", "guess")
    with served.in_thread({"kind": "flaky:judge"}, token="s3cret") as url:
        assert len(remote(url, token_env="RIGHT")(MEDIA, PROMPTS).values) == 6
        for options in ({}, {"token_env": "WRONG"}):
            with pytest.raises(RewardError, match="token is missing or wrong; set token_env"):
                remote(url, **options)
        assert post(url, b"{}")[0] == 401
        with urllib.request.urlopen(f"{url}/health") as reply:
            assert json.load(reply)["status"] == "ok"
    with pytest.raises(RewardError, match="environment variable NOT_SET is not set"):
        remote(url, token_env="NOT_SET")


def test_beyond_this_machine_only_with_a_token():
    from rewards.serving.server import serve

    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(RewardError, match="without a token"):
            serve(rewards.parse("shapes"), host=host)


def test_another_schema_version(url, monkeypatch):
    body = json.loads(wire.pack(wire.Request(MEDIA, PROMPTS), "npz"))
    status, said = post(url, json.dumps({**body, "schema": "alignflow-reward/2"}).encode())
    assert status == 400
    assert "of schema alignflow-reward/1, and is of 'alignflow-reward/2'" in said["error"]
    original = wire.describe
    monkeypatch.setattr(wire, "describe", lambda *a: original(*a).replace(b"reward/1", b"reward/2"))
    with pytest.raises(RewardError, match="is of 'alignflow-reward/2'; run the same version at both ends"):
        remote(url)


def test_requests_that_cannot_be_read(url):
    good = json.loads(wire.pack(wire.Request(MEDIA, PROMPTS), "png"))
    small = json.loads(wire.pack(wire.Request(MEDIA[:1, :, :8], ["a"]), "png"))["png"]["media"]
    pickled = io.BytesIO()
    np.savez(pickled, media=np.array([print], dtype=object))
    none = {key: value for key, value in good.items() if key != "png"}
    mixed = {"media": good["png"]["media"][:1] + small}
    cases = {
        "one size: number 0 is 16 x 16, number 1 is 8 x 16": {**good, "png": mixed},
        "as many of each, given {'prompts': 5, 'media': 6}": {**good, "prompts": PROMPTS[:5]},
        "media as npz or as png": none,
        "no readable PNG": {**good, "png": {"media": ["AAAA"] * 6}},
        "it holds object 'media'": {**none, "npz": base64.b64encode(pickled.getvalue()).decode()},
        "the npz cannot be read": {**none, "npz": "AAAA"},
        "prompts: Field required": {key: value for key, value in good.items() if key != "prompts"},
        "is not JSON": "{",
    }
    for said, message in cases.items():
        status, answer = post(url, (message if isinstance(message, str) else json.dumps(message)).encode())
        assert status == 400, said
        assert said in answer["error"]
    status, answer = post(url, json.dumps(good).encode(), {wire.DIGEST: "0" * 64})
    assert (status, answer["error"]) == (400, "the request arrived damaged")


def test_too_large():
    with served.in_thread({"kind": "flaky:judge"}, limits=Limits(size=10_000)) as url:
        assert post(url, b"x" * 10_001)[0] == 413
        scores = remote(url)(MEDIA, PROMPTS)
        assert "larger than 10000 bytes; send fewer samples" in scores.reasons[0]
        bomb = io.BytesIO()
        np.savez_compressed(bomb, media=np.zeros((6, 3, 64, 64), np.float32))
        body = {"schema": wire.SCHEMA, "id": "1", "prompts": PROMPTS, "npz": base64.b64encode(bomb.getvalue()).decode()}
        status, answer = post(url, json.dumps(body).encode())
        assert status == 400
        assert "unpacks to" in answer["error"]


def test_a_reward_that_refuses_stops_the_run_as_it_would_here():
    with served.in_thread({"kind": "flaky:refuses"}) as url:
        reward = remote(url)
        with pytest.raises(RewardError, match="reads videos, got images"):
            reward(MEDIA, PROMPTS)


def test_a_server_with_another_reward_is_not_believed():
    port = served.free_port()
    with served.in_thread({"kind": "flaky:judge"}, port):
        reward = remote(f"http://127.0.0.1:{port}")
        assert reward(MEDIA, PROMPTS).reasons == {}
    with served.in_thread({"kind": "flaky:judge", "range": [0, 9]}, port):
        assert "the server's reward or its weights have changed" in reward(MEDIA, PROMPTS).reasons[0]
    assert "cannot be reached: Connection refused" in reward(MEDIA, PROMPTS).reasons[0]


def test_a_reply_to_another_request_is_not_believed():
    asked = wire.Request(MEDIA, PROMPTS)
    reply = wire.pack_scores(rewards.Scores(torch.zeros(6)), "another", "same")
    with pytest.raises(wire.WireError, match="another request"):
        wire.unpack_scores(reply, asked, "same")
    short = wire.pack_scores(rewards.Scores(torch.zeros(5)), asked.id, "same")
    with pytest.raises(wire.WireError, match="6 scores, and holds 5"):
        wire.unpack_scores(short, asked, "same")


def test_self_test(url):
    with urllib.request.urlopen(f"{url}/self-test") as reply:
        found = json.load(reply)
    assert found["ok"]
    assert len(found["values"]) == 2


# -- failures during a run --------------------------------------------------------------------------------------------

MANGLED = {
    "one digit": lambda body: body.replace(b"0.", b"1.", 1),
    "half": lambda body: body[: len(body) // 2],
    "not JSON": lambda body: b"<html>oops</html>",
    "empty": lambda body: b"",
}


@pytest.mark.parametrize("how", MANGLED)
def test_a_corrupted_reply_is_asked_for_again(how, url):
    here = rewards.parse("flaky:judge").build()(MEDIA, PROMPTS).values
    with served.corrupting(url, MANGLED[how], times=2) as (proxy, done):
        scores = remote(proxy, retries=2)(MEDIA, PROMPTS)
    assert len(done) == 2
    assert torch.equal(scores.values, here)
    with served.corrupting(url, MANGLED[how], times=9) as (proxy, done):
        scores = remote(proxy, retries=1, chunk=3, parallel=1)(MEDIA, PROMPTS)
    assert scores.values.isnan().all()
    assert scores.reasons[0].endswith("the reply is damaged or not from a reward server (2 attempts)")
    assert scores.reasons[5].endswith("the reply is damaged or not from a reward server")  # asked once, not waited for
    assert len(done) == 3


@pytest.fixture(scope="module")
def process(folder_of_flaws):  # noqa: F811
    """The judge in a process of its own that comes back when it dies."""
    with served.in_process("flaky:judge", folder_of_flaws) as address:
        yield address


def test_a_run_outlives_a_killed_a_hanging_and_a_corrupted_server(model, tmp_path, flaky, process):  # noqa: F811
    undisturbed = config(tmp_path / "here", model, "none")
    train(undisturbed)
    (flaky / "kill").write_text("1")
    (flaky / "hang").write_text("4")
    with served.corrupting(process, MANGLED["one digit"], times=1) as (proxy, done):
        options = {"kind": "remote", "url": proxy, "timeout": 5, "retries": 8, "backoff": 0.2, "parallel": 1}
        disturbed = config(tmp_path / "there", model, "chunks", reward=options)
        train(disturbed)
    assert done
    assert (flaky / "starts").read_text() == ".."
    assert {file.name for file in flaky.iterdir()} == {"starts"}
    assert [row["missing"] for row in rows(disturbed)] == [0, 0, 0]
    assert policy_gap(final_tensors(undisturbed), final_tensors(disturbed)) == 0


def test_a_server_that_dies_for_good_costs_the_samples_that_are_reported(model, tmp_path, flaky, process):  # noqa: F811
    """It dies in the second rollout, after two of its four requests."""
    silent = {"kind": "flaky:falls_silent", "options": {"after": 7}}
    here = config(tmp_path / "here", model, "none", reward=silent)
    train(here)
    served.wait_for(process)
    (flaky / "kill").write_text("6")
    (flaky / "stay_down").touch()
    gone = {"kind": "remote", "url": process, "timeout": 20, "retries": 1, "backoff": 0.01}
    there = config(tmp_path / "there", model, "none", reward=gone)
    train(there)
    (flaky / "stay_down").unlink()
    assert [row["missing"] for row in rows(there)] == [0, 4, 8]
    assert all(row["reasons"][0].startswith(f"{row['missing']} x {process}") for row in rows(there)[1:])
    assert policy_gap(final_tensors(here), final_tensors(there)) == 0


def test_nan_from_a_server_drops_that_sample_alone(model, tmp_path, flaky):  # noqa: F811
    runs = []
    with served.in_thread({"kind": "flaky:blinks"}) as url:
        for name, reward in {"here": {"kind": "flaky:blinks"}, "there": {"kind": "remote", "url": url}}.items():
            (flaky / "nan").write_text("1" if name == "here" else "")  # a run first tries code of its own process
            runs.append(config(tmp_path / name, model, "none", reward=reward))
            train(runs[-1])
            assert [row["missing"] for row in rows(runs[-1])] == [1, 0, 0]
            assert rows(runs[-1])[0]["reasons"] == ["1 x the reward returned nan"]
    assert policy_gap(final_tensors(runs[0]), final_tensors(runs[1])) == 0


# -- an environment of its own ----------------------------------------------------------------------------------------


def test_serving_needs_neither_diffusers_nor_transformers(tmp_path):
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'peft', 'accelerate'): sys.modules[name] = None\n"
        "from align.cli.app import main\n"
        "main(['reward', 'serve', 'shapes', '--port', '0'])\n"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving shapes on http://127.0.0.1:"), line + process.stderr.read()
        reward = remote(line.split()[3].rstrip(","), retries=3, backoff=0.5)
        assert reward.name == "shapes"
        assert reward.range == (0, 1)
        assert reward(torch.zeros(1, 3, 64, 64), ["a red circle"]).values.isfinite().all()
    finally:
        process.terminate()
        process.wait(20)
