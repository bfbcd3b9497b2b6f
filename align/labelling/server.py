"""The page that compares two samples, on this machine alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from align.data.media import suffix_of
from align.data.tables import Cell
from align.labelling.votes import Candidates, Media, Votes
from align.ui.guarded import PROTECTION, protected, run
from alignflow.text import printable
from alignflow.words import count

PAGE = Path(__file__).with_name("page.html")
TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif",
         ".webp": "image/webp", ".mp4": "video/mp4", ".webm": "video/webm", ".mov": "video/quicktime"}  # fmt: skip


class Vote(BaseModel):
    """Vote that the page sends."""

    pair: str = Field(max_length=64)
    choice: Literal["left", "right", "tie"]
    seconds: float = Field(ge=0, le=1e6, allow_inf_nan=False)


def create_app(pairs: list[Candidates], votes: Votes, token: str, port: int) -> FastAPI:
    """The application.

    Args:
        token, port: as :func:`align.ui.guarded.protected` reads them.
    """
    app = protected(token, port, "alignflow label")
    by_key = {pair.key: pair for pair in pairs}

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PROTECTION)

    @app.get("/next")
    def following(after: str = "") -> dict[str, Any]:
        voted = votes.voted
        left = [pair for pair in pairs if pair.key not in voted]
        keys = [pair.key for pair in left]
        start = keys.index(after) + 1 if after in keys else 0  # a pair that was skipped comes again at the end
        shown = (left[start:] or left)[:2]
        return {"done": len(voted & by_key.keys()), "of": len(pairs), "pairs": [_shown(pair) for pair in shown]}

    @app.get("/media/{key}/{name}")
    def media(key: str, name: str) -> Response:
        pair = by_key.get(key)
        files = {} if pair is None else {"left": pair.sides[0], "right": pair.sides[1], **pair.prompt.media}
        if name not in files:
            raise HTTPException(404, "there is no such sample")
        return _file(files[name])

    @app.post("/vote")
    def vote(given: Vote) -> dict[str, Any]:
        if given.pair not in by_key:
            raise HTTPException(404, "there is no such pair")
        if not votes.add(by_key[given.pair], given.choice, given.seconds):
            raise HTTPException(409, "this pair has a vote already, perhaps from another tab")
        return following()

    @app.post("/undo")
    def undo() -> dict[str, Any]:
        key = votes.undo()
        if key is None:
            raise HTTPException(404, "there is no vote to undo")
        back = following()
        return {**back, "pairs": [*([_shown(by_key[key])] if key in by_key else []), *back["pairs"]]}

    return app


def _shown(pair: Candidates) -> dict[str, Any]:
    left, right = (_suffix(side) in (".mp4", ".webm", ".mov") for side in pair.sides)
    return {"key": pair.key, "prompt": pair.prompt.text, "source": "image" in pair.prompt.media, "video": [left, right]}


def _suffix(media: Media) -> str:
    content = media.content() if isinstance(media, Cell) else media
    return suffix_of(content) if isinstance(content, bytes) else Path(content or "").suffix.lower()


def _file(media: Media) -> Response:
    content = media.content() if isinstance(media, Cell) else media
    if isinstance(content, bytes):
        data = content
    else:
        try:
            data = Path(content or "").read_bytes()
        except OSError:
            raise HTTPException(404, f"{content} cannot be read any more") from None
    return Response(data, media_type=TYPES.get(_suffix(media), "application/octet-stream"))


def serve(pairs: list[Candidates], votes: Votes, port: int, say: Callable[[str], None] = print) -> None:
    """Serve the page until interrupted.

    Args:
        port: 0 = any free one.

    Raises:
        ConfigError: the port is taken.
    """
    done = len(votes.voted & {pair.key for pair in pairs})
    about = f"{count(len(pairs), 'pair')}, {done} of them with a vote; votes go into {printable(str(votes.path))}."
    run(lambda token, chosen: create_app(pairs, votes, token, chosen), port, about, say)
