"""A reward served by another process: ``alignflow reward serve``, on this or another machine."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from uuid import uuid4

from pydantic import Field

from alignflow.lazy import lazy
from alignflow.strict import Address, Seconds
from alignflow.waiting import pause
from rewards.base import Reward, RewardError, RewardSettings, Scope, Scores, resolved
from rewards.parts import parts_of
from rewards.serving.dispatch import Dispatcher, UnansweredError, pause_before

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.parts import Part
    from rewards.serving import fetch, wire
else:
    fetch, wire = lazy("rewards.serving.fetch"), lazy("rewards.serving.wire")

logger = logging.getLogger(__name__)


class Remote(RewardSettings):
    """A reward served by alignflow reward serve, in another environment or on another machine.

    Lost connections, timeouts, overload and damaged replies are tried again after a pause; what stays unanswered is
    missing, with its reason. No reply is believed that is damaged, or comes from another reward or other weights than
    the run began with.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["remote"] = Field("remote", description="a reward served by alignflow reward serve")
    url: Address = Field(description="server address, such as http://127.0.0.1:8300; put secrets in token_env")
    token_env: str | None = Field(None, description="environment variable with the token; null = no token")
    chunk: int = Field(16, ge=1, description="samples per request")
    parallel: int = Field(4, ge=1, le=1024, description="concurrent requests")
    payload: Literal["npz", "png"] = Field(
        "npz", description="npz = float32 pixels, exact | png = rounded to 8 bits, an eighth of the bytes"
    )
    timeout: Seconds = Field(60.0, description="seconds per request, including the reply")
    retries: int = Field(5, ge=0, le=1000, description="further attempts after a request without an answer")
    backoff: float = Field(
        1.0, ge=0, le=3600, description="seconds before the second attempt, doubled after each, at most 30"
    )

    def compares(self) -> Scope | None:
        """Unknown: the server reports it."""
        return None

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Ask the server what it scores with.

        Raises:
            RewardError: no server answers there, it needs another token, or it has another version.
        """
        client = Client(self)
        about = client.first(wire.read_description)

        def ask(part: Part) -> Scores:
            return client.score(part, about.fingerprint)

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            parts = parts_of(media, prompts, group, inputs, about.scope, self.chunk)
            return Dispatcher(ask, self.parallel, self.retries, self.backoff)(parts)

        low, high = about.range
        return Reward(
            about.name,
            function,
            (-math.inf if low is None else low, math.inf if high is None else high),
            wants=tuple(about.wants),
            scope=about.scope,
            fingerprint=lambda: about.fingerprint,
            apart=tuple(about.apart),
        )


class Client:
    """One server: requests to it, and the meaning of its refusals."""

    def __init__(self, settings: Remote) -> None:
        self.settings, self.id = settings, uuid4().hex
        self.base = resolved(settings.url, "reward 'remote': url").rstrip("/")
        self.url = fetch.address(self.base)
        try:
            self.session = fetch.open_session(self.url, settings.parallel, settings.token_env)
        except RewardError as error:
            raise RewardError(f"reward 'remote': {error}") from None

    def first(self, read: Any) -> Any:
        """The server's description, waited for as long as for a score; RewardError if there is none."""
        for attempt in range(self.settings.retries + 1):
            try:
                return read(self.call("GET", "/reward"))
            except wire.WireError as error:
                raise RewardError(f"reward 'remote': {self.url}: {fetch.readable(self.session, error)}") from None
            except UnansweredError as error:
                if not error.again or attempt == self.settings.retries:
                    how = "start it with: alignflow reward serve KIND --port PORT"
                    raise RewardError(f"reward 'remote': {error}" + (f"; {how}" if error.again else "")) from None
                seconds = pause_before(attempt + 1, self.settings.backoff, error)
                logger.warning("%s; trying again in %g s", error, seconds)
                pause(seconds)
        raise AssertionError

    def score(self, part: Part, fingerprint: str) -> Scores:
        """Scores of a part.

        Raises:
            UnansweredError: there are none.
            RewardError: the reward itself refuses such media.
        """
        request = wire.Request(part.media, part.prompts, part.group, part.inputs)
        try:
            body = wire.pack(request, self.settings.payload)
        except wire.WireError as error:
            raise RewardError(f"reward 'remote': {error}") from None
        try:
            found = wire.unpack_scores(self.call("POST", "/score", body), request, fingerprint)
        except wire.WireError as error:
            raise UnansweredError(f"{self.url}: {fetch.readable(self.session, error)}") from None
        return replace(
            found, reasons={index: fetch.readable(self.session, why) for index, why in found.reasons.items()}
        )

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The checked body of a good reply.

        Raises:
            UnansweredError: there is none, or it is damaged.
            RewardError: the reward refuses what it was given.
        """
        headers = {wire.CLIENT: self.id}
        if body is not None:
            headers |= {wire.DIGEST: wire.checksum(body), "Content-Type": "application/json"}
        url = self.base + path
        reply, content = fetch.fetch(self.session, method, url, self.settings.timeout, data=body, headers=headers)
        if reply.status_code != 200:
            self._refused(reply.status_code, content, reply.headers.get("Retry-After"))
        if reply.headers.get(wire.DIGEST) != wire.checksum(content):
            raise UnansweredError(f"{self.url}: the reply is damaged or not from a reward server")
        return content

    def _refused(self, status: int, content: bytes, after: str | None) -> None:
        import json

        try:
            said = fetch.readable(self.session, json.loads(content)["error"])
        except (ValueError, TypeError, KeyError, RecursionError):
            said = f"HTTP status {status}"
        if status == 422:
            raise RewardError(f"{said} (at {self.url})")
        if status in (401, 403):
            said += "; set token_env to the environment variable that holds the server's token"
        if status == 404:
            said = "there is no reward server at this address"
        again = after is not None or status in (408, 429) or status >= 500
        wait = float(after) if after is not None and after.isascii() and after.isdigit() else 0.0
        raise UnansweredError(f"{self.url}: {said}", again, wait)
