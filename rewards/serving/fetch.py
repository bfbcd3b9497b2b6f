"""Requests to servers of scores: one deadline for the whole reply, and failures in people's words."""

from __future__ import annotations

import os
import time
from typing import Any
from urllib.parse import urlsplit

import requests

from alignflow.secrets import remember
from rewards.base import RewardError
from rewards.serving.dispatch import UnansweredError


def open_session(url: str, parallel: int, token_env: str | None = None) -> requests.Session:
    """A session that keeps ``parallel`` connections; proxies are not for this machine's own servers.

    Args:
        token_env: environment variable that holds the bearer token.

    Raises:
        RewardError: the variable is not set.
    """
    session = requests.Session()
    session.mount("http", requests.adapters.HTTPAdapter(pool_maxsize=parallel))
    host = urlsplit(url).hostname or ""
    session.trust_env = not (host == "localhost" or host.startswith("127.") or host == "::1")
    if token_env is not None:
        token = os.environ.get(token_env)
        if not token:
            raise RewardError(f"environment variable {token_env} is not set")
        remember(token)
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def fetch(session: requests.Session, method: str, url: str, timeout: float, **options: Any) -> tuple[Any, bytes]:
    """(response, its whole body), within ``timeout`` seconds.

    Raises:
        UnansweredError: there is none in time, or no connection.
    """
    parts = urlsplit(url)
    server = f"{parts.scheme}://" + parts.netloc.rpartition("@")[2]  # without a name and password
    until = time.monotonic() + timeout
    try:
        with session.request(method, url, timeout=timeout, stream=True, **options) as reply:
            content = b""
            for chunk in reply.iter_content(1 << 16):
                content += chunk
                if time.monotonic() > until:
                    raise requests.Timeout
    except requests.Timeout:
        raise UnansweredError(f"{server} took more than {timeout:g} s") from None
    except requests.RequestException as error:
        raise UnansweredError(f"{server} cannot be reached: {_innermost(error)}") from None
    return reply, content


def _innermost(error: Exception) -> str:
    """The innermost cause, which is what people can act upon."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
