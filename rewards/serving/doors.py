"""Server connections, limited in number and idle time, so that slow clients block nobody."""

from __future__ import annotations

import contextlib
import os
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVE = 112
"""Descriptors left for files, the interpreter and connections that are accepted before they can be counted."""
BACKLOG = 16
"""Connections accepted in one turn of the loop."""


def most_connections(wanted: int = 1024) -> int:
    """As many as wanted, or as descriptors allow."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 32
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - used - RESERVE))


class Door(H11Protocol):
    """A connection that is cut when it is silent, slow to send or slow to read for longer than it may be.

    The clock runs while the client has to do something, not while its request is being scored. Where there are too
    many connections, the one that has been silent for longest is cut for the new one.
    """

    limit = 1024
    patience = 10.0
    arrival = 60.0

    def connection_made(self, transport: Any) -> None:
        """Make room, then continue as usual."""
        self.since, self.phase = self.loop.time(), "silent"
        super().connection_made(transport)
        there = [one for one in self.connections if isinstance(one, Door) and one.phase != "cut"]
        if len(there) > self.limit:
            silent = [one for one in there if one is not self and one.phase == "silent"]
            min(silent, key=lambda one: one.since, default=self).cut()
        self.watch = self.loop.call_later(self.patience, self.check)

    def cut(self) -> None:
        """End the connection now; it stays among :attr:`connections` until the loop has seen to it."""
        self.phase = "cut"
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self.watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Note a request that has begun or ended."""
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """The client's turn again."""
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        cycle = self.cycle
        if self.phase == "cut":
            return
        if cycle is None or cycle.response_complete:
            phase = "silent"
        elif cycle.more_body:
            phase = "sending"
        else:
            phase = "reading" if cycle.response_started else "served"
        if phase != self.phase:
            self.since, self.phase = self.loop.time(), phase

    def check(self) -> None:
        """Cut the connection where it is the client's turn for too long; look again later."""
        self._note()
        allowed = {"silent": self.patience, "served": float("inf")}.get(self.phase, self.arrival)
        if self.loop.time() - self.since >= allowed:
            self.cut()
        else:
            self.watch = self.loop.call_later(min(self.patience, 1.0), self.check)


def doors(limit: int, patience: float, arrival: float) -> type[Door]:
    """The class of a server's connections, with these bounds."""
    return type("BoundedDoor", (Door,), {"limit": limit, "patience": patience, "arrival": arrival})


class BoundedServer(uvicorn.Server):
    """uvicorn's server, which answers waiting requests within its grace period.

    Args:
        grace: seconds that work in progress has after SIGTERM or SIGINT.
        close: answers whatever still waits.
    """

    def __init__(self, config: uvicorn.Config, grace: float, close: Any) -> None:
        super().__init__(config)
        self.grace, self.close = grace, close

    async def startup(self, sockets: Any = None) -> None:
        """As usual; the kernel may queue more connections than are accepted in one turn."""
        await super().startup(sockets)
        for listener in sockets or ():
            with contextlib.suppress(OSError):
                listener.listen(1024)

    async def shutdown(self, sockets: Any = None) -> None:
        """Within the grace and a second."""
        import asyncio

        timer = asyncio.get_running_loop().call_later(self.grace, self.close)
        await super().shutdown(sockets)
        timer.cancel()
