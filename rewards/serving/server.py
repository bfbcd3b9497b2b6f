"""A reward behind HTTP: health, description, self-test, scoring with requests merged into batches."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from rewards.base import Reward, RewardError, RewardSettings, Scores
from rewards.digest import identity
from rewards.serving import wire

Job = tuple[wire.Request, "Future[Scores]"]


class Batcher:
    """Scores requests in a thread of its own, several at once where they come close together.

    Only requests of the same media size, for a reward that looks at each sample alone, are merged. A request that
    leaves a merged batch without some scores is scored again alone, so that nobody pays for another's samples.

    Args:
        size: samples scored at once, unless one request alone has more.
        window: seconds to wait for more once there is a request.
        waiting: requests that may wait; further ones are refused.
    """

    def __init__(self, reward: Reward, size: int, window: float, waiting: int = 256) -> None:
        self.reward, self.size, self.window = reward, size, window
        self.jobs: queue.Queue[Job] = queue.Queue(waiting)
        self.thread = threading.Thread(target=self._work, daemon=True, name="reward")
        self.thread.start()

    def submit(self, request: wire.Request) -> Future[Scores]:
        """Scores to come; raises ``queue.Full``."""
        future: Future[Scores] = Future()
        self.jobs.put_nowait((request, future))
        return future

    def _work(self) -> None:
        while True:
            jobs = [self.jobs.get()]
            if self.reward.scope == "sample":
                self._gather(jobs)
            buckets: dict[Any, list[Job]] = {}
            for job in jobs:
                if not job[1].set_running_or_notify_cancel():
                    continue
                buckets.setdefault((tuple(job[0].media.shape[1:]), *sorted(job[0].inputs)), []).append(job)
            for bucket in buckets.values():
                self._score(bucket)

    def _gather(self, jobs: list[Job]) -> None:
        until, count = time.monotonic() + self.window, len(jobs[0][0].prompts)
        while count < self.size:
            try:
                jobs.append(self.jobs.get(timeout=max(until - time.monotonic(), 0)))
            except queue.Empty:
                return
            count += len(jobs[-1][0].prompts)

    def _score(self, jobs: Sequence[Job]) -> None:
        try:
            found = self._together([request for request, _ in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0][1].set_exception(error)
                return
            found = [None] * len(jobs)
        for job, scores in zip(jobs, found, strict=True):
            if scores is None or (len(jobs) > 1 and scores.reasons):
                self._score([job])
            else:
                job[1].set_result(scores)

    def _together(self, requests: Sequence[wire.Request]) -> list[Scores | None]:
        media = torch.cat([request.media for request in requests])
        prompts = [prompt for request in requests for prompt in request.prompts]
        inputs = {name: _cat([request.inputs[name] for request in requests]) for name in requests[0].inputs}
        group = requests[0].group if len(requests) == 1 else None
        scores = self.reward(media, prompts, group, inputs)
        parts, start = [], 0
        for request in requests:
            rows = slice(start, start + len(request.prompts))
            reasons = {i - rows.start: why for i, why in scores.reasons.items() if rows.start <= i < rows.stop}
            columns = {name: column[rows] for name, column in scores.parts.items()}
            parts.append(Scores(scores.values[rows].detach().cpu(), reasons, columns))
            start = rows.stop
        return list(parts)


def _cat(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [item for value in values for item in value]


def self_test(reward: Reward, size: int = 64) -> dict[str, Any]:
    """Score two made-up pictures (clips, where pictures are refused) twice: the same must come out.

    Returns:
        ok, and what came out; a score that is missing is in ``reasons``, and is no failure by itself.
    """
    ramp = torch.linspace(0, 1, size).expand(3, size, size)
    pictures = torch.stack([ramp, ramp.flip(-1)])
    prompts = ["a red circle", "a blue square"]
    for media in (pictures, pictures[:, None].expand(-1, 9, -1, -1, -1)):
        inputs = {"image": pictures, "mask": pictures[:, :1], "metadata": [{}, {}]}
        started = time.perf_counter()
        try:
            first, second = (reward(media, prompts, None, inputs) for _ in range(2))
        except RewardError as error:
            said = str(error)
            continue
        same = torch.equal(first.values.nan_to_num(), second.values.nan_to_num())
        values = [value if index not in first.reasons else None for index, value in enumerate(first.values.tolist())]
        seconds = (time.perf_counter() - started) / 2
        return {"ok": same, "values": values, "reasons": dict(first.reasons), "seconds": seconds}
    return {"ok": False, "error": said}


def create_app(
    settings: RewardSettings,
    reward: Reward,
    token: str | None = None,
    *,
    batch: int = 32,
    window: float = 0.01,
    limit: int = 512 << 20,
) -> FastAPI:
    """The application of one reward.

    Args:
        token: what ``Authorization: Bearer`` must carry everywhere but at ``/health``; None = nothing is asked.
        batch: see :class:`Batcher`, as ``window``.
        limit: bytes a request may have, packed and unpacked.
    """
    app = FastAPI(title="alignflow reward server", docs_url=None, redoc_url=None, openapi_url=None)
    batcher = Batcher(reward, batch, window)
    fingerprint = identity(settings, reward)

    def allowed(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong")

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        status = "ok" if batcher.thread.is_alive() else "failing"
        return {"status": status, "schema": wire.SCHEMA, "reward": reward.name, "waiting": batcher.jobs.qsize()}

    @app.get("/reward", dependencies=[Depends(allowed)])
    async def about() -> Response:
        return _reply(wire.describe(reward, fingerprint))

    @app.get("/self-test", dependencies=[Depends(allowed)])
    def test() -> dict[str, Any]:
        return self_test(reward)

    @app.post("/score", dependencies=[Depends(allowed)])
    async def score(request: Request) -> Response:
        body = await _body(request, limit)
        asked = await _off(lambda: _unpacked(body, limit))
        try:
            scores = await asyncio.wrap_future(batcher.submit(asked))
        except queue.Full:
            raise HTTPException(503, "too many requests are waiting") from None
        except RewardError as error:
            raise HTTPException(422, str(error)) from None
        return _reply(wire.pack_scores(scores, asked.id, fingerprint))

    return app


async def _off(work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"the request is larger than {limit} bytes; send fewer samples at a time")
    if request.headers.get(wire.DIGEST, "") not in ("", wire.checksum(bytes(body))):
        raise HTTPException(503, "the request arrived damaged")
    return bytes(body)


def _unpacked(body: bytes, limit: int) -> wire.Request:
    try:
        return wire.unpack(body, limit)
    except wire.WireError as error:
        raise HTTPException(400, str(error)) from None


def _reply(body: bytes) -> Response:
    return Response(body, media_type="application/json", headers={wire.DIGEST: wire.checksum(body)})


def serve(
    settings: RewardSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8300,
    token: str | None = None,
    device: str = "cpu",
    batch: int = 32,
    window: float = 0.01,
    say: Callable[[str], None] = print,
) -> None:
    """Load a reward and serve it until interrupted.

    Args:
        port: 0 = any free one; what it is, is said.
        say: gets one line when the server listens.

    Raises:
        RewardError: it cannot be loaded, the port is taken, or it should listen beyond this machine without a token.
    """
    if token is None and not _loopback(host):
        raise RewardError(
            f"not listening on {host}, which others may reach, without a token; name one with --token-env"
        )
    reward = settings.build(device).fixed()
    app = create_app(settings, reward, token, batch=batch, window=window)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise RewardError(f"cannot listen on {host}:{port}: {error.strerror or error}; try --port 0") from None
        listener.listen()
        tested = self_test(reward)
        place = f"[{host}]" if ":" in host else host
        say(f"serving {reward.name} on http://{place}:{listener.getsockname()[1]}, self-test {json.dumps(tested)}")
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
