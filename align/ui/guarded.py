"""A server on this machine alone: a token in every request, no other host's pages, errors as the reader sees them."""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from alignflow.errors import AlignflowError, ConfigError

HOSTS = ("127.0.0.1", "localhost")
ALONE = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; "
PROTECTION = {
    "Content-Security-Policy": f"{ALONE}img-src 'self'; media-src 'self'; connect-src 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of a page: it loads nothing from elsewhere and tells nobody its address, which holds the token."""
INLINED = PROTECTION | {"Content-Security-Policy": f"{ALONE}img-src data:"}
"""Headers of a self-contained page, such as a report."""


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>alignflow</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 60ch; padding: 0 20px }
p { overflow-wrap: anywhere }
</style>
"""


def guard(token: str, port: int, command: str) -> Callable[[Request], None]:
    """Refuses requests without the token, and those that a page of another host lets a browser send to this one."""
    known = {f"{name}:{port}" for name in HOSTS}

    def allowed(request: Request) -> None:
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        given = header or request.query_params.get("token", "")
        origin = request.headers.get("Origin")
        if request.headers.get("Host", "") not in known:
            raise HTTPException(403, f"only pages of {' or '.join(sorted(known))} are answered")
        if origin is not None and origin.removeprefix("http://") not in known:
            raise HTTPException(403, "pages of other sites are not answered")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, f"the token is missing or wrong: open the address that {command} printed")

    return allowed


async def explained(request: Request, error: Exception) -> Response:
    """An error: JSON for a page's script, a page where a person opened the address."""
    status, said = (error.status_code, str(error.detail)) if isinstance(error, HTTPException) else (500, str(error))
    if "text/html" not in request.headers.get("Accept", ""):
        return JSONResponse({"error": said}, status)
    return HTMLResponse(f"{_HEAD}<p>{escape(said)}</p></html>", status, headers=PROTECTION)


def protected(token: str, port: int, command: str) -> FastAPI:
    """An application without routes that answers this machine's pages alone.

    Args:
        token: what every request must carry, as a header ``Authorization: Bearer`` or in the query.
        port: of the server, for the check of the headers ``Host`` and ``Origin``.
        command: that printed the address, for messages.
    """
    allowed = [Depends(guard(token, port, command))]
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=allowed)
    app.exception_handler(HTTPException)(explained)
    app.exception_handler(AlignflowError)(explained)
    return app


@contextmanager
def listening(port: int) -> Iterator[tuple[socket.socket, int]]:
    """A socket on this machine and its port.

    Args:
        port: 0 = any free one.

    Raises:
        ConfigError: the port is taken; names one that is free.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOSTS[0], port))
            listener.listen()
        except OSError as error:
            other = next((one for one in range(port + 1, min(port + 100, 65536)) if _free(one)), 0)
            raise ConfigError(f"cannot listen on {HOSTS[0]}:{port}: {error.strerror}; try --port {other}") from None
        yield listener, listener.getsockname()[1]


def run(make: Callable[[str, int], FastAPI], port: int, about: str, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Args:
        make: builds the application from its token and port.
        about: what is served, for the terminal.
        say: prints a line as it is, with the token.

    Raises:
        ConfigError: the port is taken.
    """
    token = secrets.token_urlsafe(16)
    with listening(port) as (listener, chosen):
        app = make(token, chosen)
        say(f"{about} Ctrl-C ends.")
        say(f"open http://{HOSTS[0]}:{chosen}/?token={token}")
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOSTS[0], port))
        except OSError:
            return False
        return True
