"""Wire format between a remote reward and its server: JSON, pixels as PNG or npz, one schema version.

Request::

    {"schema": "alignflow-reward/1", "id": "...", "prompts": [N], "group": [N] | null, "metadata": [N] | null,
     "npz": "base64"}                                media, image, mask as float32 arrays, exact
     "png": {"media": [N base64 | N [F base64]]}}    or as PNG, rounded to 8 bits

Reply::

    {"schema": ..., "id": the request's, "fingerprint": "...", "values": [N, null = none], "reasons": {"3": "why"},
     "parts": {"name": [N]}}

Both carry the SHA-256 of their body in the header ``X-Content-SHA256``. Types are exact: true is no number and "1"
no score. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json
from torch import Tensor

from alignflow.text import first_line, printable
from rewards.base import Reward, Scope, Scores
from rewards.serving.arrays import WireError, from_npz, from_pngs
from rewards.serving.limits import Limits

__all__ = ["Request", "WireError", "pack", "pack_scores", "unpack", "unpack_scores"]

SCHEMA: Literal["alignflow-reward/1"] = "alignflow-reward/1"
DIGEST = "X-Content-SHA256"
CLIENT = "X-Client"
"""Header by which a client is known, so that a server can serve all of them in turn."""
LARGEST_TREE = 4_000_000
"""Commas, colons and brackets of a message: what small bodies would blow up to in memory."""


class _First(FailFast):
    __hash__ = object.__hash__  # unions ask for it


FIRST = _First()
"""Validator that reports only the first error of a list with many."""
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]


@dataclass(frozen=True)
class Request:
    """Samples to score; see :class:`~rewards.base.Reward` for shapes."""

    media: Tensor
    prompts: list[str]
    group: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _RequestMessage(_Message):
    schema_: Literal["alignflow-reward/1"] = Field(alias="schema")
    id: str = Field(max_length=64)
    prompts: Annotated[list[str], FIRST] = Field(min_length=1)
    group: Annotated[list[Whole], FIRST] | None = None
    metadata: Annotated[list[dict[str, Any]], FIRST] | None = None
    npz: str | None = None
    png: dict[str, Annotated[list[str | list[str]], FIRST]] | None = None


class _ReplyMessage(_Message):
    schema_: Literal["alignflow-reward/1"] = Field(alias="schema")
    id: str
    fingerprint: str
    values: Annotated[list[float | None], FIRST]
    reasons: dict[int, str]
    parts: dict[str, list[float | None]]


class Description(_Message):
    """Description of a server's reward."""

    schema_: Literal["alignflow-reward/1"] = Field(SCHEMA, alias="schema")
    name: str
    range: tuple[float | None, float | None]
    wants: list[str]
    scope: Scope
    fingerprint: str
    apart: list[str] = []


def checksum(body: bytes) -> str:
    """Value of the header :data:`DIGEST` for a body."""
    return hashlib.sha256(body).hexdigest()


# -- requests -----------------------------------------------------------------------------------------------------


def pack(request: Request, payload: Literal["npz", "png"]) -> bytes:
    """A request as JSON.

    Raises:
        WireError: metadata that JSON cannot hold.
    """
    arrays = {"media": request.media, **request.inputs}
    metadata = arrays.pop("metadata", None)
    numbers = {name: value.detach().float().cpu().numpy() for name, value in arrays.items()}
    message = {
        "schema": SCHEMA,
        "id": request.id,
        "prompts": request.prompts,
        "group": None if request.group is None else request.group.tolist(),
        "metadata": metadata,
        payload: _npz(numbers) if payload == "npz" else {name: _pngs(value) for name, value in numbers.items()},
    }
    try:
        return json.dumps(message).encode()
    except (TypeError, ValueError) as error:
        raise WireError(f"metadata of the prompts cannot be sent as JSON: {error}") from None


def unpack(body: bytes, limits: Limits) -> Request:
    """A request from JSON.

    Raises:
        WireError: another schema, something missing, media of different sizes, or more than ``limits`` allow.
    """
    message = _read(_RequestMessage, body, "the request")
    if len(message.prompts) > limits.samples:
        raise WireError(f"{len(message.prompts)} samples are more than the {limits.samples} this server takes at once")
    if (message.npz is None) == (message.png is None):
        raise WireError("the request should hold its media as npz or as png")
    try:
        arrays = from_npz(message.npz, limits) if message.npz is not None else from_pngs(message.png or {}, limits)
    except WireError:
        raise
    except Exception as error:  # whatever libraries raise at hostile bytes
        form = "the npz cannot be read" if message.npz is not None else "no readable PNG"
        raise WireError(f"{form}: {first_line(error)}") from None
    media = arrays.pop("media", None)
    if media is None:
        raise WireError("media should be [N, 3, H, W] or [N, F, 3, H, W], given none")
    lengths = {"prompts": len(message.prompts), "media": len(media), **{name: len(a) for name, a in arrays.items()}}
    lengths |= {name: len(value) for name in ("group", "metadata") if (value := getattr(message, name)) is not None}
    if len(set(lengths.values())) > 1:
        raise WireError(f"the request should hold as many of each, given {lengths}")
    inputs = {**arrays, **({} if message.metadata is None else {"metadata": message.metadata})}
    group = None if message.group is None else torch.tensor(message.group, dtype=torch.int64)
    return Request(media, message.prompts, group, inputs, message.id)


def _npz(arrays: dict[str, np.ndarray]) -> str:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(file.getbuffer()).decode()


def _pngs(array: np.ndarray) -> list[Any]:
    """``[N, C, H, W]`` or ``[N, F, C, H, W]`` in [0, 1] as N PNGs, or N lists of F."""
    if array.ndim == 5:
        return [_pngs(video) for video in array]
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [_png(image) for image in pixels]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png")
    return base64.b64encode(file.getbuffer()).decode()


# -- replies ------------------------------------------------------------------------------------------------------


def pack_scores(scores: Scores, request_id: str, fingerprint: str) -> bytes:
    """Scores as JSON; what is missing is null and has its reason."""
    message = {
        "schema": SCHEMA,
        "id": request_id,
        "fingerprint": fingerprint,
        "values": _numbers(scores.values),
        "reasons": {str(index): printable(why) for index, why in scores.reasons.items()},
        "parts": {name: _numbers(values) for name, values in scores.parts.items()},
    }
    return json.dumps(message, allow_nan=False).encode()


def unpack_scores(body: bytes, request: Request, fingerprint: str) -> Scores:
    """Scores of ``request`` from JSON.

    Raises:
        WireError: not a reply to it, or not from the reward that the run began with.
    """
    reply = _read(_ReplyMessage, body, "the reply")
    count = len(request.prompts)
    if reply.id != request.id:
        raise WireError("the reply belongs to another request")
    if reply.fingerprint != fingerprint:
        raise WireError("the server's reward or its weights have changed since the first request of this run")
    if any(len(column) != count for column in (reply.values, *reply.parts.values())):
        raise WireError(f"the reply should hold {count} scores, and holds {len(reply.values)}")
    if bad := [index for index in reply.reasons if not 0 <= index < count]:
        raise WireError(f"the reply gives a reason for sample {bad[0]} of {count}")
    values = _tensor(reply.values)
    return Scores(values, reply.reasons, {name: _tensor(column) for name, column in reply.parts.items()})


def describe(reward: Reward, fingerprint: str) -> bytes:
    """A :class:`Description` as JSON; an infinite end of the range is null."""
    low, high = (value if math.isfinite(value) else None for value in reward.range)
    message = Description(
        name=reward.name, range=(low, high), wants=list(reward.wants), scope=reward.scope, fingerprint=fingerprint,
        apart=list(reward.apart),
    )  # fmt: skip
    return message.model_dump_json(by_alias=True).encode()


def read_description(body: bytes) -> Description:
    """A :class:`Description` from JSON; raises WireError."""
    return _read(Description, body, "the server's description")


def _read(cls: Any, body: bytes, what: str) -> Any:
    if sum(body.count(mark) for mark in b",:[{") > LARGEST_TREE:  # base64 holds none of these
        raise WireError(f"{what} holds more than {LARGEST_TREE} items")
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise WireError(f"{what} is not JSON: {printable(first['msg'], 200)}")
    place = printable(".".join(map(str, first["loc"])), 100)
    if place == "schema":
        found = printable(repr(from_json(body).get("schema")), 80)
        raise WireError(f"{what} should be of schema {SCHEMA}, and is of {found}; run the same version at both ends")
    raise WireError(f"{what} is not of schema {SCHEMA}: {place}: {printable(first['msg'], 200)}")


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.detach().float().tolist()]


def _tensor(column: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in column], dtype=torch.float32)
