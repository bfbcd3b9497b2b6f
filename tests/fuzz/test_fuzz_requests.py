"""Requests to a reward server, mutated: every answer is 200 or says what the client did wrong."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the reward server needs: pip install 'alignflow[serve]'")

import served
from harness import failures

import rewards
from rewards.base import Reward
from rewards.serving import wire
from rewards.serving.limits import Limits
from rewards.serving.server import create_app

TOTAL = 500
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 2**70, 1.5, float("nan"), "", "a", "\x1b[31m", "é" * 300, [], {}, [[]], [None], {"": {}}, "AAAA",
)  # fmt: skip
METHODS = (1, 6, 8, 9, 12, 14, 93, 95, 97, 98, 99)


def test_mutated_requests(share: float) -> None:
    reward = Reward("mean", lambda media, prompts, group: media.flatten(1).mean(1))
    app = create_app(rewards.parse("shapes"), reward, limits=Limits(size=1 << 20, total=1 << 20))
    count, found = failures(((label, partial(answered, app, body)) for label, body in cases(int(TOTAL * share))), ())
    assert count == int(TOTAL * share)
    assert not found


def answered(app: Any, body: bytes) -> None:
    status, said = served.asked(app, body)
    assert status < 500, f"{status}: {said[:200]!r}"
    assert status == 200 or len(json.loads(said)["error"]) > 5, said


def cases(count: int) -> Iterator[tuple[str, bytes]]:
    """(label, body) from seeds."""
    kinds = (fields, nested, npz_bytes, npz_headers, zips, png_bytes, text)
    for seed in range(count):
        rng = random.Random(seed)
        kind = kinds[seed % len(kinds)]
        yield f"{kind.__name__} {seed}", kind(rng)


def message(payload: str = "npz") -> dict[str, Any]:
    media = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = wire.Request(media, ["a", "b"], torch.tensor([0, 0]), {"image": media, "metadata": [{}, {}]})
    return json.loads(wire.pack(asked, payload))


def fields(rng: random.Random) -> bytes:
    """One field is something else, missing or too much."""
    body = message(rng.choice(("npz", "png")))
    name = rng.choice([*body, "more"])
    if rng.random() < 0.2:
        body.pop(name, None)
    else:
        body[name] = rng.choice(ODD)
    return json.dumps(body).encode()


def nested(rng: random.Random) -> bytes:
    """An item of a list is something else."""
    body = message("png")
    place: Any = rng.choice([body["prompts"], body["group"], body["metadata"], *body["png"].values(), body["png"]])
    if isinstance(place, dict):
        place[rng.choice(["media", "image", "mask", "x"])] = rng.choice([*ODD, [[], []], [["AAAA"], []], ["AAAA"]])
    elif rng.random() < 0.3:
        place[:] = place * rng.choice([0, 2, 100])
    else:
        place[rng.randrange(len(place))] = rng.choice(ODD)
    return json.dumps(body).encode()


def npz_bytes(rng: random.Random) -> bytes:
    """Bytes of the archive are changed or cut."""
    body = message()
    body["npz"] = damaged(rng, body["npz"])
    return json.dumps(body).encode()


def npz_headers(rng: random.Random) -> bytes:
    """The header of an array claims something else."""
    shapes = ("()", "(2,)", "(2, 3, 8, 8)", "(True, 3, 8, 8)", "(2, 3, -8, 8)", "(2, 3, 99999999, 99999999)", "None",
              "(2, 3, 0, 8)", "(2, 3, 8, 8, 8, 8)", "(10**9, 3, 8, 8)", "(2, 3, 8.0, 8)", "'(2, 3, 8, 8)'",
              "(0, 3, 8, 8)")  # fmt: skip
    dtypes = ("<f4", ">f4", "<f8", "|O", "|b1", "<U9", "<M8[s]", "f4,f4")
    header = f"{{'descr': '{rng.choice(dtypes)}', 'fortran_order': {rng.choice(('False', 'True', '3'))}, "
    header += f"'shape': {rng.choice(shapes)}, }}"
    header = rng.choice((header, header, header, "(", '"""', "{}", "[" * 5000, "x" * 60_000, "{'descr': " * 50))
    length = len(header) if rng.random() < 0.8 else rng.randrange(65536)
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = struct.pack("<H", length) if version == b"\x01\x00" else struct.pack("<I", length)
    array = b"\x93NUMPY" + version + size + header.encode() + bytes(rng.choice((0, 1536, 1537)))
    return archive({rng.choice(("media.npy", "media.npy", "media", "../media.npy", "x.npy")): array})


def zips(rng: random.Random) -> bytes:
    """Methods, flags and sizes of the archive's entries are others; an entry may be there twice."""
    file = io.BytesIO()
    np.savez_compressed(file, media=np.zeros((2, 3, 8, 8), np.float32))
    content = bytearray(file.getvalue())
    local, central = content.index(b"PK\x03\x04"), content.index(b"PK\x01\x02")
    offset, width = rng.choice([(6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2)])
    value = rng.choice([*METHODS, 0xFFFF, 0]).to_bytes(width, "little")
    for start in (local + offset, central + offset + 2):
        content[start : start + width] = value
    return archive(bytes(content))


def png_bytes(rng: random.Random) -> bytes:
    """Bytes of an image are changed or cut, or its header claims a large one."""
    body = message("png")
    index = rng.randrange(2)
    content = body["png"]["media"][index]
    if rng.random() < 0.2:
        raw = bytearray(base64.b64decode(content))
        raw[16:24] = struct.pack(">II", rng.choice((0, 1, 8, 2**31, 60_000)), rng.choice((0, 9, 2**32 - 1, 60_000)))
        content = base64.b64encode(raw).decode()
    body["png"]["media"][index] = damaged(rng, content)
    return json.dumps(body).encode()


def text(rng: random.Random) -> bytes:
    """The JSON itself is damaged."""
    body = bytearray(json.dumps(message("png")).encode())
    odd = (b"\xff", b"[" * 100_000, b'"\\ud800"', b"1" * 5000, b"NaN", b"\x00", b"}" * 9, b'"schema":1,')
    choices: list[Callable[[], None]] = [
        lambda: body.__setitem__(rng.randrange(len(body)), rng.randrange(256)),
        lambda: body.__delitem__(slice(rng.randrange(len(body)), None)),
        lambda: body.__setitem__(slice(at := rng.randrange(len(body)), at), rng.choice(odd)),
    ]
    rng.choice(choices)()
    return bytes(body)


def damaged(rng: random.Random, content: str) -> str:
    raw = bytearray(base64.b64decode(content))
    for _ in range(rng.randrange(4)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return base64.b64encode(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw).decode()


def archive(content: bytes | dict[str, bytes]) -> bytes:
    if isinstance(content, dict):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in content.items():
                packed.writestr(name, data)
        content = file.getvalue()
    body = {"schema": wire.SCHEMA, "id": "1", "prompts": ["a", "b"], "npz": base64.b64encode(content).decode()}
    return json.dumps(body).encode()
