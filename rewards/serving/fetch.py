"""Requests to score servers: one deadline for the whole exchange, and failures in words."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from alignflow.secrets import HIDDEN, remember, shown
from alignflow.text import printable
from rewards.base import RewardError
from rewards.serving.dispatch import UnansweredError

LARGEST_REPLY = 64 << 20
"""Bytes of a reply; scores of a million samples are less."""


def open_session(url: str, parallel: int, token_env: str | None = None) -> requests.Session:
    """A session that keeps ``parallel`` connections; requests to this machine use no proxy.

    Args:
        token_env: environment variable that holds the bearer token.

    Raises:
        RewardError: the variable is not set, or its value cannot be sent.
    """
    session = requests.Session()
    session.mount("http", _Adapter(pool_maxsize=parallel))
    host = urlsplit(url).hostname or ""
    session.trust_env = not (host == "localhost" or host.startswith("127.") or host == "::1")
    if token_env is not None:
        token = os.environ.get(token_env)
        if not token:
            raise RewardError(f"environment variable {token_env} is not set")
        remember(token)
        if not token.isascii() or not token.isprintable() or token != token.strip():
            raise RewardError(f"environment variable {token_env} holds characters that no HTTP header can carry")
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def address(url: str) -> str:
    """``url`` without name, password, query and fragment, for messages."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


def readable(session: requests.Session, text: object) -> str:
    """Text of a server for people: no terminal escapes, no secrets, 500 characters at most."""
    token = str(session.headers.get("Authorization", "")).removeprefix("Bearer ")
    said = str(text)
    return printable(shown(said.replace(token, HIDDEN) if token else said), 500)


def fetch(
    session: requests.Session, method: str, url: str, timeout: float, largest: int = LARGEST_REPLY, **options: Any
) -> tuple[Any, bytes]:
    """(response, its whole body). The ``timeout`` in seconds holds for the exchange from name look-up to last byte.

    Raises:
        UnansweredError: no reply in time, no connection, or a reply of more than ``largest`` bytes.
    """
    parts = urlsplit(url)
    server = f"{parts.scheme}://" + parts.netloc.rpartition("@")[2]
    exchange = _Exchange(largest)
    arguments = (session, method, url, timeout, options)
    threading.Thread(target=exchange.run, args=arguments, daemon=True, name="fetch").start()
    try:
        in_time = exchange.done.wait(timeout)
    finally:
        exchange.end()  # also when this thread is interrupted
    if not in_time or isinstance(exchange.error, requests.Timeout):
        raise UnansweredError(f"{server} took more than {timeout:g} s")
    if isinstance(exchange.error, requests.RequestException | OSError | ValueError):
        raise UnansweredError(f"{server} cannot be reached: {readable(session, _innermost(exchange.error))}")
    if exchange.error is not None:
        raise exchange.error
    if len(exchange.content) > largest:
        raise UnansweredError(f"{server} sent a reply of more than {largest >> 20} MB", again=False)
    return exchange.reply, bytes(exchange.content)


_running = threading.local()


class _Exchange:
    """One request in its own thread. Its connection can be cut from outside, whatever it waits for."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.done = threading.Event()
        self.over = False
        self.connection: Any = None
        self.reply: Any = None
        self.content = bytearray()
        self.error: BaseException | None = None

    def run(self, session: requests.Session, method: str, url: str, timeout: float, options: dict[str, Any]) -> None:
        _running.exchange = self
        try:
            with session.request(method, url, timeout=timeout, stream=True, **options) as self.reply:
                for chunk in self.reply.iter_content(1 << 16):
                    self.content += chunk
                    if self.over or len(self.content) > self.largest:
                        break
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def end(self) -> None:
        """Cut the connection, unless the exchange is complete."""
        self.over = True
        sock = getattr(self.connection, "sock", None)
        if sock is not None and not self.done.is_set():
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own would drop its state in use


class _Noted:
    """A connection that registers itself with the exchange of its thread."""

    def connect(self) -> None:
        self._note()
        super().connect()  # type: ignore[misc]
        self._note()

    def request(self, *arguments: Any, **options: Any) -> None:
        self._note()
        super().request(*arguments, **options)  # type: ignore[misc]

    def _note(self) -> None:
        exchange = getattr(_running, "exchange", None)
        if exchange is not None:
            exchange.connection = self
            if exchange.over:
                raise OSError("given up")


class _Connection(_Noted, HTTPConnection):
    pass


class _SecureConnection(_Noted, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager


def _innermost(error: BaseException) -> str:
    """The innermost cause, which is what people can act upon."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
