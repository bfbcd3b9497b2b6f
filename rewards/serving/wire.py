"""What goes over the wire between a remote reward and its server: JSON, pixels as PNG or npz, one schema version.

Request::

    {"schema": "alignflow-reward/1", "id": "...", "prompts": [N], "group": [N] | null, "metadata": [N] | null,
     "npz": "base64"}                                media, image, mask as float32 arrays, exact
     "png": {"media": [N base64 | N [F base64]]}}    or as PNG, rounded to 8 bits

Reply::

    {"schema": ..., "id": the request's, "fingerprint": "...", "values": [N, null = none], "reasons": {"3": "why"},
     "parts": {"name": [N]}}

Both carry the SHA-256 of their body in the header ``X-Content-SHA256``. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import uuid
import zipfile
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from rewards.base import Reward, Scope, Scores

SCHEMA: Literal["alignflow-reward/1"] = "alignflow-reward/1"
DIGEST = "X-Content-SHA256"
ARRAYS = ("media", "image", "mask")


class WireError(ValueError):
    """A message that cannot be read; says what is wrong with it."""


@dataclass(frozen=True)
class Request:
    """Samples to score; see :class:`~rewards.base.Reward` for shapes."""

    media: Tensor
    prompts: list[str]
    group: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _RequestMessage(_Message):
    schema_: Literal["alignflow-reward/1"] = Field(alias="schema")
    id: str = Field(max_length=64)
    prompts: list[str] = Field(min_length=1)
    group: list[int] | None = None
    metadata: list[dict[str, Any]] | None = None
    npz: str | None = None
    png: dict[str, list[str | list[str]]] | None = None


class _ReplyMessage(_Message):
    schema_: Literal["alignflow-reward/1"] = Field(alias="schema")
    id: str
    fingerprint: str
    values: list[float | None]
    reasons: dict[int, str]
    parts: dict[str, list[float | None]]


class Description(_Message):
    """What a server scores with."""

    schema_: Literal["alignflow-reward/1"] = Field(SCHEMA, alias="schema")
    name: str
    range: tuple[float | None, float | None]
    wants: list[str]
    scope: Scope
    fingerprint: str
    apart: list[str] = []


def checksum(body: bytes) -> str:
    """What the header :data:`DIGEST` says of a body."""
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


def unpack(body: bytes, limit: int) -> Request:
    """A request from JSON; arrays may take ``limit`` bytes when unpacked.

    Raises:
        WireError: another schema, something missing, media of different sizes, too large.
    """
    message = _read(_RequestMessage, body, "the request")
    if (message.npz is None) == (message.png is None):
        raise WireError("the request should hold its media as npz or as png")
    if message.npz is not None:
        arrays = _from_npz(message.npz, limit)
    else:
        arrays = {name: _from_pngs(name, pictures, limit) for name, pictures in (message.png or {}).items()}
    media = arrays.pop("media", None)
    if media is None or media.ndim not in (4, 5) or media.shape[-3] != 3:
        given = "none" if media is None else list(media.shape)
        raise WireError(f"media should be [N, 3, H, W] or [N, F, 3, H, W], given {given}")
    lengths = {"prompts": len(message.prompts), "media": len(media), **{name: len(a) for name, a in arrays.items()}}
    lengths |= {name: len(value) for name in ("group", "metadata") if (value := getattr(message, name)) is not None}
    if len(set(lengths.values())) > 1:
        raise WireError(f"the request should hold as many of each, given {lengths}")
    inputs = {**arrays, **({} if message.metadata is None else {"metadata": message.metadata})}
    group = None if message.group is None else torch.tensor(message.group)
    return Request(media, message.prompts, group, inputs, message.id)


def _npz(arrays: dict[str, np.ndarray]) -> str:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return base64.b64encode(file.getbuffer()).decode()


def _from_npz(text: str, limit: int) -> dict[str, Tensor]:
    try:
        content = io.BytesIO(base64.b64decode(text, validate=True))
        with zipfile.ZipFile(content) as names:
            if (size := sum(entry.file_size for entry in names.infolist())) > limit:
                raise WireError(f"the npz unpacks to {size} bytes, more than the {limit} this server takes")
        with np.load(content, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise error if isinstance(error, WireError) else WireError(f"the npz cannot be read: {error}") from None
    for name, array in found.items():
        if name not in ARRAYS or array.dtype != np.float32:
            raise WireError(f"the npz should hold float32 {', '.join(ARRAYS)}; it holds {array.dtype} {name!r}")
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _pngs(array: np.ndarray) -> list[Any]:
    """``[N, C, H, W]`` or ``[N, F, C, H, W]`` in [0, 1] as N PNGs, or N lists of F."""
    if array.ndim == 5:
        return [_pngs(clip) for clip in array]
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return [_png(picture) for picture in pixels]


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png")
    return base64.b64encode(file.getbuffer()).decode()


def _from_pngs(name: str, pictures: list[str | list[str]], limit: int) -> Tensor:
    if name not in ARRAYS:
        raise WireError(f"pictures should be called {', '.join(ARRAYS)}, given {name!r}")
    lists = [[item] if isinstance(item, str) else item for item in pictures]
    count = sum(map(len, lists))
    decoded = [[_from_png(text, name, limit // max(count, 1)) for text in frames] for frames in lists]
    sizes = [(len(frames), *{f"{p.shape[0]} x {p.shape[1]}" for p in frames}) for frames in decoded]
    for index, size in enumerate(sizes):
        if size != sizes[0] or len(size) != 2 or isinstance(pictures[index], str) != isinstance(pictures[0], str):
            said = [" and ".join(map(str, one[1:])) + (f", {one[0]} frames" if one[0] != 1 else "") for one in sizes]
            raise WireError(
                f"{name} of one request should be of one size: number 0 is {said[0]}, number {index} is {said[index]}; "
                "send each size in a request of its own"
            )
    stacked = torch.from_numpy(np.stack([np.stack(frames) for frames in decoded])).movedim(-1, -3).float() / 255
    return stacked if decoded and isinstance(pictures[0], list) else stacked.squeeze(1)


def _from_png(text: str, name: str, limit: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["png"]) as picture:
            if picture.width * picture.height * 12 > limit:
                raise WireError(f"{name} of {picture.width} x {picture.height} are more than this server takes")
            pixels = np.asarray(picture.convert("L" if name == "mask" else "RGB"))
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise error if isinstance(error, WireError) else WireError(f"{name}: no readable PNG: {error}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


# -- replies ------------------------------------------------------------------------------------------------------


def pack_scores(scores: Scores, request_id: str, fingerprint: str) -> bytes:
    """Scores as JSON; what is missing is null and has its reason."""
    message = {
        "schema": SCHEMA,
        "id": request_id,
        "fingerprint": fingerprint,
        "values": _numbers(scores.values),
        "reasons": {str(index): why for index, why in scores.reasons.items()},
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
        raise WireError("the server holds another reward now, or other weights, than when this run asked first")
    if any(len(column) != count for column in (reply.values, *reply.parts.values())):
        raise WireError(f"the reply should hold {count} scores, and holds {len(reply.values)}")
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
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise WireError(f"{what} should be of schema {SCHEMA}, and is of {found!r}; run the same version at both ends")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise WireError(f"{what} is not of schema {SCHEMA}: {place}: {first['msg']}") from None


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.detach().float().tolist()]


def _tensor(column: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in column], dtype=torch.float32)
