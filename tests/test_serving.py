"""Reward servers and their clients under bad luck: drips, stops, floods, clients that leave, rewards that exit."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from alignflow.errors import ConfigError

pytest.importorskip("fastapi", reason="the reward server needs: pip install 'alignflow[serve]'")

import served
from pydantic import ValidationError

import rewards
from align.runs.stopping import GracefulStop
from alignflow import waiting
from rewards.base import Reward, RewardError
from rewards.judges.models import Endpoint
from rewards.serving import wire
from rewards.serving.batcher import PIECE, Batcher, ClosingError
from rewards.serving.dispatch import Dispatcher, UnansweredError
from rewards.serving.fetch import fetch, open_session
from rewards.serving.limits import Limits
from rewards.serving.server import create_app, serve

MEDIA = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 65536\r\n\r\n"


def requested(count: int = 1, side: int = 8) -> wire.Request:
    return wire.Request(torch.zeros(count, 3, side, side), ["a"] * count)


@pytest.fixture(autouse=True)
def no_stop() -> Iterator[None]:
    yield
    waiting.forget_stop()


# -- clients --------------------------------------------------------------------------------------------------------

DRIPS = {
    "silence": [],
    "a byte at a time": [HEAD, *[b"x"] * 1000],
    "a header at a time": [b"HTTP/1.1 200 OK\r\n", *[b"X-A: 1\r\n"] * 90],
    "a chunk at a time": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[b"1\r\nx\r\n"] * 1000],
    "half a status line": [b"HTTP/1.1", *[b" "] * 1000],
}


@pytest.mark.parametrize("how", DRIPS)
def test_one_deadline_for_the_whole_exchange(how: str) -> None:
    with served.answering(*DRIPS[how], every=0.1) as url:
        session, started = open_session(url, 1), time.monotonic()
        with pytest.raises(UnansweredError, match=r"took more than 0.5 s") as found:
            fetch(session, "GET", url, 0.5)
        assert time.monotonic() - started < 1.5
        assert found.value.again
    for _ in range(100):
        if not any(thread.name == "fetch" for thread in threading.enumerate()):
            break
        time.sleep(0.05)
    assert not any(thread.name == "fetch" for thread in threading.enumerate())  # the connection was cut


def test_a_stop_ends_waiting() -> None:
    """One SIGTERM under a run, any Ctrl-C elsewhere."""
    with served.answering(HEAD, every=0.1) as url:
        session = open_session(url, 1)
        ask = Dispatcher(lambda part: fetch(session, "GET", url, 60), 4, 5, 1.0)
        for number, context, limit in (
            (signal.SIGTERM, GracefulStop(lambda line: None), waiting.GRACE + 1.5),
            (signal.SIGINT, contextlib.nullcontext(), 1.5),
        ):
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt), context:
                ask.each([0] * 8, lambda part, why: why)
            assert 0.25 <= time.monotonic() - started < limit


def test_a_pause_between_attempts_ends_at_a_stop() -> None:
    threading.Timer(0.2, waiting.ask_to_stop).start()
    started = time.monotonic()
    with pytest.raises(waiting.Stopped):
        waiting.pause(30)
    assert time.monotonic() - started < 2


def test_a_server_may_ask_for_more_patience_and_4xx_is_final() -> None:
    said = b'{"error": "busy"}'
    length = f"Content-Length: {len(said)}\r\nConnection: close\r\n\r\n".encode() + said
    for head, again, after in (
        (b"HTTP/1.1 503 No\r\nRetry-After: 7\r\n", True, 7.0),
        (b"HTTP/1.1 400 Bad\r\nRetry-After: 0\r\n", True, 0.0),
        (b"HTTP/1.1 400 Bad\r\n", False, 0.0),
        (b"HTTP/1.1 413 Large\r\n", False, 0.0),
        (b"HTTP/1.1 500 No\r\n", True, 0.0),
    ):
        from rewards.wrappers.remote import Client, Remote

        with served.answering(head + length) as url, pytest.raises(UnansweredError, match="busy") as found:
            Client(Remote(url=url)).call("GET", "/reward")
        assert (found.value.again, found.value.after) == (again, after)


@pytest.mark.parametrize(
    "change",
    [
        {"values": ["0.5", 0.5]},
        {"values": [True, 0.5]},
        {"values": [1e400, 0.5]},
        {"values": [float("nan"), 0.5]},
        {"values": [[0.5], 0.5]},
        {"reasons": {"2": "why"}},
        {"reasons": {"-1": "why"}},
        {"reasons": {"0": 3}},
        {"parts": {"a": [0.5]}},
        {"parts": {"a": [0.5, "1"]}},
        {"more": 1},
    ],
)
def test_replies_are_read_strictly(change: dict) -> None:
    asked = requested(2)
    good = {"schema": wire.SCHEMA, "id": asked.id, "fingerprint": "f", "values": [0.5, None],
            "reasons": {"1": "blind"}, "parts": {}}  # fmt: skip
    found = wire.unpack_scores(json.dumps(good).encode(), asked, "f")
    assert (found.values[0].item(), found.reasons) == (0.5, {1: "blind"})
    with pytest.raises(wire.WireError):
        wire.unpack_scores(json.dumps({**good, **change}).encode(), asked, "f")


@pytest.mark.parametrize(
    "url",
    ["http://user:PASS@host", "http://user@host:1/v1", "http://host/?key=PASS", "http://host#PASS", "http://[::1", "ftp://x",
     "http://", "http://a b", "http://host:99999", "host:80", "http://\x1b[31m"],
)  # fmt: skip
def test_addresses_carry_no_secrets(url: str) -> None:
    with pytest.raises(ValidationError) as found:
        rewards.parse({"kind": "remote", "url": url})
    assert "PASS" not in found.value.errors(include_input=False)[0]["msg"]
    with pytest.raises(ConfigError, match=r"^url \(Endpoint\): ") as refused:
        Endpoint(url=url, model="m")
    assert "PASS" not in str(refused.value)


def test_what_a_server_says_is_safe_to_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret-token")
    said = json.dumps({"error": "\x1b[31mno\x1b]0;title\x07 for s3cret-token"}).encode()
    reply = b"HTTP/1.1 422 No\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(said) + said
    with served.answering(reply) as url, pytest.raises(RewardError) as found:
        rewards.parse({"kind": "remote", "url": url, "token_env": "TOKEN", "retries": 0}).build()
    assert re.match(r"no for \*\*\* \(at http", str(found.value))
    judge = {"url": url + "/v1", "model": "m", "token_env": "TOKEN", "retries": 0}
    with served.answering(reply) as url, pytest.raises(RewardError, match=r"no for \*\*\*"):
        rewards.parse({"kind": "yes_probability", "judge": {**judge, "url": url + "/v1"}}).build()


def test_tokens_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("a\nb", "é", " a"):
        monkeypatch.setenv("TOKEN", token)
        with pytest.raises(RewardError, match="holds characters that no HTTP header can carry"):
            open_session("http://127.0.0.1", 1, "TOKEN")


# -- whose turn it is -----------------------------------------------------------------------------------------------


class Gate:
    """A reward whose calls wait for :attr:`go`, and a list of what it was asked."""

    def __init__(self, scope: str = "sample") -> None:
        self.go, self.begun, self.asked = threading.Event(), threading.Event(), []
        self.reward = Reward("gate", self.score, scope=scope)  # type: ignore[arg-type]

    def score(self, media, prompts, group):
        self.asked.append(list(prompts))
        self.begun.set()
        assert self.go.wait(20)
        if "exit" in prompts:
            raise SystemExit(3)
        if "interrupt" in prompts:
            raise KeyboardInterrupt
        return [float(len(prompt)) for prompt in prompts]


def of(*prompts: str) -> wire.Request:
    return wire.Request(torch.zeros(len(prompts), 3, 4, 4), list(prompts))


def held(gate: Gate, **options) -> Batcher:
    """A batcher that is scoring ``first``."""
    batcher = Batcher(gate.reward, options.pop("size", 1), 0, **options)
    batcher.submit(of("first"), "other")
    assert gate.begun.wait(10)
    return batcher


def test_clients_take_turns() -> None:
    gate = Gate()
    batcher = held(gate)
    flood = [batcher.submit(of(f"a{i}"), "a") for i in range(5)]
    late = batcher.submit(of("b0"), "b")
    gate.go.set()
    assert late.result(10).values.tolist() == [2.0]
    assert [future.result(10).values.item() for future in flood] == [2.0] * 5
    assert [prompt for (prompt,) in gate.asked] == ["first", "a0", "b0", "a1", "a2", "a3", "a4"]


def test_a_large_request_is_scored_in_pieces_and_in_order() -> None:
    gate = Gate()
    batcher = held(gate, size=2)
    large = batcher.submit(of(*[f"{'x' * i}" for i in range(1, 8)]), "a")
    small = batcher.submit(of("b"), "b")
    gate.go.set()
    assert large.result(10).values.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert small.result(10).values.tolist() == [1]
    assert max(map(len, gate.asked)) == 2
    turn = next(number for number, prompts in enumerate(gate.asked) if "b" in prompts)
    assert turn <= 2  # of five calls: not behind the whole large one
    assert PIECE >= 4096 * 4096  # an image of that size is one piece


def test_what_must_be_scored_as_one_is_not_cut() -> None:
    gate = Gate("group")
    gate.go.set()
    batcher = Batcher(gate.reward, 2, 0)
    assert batcher.submit(of(*"abcde")).result(10).values.tolist() == [1] * 5
    assert gate.asked == [list("abcde")]


def test_nobody_scores_for_those_who_left() -> None:
    gate = Gate()
    batcher = held(gate)
    gone = [batcher.submit(of(f"gone{i}")) for i in range(5)]
    stays = batcher.submit(of("stays"))
    for future in gone:
        future.cancel()
    gate.go.set()
    assert stays.result(10).values.tolist() == [5.0]
    assert gate.asked == [["first"], ["stays"]]
    assert batcher.waiting == 0


def test_a_client_that_hangs_up_is_noticed() -> None:
    gate = Gate()
    app = create_app(rewards.parse("shapes"), gate.reward, batch=1, window=0)
    with serving(app) as url:
        body = wire.pack(of("first"), "npz")
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        port = int(url.rsplit(":", 1)[1])
        waits = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        for one in waits:
            one.sendall(head + body)
        until = time.monotonic() + 10
        assert gate.begun.wait(10)
        while app.state.batcher.waiting < 4 and time.monotonic() < until:
            time.sleep(0.02)
        for one in waits:
            one.close()
        while app.state.batcher.waiting and time.monotonic() < until:
            time.sleep(0.02)
        gate.go.set()
        assert post(url, wire.pack(of("new"), "npz"))[0] == 200
    assert gate.asked == [["first"], ["new"]]


@pytest.mark.parametrize("prompt", ["exit", "interrupt"])
def test_a_reward_that_exits_costs_its_own_request(prompt: str) -> None:
    gate = Gate()
    gate.go.set()
    app = create_app(rewards.parse("shapes"), gate.reward)
    with serving(app) as url:
        status, said, _ = post(url, wire.pack(of(prompt), "npz"))
        assert status == 500
        assert "gate" in said["error"]
        assert post(url, wire.pack(of("fine"), "npz"))[1]["values"] == [4.0]
        with urllib.request.urlopen(f"{url}/health") as reply:
            health = json.load(reply)
    assert health["status"] == "ok"
    assert "gate" in health["last_error"]


def test_a_full_queue_says_when_to_come_back() -> None:
    gate = Gate()
    app = create_app(rewards.parse("shapes"), gate.reward, batch=1, limits=Limits(waiting=1))
    with serving(app) as url:
        app.state.batcher.submit(of("first"))
        status, said, headers = post(url, wire.pack(of("second"), "npz"))
        gate.go.set()
    assert status == 503
    assert "waiting already" in said["error"]
    assert int(headers["Retry-After"]) > 0


def test_health_tells_of_long_work_and_of_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.serving.server.LONG", 0.05)
    gate = Gate()
    app = create_app(rewards.parse("shapes"), gate.reward, batch=1)
    waits = app.state.batcher.submit(of("first"))
    assert gate.begun.wait(10)
    time.sleep(0.1)
    with serving(app) as url:
        with urllib.request.urlopen(f"{url}/health") as reply:
            found = json.load(reply)
        assert (found["status"], found["waiting"]) == ("busy", 1)
        app.state.batcher.close()
        with pytest.raises(ClosingError):
            waits.result(1)
        with pytest.raises(urllib.error.HTTPError) as failing:
            urllib.request.urlopen(f"{url}/health")
        assert failing.value.code == 503
    gate.go.set()


def test_the_queue_counts_what_waits() -> None:
    gate = Gate()
    batcher = held(gate, waiting=2)
    batcher.submit(of("second"))
    with pytest.raises(queue.Full):
        batcher.submit(of("third"))
    gate.go.set()


# -- what one request may ask ---------------------------------------------------------------------------------------


def zeros(*shape: int) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, media=np.zeros(shape, np.float32))
    packed = base64.b64encode(file.getvalue()).decode()
    return json.dumps({"schema": wire.SCHEMA, "id": "1", "prompts": ["a"] * shape[0], "npz": packed}).encode()


def test_limits_are_checked_before_anything_is_scored() -> None:
    calls: list[int] = []
    reward = Reward("counts", lambda media, prompts, group: calls.append(1) or [0.0] * len(prompts))
    limits = Limits(samples=8, pixels=4096, total=3 * 4096)
    app = create_app(rewards.parse("shapes"), reward, limits=limits)
    image = wire.pack(wire.Request(MEDIA[:1], ["a"]), "png")
    many = json.loads(image)
    tiny = {**many, "prompts": ["a"], "png": {"media": [many["png"]["media"] * 129]}}
    for body, said in (
        (zeros(1, 3, 64, 65), "64 x 65 are more than this server takes: 4096 pixels an image"),
        (zeros(4, 3, 64, 64), "more than 12288 pixels in one request"),
        (zeros(1, 4, 3, 64, 64), "more than 12288 pixels in one request"),
        (zeros(9, 3, 4, 4), "9 samples are more than the 8"),
        (json.dumps(tiny).encode(), "more than 128 images and frames|more than 12288 pixels"),
    ):
        status, answer = served.asked(app, body)
        assert status == 400
        assert re.search(said, json.loads(answer)["error"])
    assert calls == []
    assert served.asked(app, zeros(3, 3, 64, 64))[0] == 200
    assert served.asked(create_app(rewards.parse("shapes"), reward), zeros(1, 3, 3000, 3000))[0] == 400


def test_a_request_that_drips_in_is_ended() -> None:
    app = create_app(rewards.parse("shapes"), Gate().reward, limits=Limits(arrival=0.3))
    with serving(app) as url, socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 10) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert b"408" in slow.recv(100)


# -- the process ----------------------------------------------------------------------------------------------------


def test_half_open_connections_keep_nobody_out() -> None:
    with process("flaky:judge", "--window", "0", descriptors=256) as (url, server):
        port = int(url.rsplit(":", 1)[1])
        silent = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(300)]
        started = time.monotonic()
        assert post(url, wire.pack(of("a"), "npz"))[0] == 200
        assert time.monotonic() - started < 5
        for one in silent:
            one.close()
    assert server.stderr is not None
    assert server.stderr.read() == b""


def test_sigterm_ends_the_server_while_it_works() -> None:
    with process("flaky:endless", "--grace", "1") as (url, server):
        answers: list[int] = []
        ask = threading.Thread(target=lambda: answers.append(post(url, wire.pack(of("work"), "npz"))[0]))
        ask.start()
        time.sleep(1)
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        server.wait(10)
        assert time.monotonic() - started < 5
        ask.join(5)
    assert answers == [503]
    assert server.stderr is not None
    assert b"Traceback" not in server.stderr.read()


def test_a_device_that_is_not_there() -> None:
    for device in ("cuda:99", "banana", "meta"):
        with pytest.raises(RewardError, match=f"device: .*{device}"):
            serve(rewards.parse("shapes"), device=device)


@contextlib.contextmanager
def serving(app) -> Iterator[str]:
    """An application in a thread of this process."""
    import uvicorn

    port = served.free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@contextlib.contextmanager
def process(reward: str, *options: str, descriptors: int = 1024) -> Iterator[tuple[str, subprocess.Popen]]:
    """``alignflow reward serve`` in a process of its own."""
    command = [sys.executable, "-m", "align.cli", "reward", "serve", reward, "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "FLAKY": "/none"}
    limited = ["prlimit", f"--nofile={descriptors}", *command]
    server = subprocess.Popen(limited, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert server.stdout is not None
        line = server.stdout.readline().decode()
        yield re.search(r"http://\S+:\d+", line)[0], server  # type: ignore[index]
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(15)
        server.kill()


def post(url: str, body: bytes):
    """(status, JSON, headers) of a request to /score."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/score", body)) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def test_the_line_of_a_server_names_its_model():
    said = []

    class StopError(Exception):
        pass

    def say(line: str) -> None:
        said.append(line)
        raise StopError

    with pytest.raises(StopError):
        serve(rewards.parse("clip"), port=0, say=say)
    assert said[0].startswith("serving clip (model shapes) on http://127.0.0.1:")
