"""A reward over HTTP: health, description, self-test, scoring with requests merged into batches."""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import json
import math
import queue
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from alignflow.devices import unusable
from alignflow.text import first_line, printable
from rewards.base import Reward, RewardError, RewardExitError, RewardSettings, Scores
from rewards.digest import identity
from rewards.serving import wire
from rewards.serving.batcher import Batcher, ClosingError
from rewards.serving.doors import BACKLOG, BoundedServer, doors, most_connections
from rewards.serving.intake import Intake, busy
from rewards.serving.limits import Limits

LONG = 10.0
"""Seconds of scoring after which ``/health`` calls the server busy."""


def self_test(reward: Reward, size: int = 64) -> dict[str, Any]:
    """Score two made-up images (videos, where images are refused) twice: the same must come out.

    Returns:
        ok, and the two scores; a missing score is in ``reasons`` and is not a failure by itself.
    """

    async def ask(asked: wire.Request) -> Scores:
        return reward(asked.media, asked.prompts, asked.group, asked.inputs)

    return asyncio.run(self_test_with(ask, size))


async def self_test_with(ask: Callable[[wire.Request], Awaitable[Scores]], size: int = 64) -> dict[str, Any]:
    """:func:`self_test` of whatever ``ask`` scores with."""
    ramp = torch.linspace(0, 1, size).expand(3, size, size)
    images = torch.stack([ramp, ramp.flip(-1)])
    prompts = ["a red circle", "a blue square"]
    for media in (images, images[:, None].expand(-1, 9, -1, -1, -1)):
        inputs = {"image": images, "mask": images[:, :1], "metadata": [{}, {}]}
        started = time.perf_counter()
        try:
            first, second = [await ask(wire.Request(media, prompts, None, inputs)) for _ in range(2)]
        except (RewardError, HTTPException) as error:
            said = printable(getattr(error, "detail", error))
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
    limits: Limits | None = None,
) -> FastAPI:
    """The application of one reward; ``app.state.batcher`` scores.

    Args:
        token: what ``Authorization: Bearer`` must carry everywhere but at ``/health``; None = nothing is asked.
        batch: see :class:`~rewards.serving.batcher.Batcher`, as ``window``.
        limits: what one request may ask for.
    """
    app = FastAPI(title="alignflow reward server", docs_url=None, redoc_url=None, openapi_url=None)
    limits = limits or Limits()
    batcher = app.state.batcher = Batcher(reward, batch, window, limits.waiting)
    intake = Intake(limits)
    fingerprint = identity(settings, reward)
    app.exception_handler(HTTPException)(_explained)

    allowed = _token_check(token)

    @app.get("/health")
    async def health() -> JSONResponse:
        found = _health(batcher) | {"schema": wire.SCHEMA, "reward": reward.name}
        return JSONResponse(found, 503 if found["status"] == "failing" else 200)

    @app.get("/reward", dependencies=[Depends(allowed)])
    async def about() -> Response:
        return _reply(wire.describe(reward, fingerprint))

    @app.get("/self-test", dependencies=[Depends(allowed)])
    async def test(request: Request) -> Any:
        ask = functools.partial(_scored, batcher, request)
        return await _unless_gone(request, asyncio.ensure_future(self_test_with(ask)))

    @app.post("/score", dependencies=[Depends(allowed)])
    async def score(request: Request) -> Response:
        async with intake.body(request) as body:
            asked = await intake.read(body)
            scores = await _unless_gone(request, asyncio.ensure_future(_scored(batcher, request, asked)))
        if scores is None:
            return Response(status_code=499)  # nobody reads it
        return _reply(wire.pack_scores(scores, asked.id, fingerprint))

    return app


def _token_check(token: str | None) -> Callable[[Request], None]:
    """A dependency that refuses requests without the token."""

    def allowed(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "the token is missing or wrong")

    return allowed


async def _explained(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _scored(batcher: Batcher, request: Request, asked: wire.Request) -> Scores:
    """Scores of what a client asked for; a refusal that is its answer otherwise."""
    client = (request.client.host if request.client else "", request.headers.get(wire.CLIENT, "")[:64])
    try:
        return await asyncio.wrap_future(batcher.submit(asked, client))
    except queue.Full:
        raise busy(f"{batcher.limit} requests are waiting already") from None
    except ClosingError:
        raise busy("the server is shutting down") from None
    except RewardExitError as error:
        raise HTTPException(500, first_line(error)) from None
    except RewardError as error:
        raise HTTPException(422, printable(error)) from None
    except Exception as error:
        raise HTTPException(500, f"{type(error).__name__}: {first_line(error)}") from None


async def _unless_gone(request: Request, work: asyncio.Future[Any]) -> Any:
    """The result of ``work``, or None and ``work`` cancelled where the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        leaving.cancel()
        work.cancel()


def _health(batcher: Batcher) -> dict[str, Any]:
    """Status: ok, busy (the work under way takes longer than :data:`LONG`), failing (nothing is scored any more)."""
    since = batcher.busy_since
    seconds = 0.0 if since is None else time.monotonic() - since
    status = "ok" if seconds < LONG else "busy"
    if batcher.closed or not batcher.thread.is_alive():
        status = "failing"
    return {
        "status": status,
        "waiting": batcher.waiting,
        "scoring_for_seconds": round(seconds, 3),
        "last_error": batcher.last_error,
    }


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
    limits: Limits | None = None,
    grace: float = 10.0,
    say: Callable[[str], None] = print,
) -> None:
    """Load a reward and serve it until interrupted.

    Args:
        port: 0 = any free one, which is reported.
        limits: what one request may ask for.
        grace: seconds that work in progress has after SIGTERM or Ctrl-C.
        say: gets one line when the server listens.

    Raises:
        RewardError: the reward cannot be loaded, the device cannot be used, the port is taken, or the server should
            listen beyond this machine without a token.
    """
    if token is None and not _loopback(host):
        raise RewardError(
            f"not listening on {host}, which others may reach, without a token; name one with --token-env"
        )
    limits = limits or Limits()
    if wrong := unusable(device):
        raise RewardError(f"device: {wrong}")
    reward = settings.build(device).fixed()
    app = create_app(settings, reward, token, batch=batch, window=window, limits=limits)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        _listen(listener, host, port)
        tested = self_test(reward)
        place = f"[{host}]" if ":" in host else host
        model = getattr(settings, "model", None)
        what = f"{reward.name} (model {model})" if isinstance(model, str) else reward.name
        say(f"serving {what} on http://{place}:{listener.getsockname()[1]}, self-test {json.dumps(tested)}")
        config = uvicorn.Config(
            app,
            log_level="error",
            http=doors(most_connections(), patience=10.0, arrival=limits.arrival),
            backlog=BACKLOG,
            timeout_graceful_shutdown=math.ceil(grace) + 1,
        )
        BoundedServer(config, grace, app.state.batcher.close).run(sockets=[listener])


def _listen(listener: socket.socket, host: str, port: int) -> None:
    """Bind and listen; RewardError if the address cannot be had."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise RewardError(f"cannot listen on {host}:{port}: {why}; try --port 0") from None
    listener.listen()


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
