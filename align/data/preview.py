"""A page with the first items of a config's training data: texts, media, shares of the sources, rows left out and why.

Media are shown as the model sees them: cropped and resized to its size, or to the bucket of their row. Rows are read
one by one until enough of them can be used; media are opened only for those.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from align.data.buckets import Size, divided
from align.data.files import write_text
from align.data.grids import still
from align.data.inputs import pixels_of
from align.data.media import encode, fit
from align.data.pair_table import stored_rewards
from align.data.prompts import Prompt, read_prompts, read_table
from align.data.tables import is_tie
from alignflow.errors import DataError
from alignflow.text import printable

if TYPE_CHECKING:
    from align.config.settings import Config

SIDE = 192
"""Pixels of the longer side of an image on the page."""
SHOWN = (
    "Media are shown as the model sees them, cropped about the middle and resized. Sizes are height x width in pixels."
)
UNKNOWN = (
    "Media are shown as they are in the files, because the size of the model's samples is not known before it is "
    "loaded. Set generator.size to see them cropped and resized. Sizes are height x width in pixels."
)
_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "ul{list-style:none;padding:0}li.item{border-top:1px solid #8884;padding:.7rem 0;display:flex;gap:1rem;"
    "align-items:flex-start}figure{margin:0;font-size:12px}small{color:#888}img{display:block;max-width:192px}"
)


@dataclass
class Item:
    """One training item: its text, place, notes such as scores, and its media.

    Args:
        media: name -> pixels at ``size``, or at their own where that is None.
        files: name -> (height, width) of the file.
        bucket: whether ``size`` is that of a bucket.
    """

    prompt: Prompt
    notes: list[str] = field(default_factory=list)
    media: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Size] = field(default_factory=dict)
    size: Size | None = None
    bucket: bool = False


@dataclass
class Source:
    """The first items of one source, its share of a rollout in the beginning, and place -> why of rows left out."""

    file: str
    share: float
    items: list[Item] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


def preview(config: Config, count: int, sizes: Sequence[Size] = ()) -> list[Source]:
    """The first ``count`` items that can be used of each source of training data.

    Args:
        sizes: (height, width) of the buckets, or the one size of all media; none where it is not known.

    Raises:
        DataError: a source cannot be read at all.
    """
    if config.rollout.kind != "online":
        found = Source(config.rollout.file, 1.0)
        rows = read_table(config.rollout.file, config.rollout.columns, found.dropped)
        found.items = [*islice(_stored(rows, config, found.dropped, sizes), count)]
        return [found]
    sources = [Source(one.file, one.points[0][1]) for one in config.prompts.sources]
    total = sum(source.share for source in sources) or 1.0
    limit = min(count, config.prompts.limit or count)
    for source in sources:
        source.share /= total
        prompts = read_prompts(source.file, limit, skipped=source.dropped)
        source.items = [*_opened(prompts, source.dropped, lambda prompt: Item(prompt, size=next(iter(sizes), None)))]
    return sources


def _stored(rows: Iterable[Prompt], config: Config, dropped: dict[str, str], sizes: Sequence[Size]) -> Iterator[Item]:
    rollout = config.rollout
    assert rollout.kind != "online"

    def item(prompt: Prompt) -> Item:
        if rollout.kind == "pairs" and is_tie(prompt.metadata.get("tie"), prompt.where):
            raise DataError("the pair is a tie, which gives no gradient")
        scores = stored_rewards(prompt, rollout, config.recipe.any_order)
        notes = [f"reward of {name}: {score:g}" for name, score in zip(rollout.columns, scores, strict=False)]
        number = 0
        if rollout.buckets is not None:
            number = divided([prompt], rollout.columns, rollout.buckets, [*sizes])[1].bucket[0]
        return Item(prompt, notes, size=sizes[number] if sizes else None, bucket=rollout.buckets is not None)

    return _opened(rows, dropped, item)


def _opened(prompts: Iterable[Prompt], dropped: dict[str, str], made: Callable[[Prompt], Item]) -> Iterator[Item]:
    """Items whose media can be read; others go to ``dropped``."""
    for prompt in prompts:
        try:
            item = made(prompt)
            for name in prompt.media:
                pixels = pixels_of(prompt, name)
                item.files[name] = pixels.shape[-3], pixels.shape[-2]
                item.media[name] = fit(pixels, item.size)
        except DataError as error:
            dropped[prompt.where] = str(error)
        else:
            yield item


def page(name: str, sources: list[Source]) -> str:
    """The HTML of a preview, which needs no other file."""
    known = any(item.size for source in sources for item in source.items if item.media)
    shown = SHOWN if known else UNKNOWN
    parts = [f"<h1>Training data of {_text(name)}</h1>"]
    parts += [f"<p>{shown}</p>"] if any(item.media for source in sources for item in source.items) else []
    for source in sources:
        count, lost = len(source.items), len(source.dropped)
        parts.append(f"<h2>{_text(source.file)}</h2><p>{source.share:.0%} of a rollout; first {count} items")
        parts.append(f"; {lost} of the rows read are left out</p><ul>")
        parts += [_item(item) for item in source.items]
        parts.append("</ul>")
        if source.dropped:
            rows = "".join(f"<li>{_text(why)}</li>" for why in source.dropped.values())
            parts.append(f"<h3>Left out</h3><ol>{rows}</ol>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    title = f"<title>{_text(name)}: data</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{title}</head><body>{"".join(parts)}</body></html>\n'


def _item(item: Item) -> str:
    figures = "".join(
        f"<figure>{_figure(pixels)}{_text(_caption(item, name))}</figure>" for name, pixels in item.media.items()
    )
    about = [item.prompt.place, *item.notes, *(f"{key}: {value}" for key, value in item.prompt.metadata.items())]
    words = f"{_text(item.prompt.text)}<br><small>{_text(' · '.join(about))}</small>"
    return f'<li class="item">{figures}<div>{words}</div></li>'


def _figure(pixels: Any) -> str:
    image = Image.fromarray(still(pixels)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    data = base64.b64encode(encode(np.asarray(image), ".png")).decode()
    return f'<img src="data:image/png;base64,{data}" alt="">'


def _caption(item: Item, name: str) -> str:
    """``image: bucket 512 x 768, from 600 x 800``, height before width."""
    pixels = item.media[name]
    frames = f"{len(pixels)} frames, " if pixels.ndim == 4 else ""
    height, width = pixels.shape[-3:-1]
    own = item.files[name]
    origin = "" if own == (height, width) else f", from {own[0]} x {own[1]}"
    return f"{name}: {frames}{'bucket ' if item.bucket else ''}{height} x {width}{origin}"


def _text(value: object) -> str:
    return html.escape(printable(value, 600))


def write(config: Config, out: Path, count: int, sizes: Sequence[Size] = ()) -> list[Source]:
    """Write the page of :func:`preview` to ``out``; the sources."""
    sources = preview(config, count, sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(config.name, sources))
    return sources
