"""Incoming requests: limited in size, time and memory, and read outside the serving loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from rewards.serving import wire
from rewards.serving.limits import Limits


def busy(why: str, seconds: int = 2) -> HTTPException:
    """503, with the seconds after which to try again."""
    return HTTPException(503, f"{why}; try again later", {"Retry-After": str(seconds)})


class Intake:
    """Bodies of requests, and the memory that they hold until they are answered."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.held = limits, 0
        self.readers = ThreadPoolExecutor(2, "read")

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, for as long as the request is being answered.

        Raises:
            HTTPException: too large (413), too slow (408), damaged (400, may be sent again), or no memory left (503).
        """
        size = self._declared(request)
        if size > self.limits.size:
            raise self._too_large()
        cost = 4 * (size or 1 << 20)  # the body, its text, the arrays in it
        if self.held and self.held + cost > self.limits.held:
            raise busy("too much is waiting")
        self.held += cost
        try:
            yield await self._whole(request)
        finally:
            self.held -= cost

    async def read(self, body: bytes) -> wire.Request:
        """The request in a body; HTTPException 400 if there is none."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.readers, wire.unpack, body, self.limits)
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from None

    def _declared(self, request: Request) -> int:
        given = request.headers.get("Content-Length", "0")
        return int(given) if given.isascii() and given.isdigit() and len(given) < 19 else 0

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request is larger than {self.limits.size} bytes; send fewer samples at a time")

    async def _whole(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.arrival):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.limits.size:
                        raise self._too_large()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {self.limits.arrival:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request ended early") from None
        if request.headers.get(wire.DIGEST, "") not in ("", wire.checksum(bytes(body))):
            raise HTTPException(400, "the request arrived damaged", {"Retry-After": "0"})
        return bytes(body)
