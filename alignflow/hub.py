"""The Hugging Face hub: whether it answers, tested once and within seconds, and advice if it does not.

The libraries that download retry for 20 s and longer, file by file. Code that is about to download calls
:func:`unavailable` first. No torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alignflow.text import first_line

PATIENCE = 3.0
"""Seconds to wait for any answer of the hub."""

REMEMBERED = 30.0
"""Seconds for which an answer holds, so that a run with five models asks once."""

BROKEN = (407, 502, 503, 504)
"""Replies of a proxy that has no way to the hub, or of a hub that is down."""

SETTINGS = "HF_ENDPOINT=URL names a mirror of the hub; HF_HUB_OFFLINE=1 reads only the cache in HF_HOME"
"""Environment variables of the hub's client that help without a network."""

_said: dict[str, tuple[float, str]] = {}


def silent(patience: float = PATIENCE) -> str:
    """The reason why nothing can be downloaded: offline mode, or ``https://... : reason``; empty if the hub answers.

    Args:
        patience: seconds. Name servers that do not answer are given no longer either.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    then, reason = _said.get(endpoint, (-REMEMBERED, ""))
    if time.monotonic() - then >= REMEMBERED:
        reason = _asked(endpoint, patience)
        _said[endpoint] = time.monotonic(), reason
    return f"{endpoint}: {reason}" if reason else ""


def unavailable(name: str, kind: str = "model") -> str:
    """Sentences for a model or dataset that is not on this machine while the hub is silent; empty if it answers."""
    reason = silent()
    if not reason:
        return ""
    return f"not in the local hub cache, and the hub cannot be reached: {reason}\n  {advice(name, kind)}"


def advice(name: str, kind: str = "model") -> str:
    """Ways to get at ``owner/name`` without the hub.

    Args:
        kind: ``model`` or ``dataset``.
    """
    repository = "/".join(name.split("/")[:2])
    typed = "" if kind == "model" else f" --repo-type {kind}"
    return (
        f"on a machine with a network, run: hf download {repository}{typed} --local-dir FOLDER; then copy the folder "
        f"here and give its path in place of the id\n  {SETTINGS}"
    )


@contextmanager
def offline() -> Iterator[None]:
    """Context in which the hub's client and ``datasets`` use what is on the disk and do not try to connect."""
    from huggingface_hub import constants

    places: list[Any] = [constants]
    try:
        from datasets import config
    except ImportError:
        pass
    else:
        places.append(config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _asked(endpoint: str, patience: float) -> str:
    """The reason why ``endpoint`` does not answer; asked in a thread, because looking up a name has no timeout."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_head(endpoint, patience)), name="hub", daemon=True)
    thread.start()
    thread.join(patience + 0.5)
    return found[0] if found else f"no answer within {patience:g} s"


def _head(endpoint: str, patience: float) -> str:
    from huggingface_hub import get_session

    try:
        status = get_session().head(endpoint, timeout=patience).status_code
    except Exception as error:  # the HTTP library's own hierarchy changes with the hub client's version
        return f"{type(error).__name__}: {first_line(error)}"
    return f"HTTP status {status}" if status in BROKEN else ""
