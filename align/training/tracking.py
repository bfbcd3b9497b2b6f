"""Saved samples for trackers: images, and videos in a form that plays in the tracker's page."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel

from align.data.media import encode, read_pixels
from alignflow import secrets
from alignflow.text import first_line, printable

Scalar = bool | int | float | str

PLAYED = ("gif", "mp4")
"""Videos that every tracker's page plays; others are sent as gif."""


def sent_config(config: BaseModel) -> dict[str, Scalar]:
    """The resolved settings by their dotted names, as trackers keep them beside the run's curves.

    Numbers, booleans and text stay as they are; lists are JSON; null is left out, which TensorBoard does not take.
    """
    return dict(_flat(config.model_dump(mode="json"), ""))


def _flat(tree: Mapping[str, Any], before: str) -> Iterator[tuple[str, Scalar]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif value is not None:
            plain = value if isinstance(value, Scalar) else json.dumps(value, ensure_ascii=False)
            yield f"{before}{name}", secrets.shown(plain) if isinstance(plain, str) else plain


@dataclass(frozen=True)
class Sent:
    """One sample for a tracker.

    Args:
        tag: its name in the tracker, the same at every step: ``samples/000``.
        caption: prompt and scores.
        file: an image, or a gif or mp4.
        fps: frames per second of a video.
        video: whether it is one.
    """

    tag: str
    caption: str
    file: Path
    fps: float
    video: bool


def log_samples(trackers: Iterable[Any], folder: Path, step: int) -> list[str]:
    """Send one folder of samples to those of accelerate's trackers that take images.

    Args:
        folder: as :func:`align.data.grids.save_samples` wrote it.

    Returns:
        What could not be sent and why, one line per tracker; the run continues without it.
    """
    senders = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    chosen = [tracker for tracker in trackers if tracker.name in senders]
    failed: list[str] = []
    if not chosen:
        return failed
    with tempfile.TemporaryDirectory() as place:
        sent = list(samples_of(folder, Path(place)))
        for tracker in chosen:
            try:
                senders[tracker.name](tracker.tracker, sent, step)
            except Exception as error:  # a service, its client or the network
                failed.append(
                    f"{tracker.name} has no samples of step {step}: {type(error).__name__}: {first_line(error)}"
                )
    return failed


def samples_of(folder: Path, place: Path) -> Iterator[Sent]:
    """The samples of a folder; videos that no tracker plays are written into ``place`` as gif."""
    index = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    kind, fps = str(index.get("clips") or ""), float(index.get("fps") or 16)
    for row, prompt in enumerate(index["prompts"]):
        file = folder / f"{row:03d}.{kind}"
        video = bool(kind) and file.is_file()
        if not video:
            file = folder / f"{row:03d}.png"
        elif kind not in PLAYED:
            file = _gif(file, place / f"{row:03d}.gif", fps)
        values = [(name, column[row]) for name, column in (index.get("scores") or {}).items()]
        scores = ", ".join(f"{name} {value:.3g}" for name, value in values if value is not None)
        yield Sent(f"samples/{row:03d}", f"{printable(prompt, 500)}\n{scores}".strip(), file, fps, video)


def _gif(video: Path, file: Path, fps: float) -> Path:
    file.write_bytes(encode(read_pixels(video), ".gif", fps))
    return file


def _tensorboard(writer: Any, sent: list[Sent], step: int) -> None:
    """Every sample under its own tag, where a slider goes through the steps; gifs move."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for one in sent:
        if one.video and one.file.suffix != ".gif":
            buffer = encode(read_pixels(one.file), ".gif", one.fps)
        else:
            buffer = one.file.read_bytes()
        with Image.open(io.BytesIO(buffer)) as image:
            width, height = image.size
        picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer)
        summary = Summary(value=[Summary.Value(tag=one.tag, image=picture)])
        writer._get_file_writer().add_summary(summary, step)  # add_video needs another package for the same
    writer.add_text("samples", "\n\n".join(f"**{one.tag}** {one.caption}" for one in sent), step)
    writer.flush()


def _wandb(run: Any, sent: list[Sent], step: int) -> None:
    wandb = import_module("wandb")
    run.log({"samples": _media(sent, wandb.Image, wandb.Video)}, step=step)


def _trackio(run: Any, sent: list[Sent], step: int) -> None:
    trackio = import_module("trackio")
    media = _media(sent, trackio.Image, trackio.Video)
    run.log({one.tag: medium for one, medium in zip(sent, media, strict=True)}, step=step)


def _media(sent: list[Sent], image: Callable[..., Any], video: Callable[..., Any]) -> list[Any]:
    return [(video if one.video else image)(str(one.file), caption=one.caption) for one in sent]
