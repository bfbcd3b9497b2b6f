"""Match between the text in the image and the requested text, as read by RapidOCR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alignflow.extras import optional
from rewards.base import Reward, RewardError, RewardSettings, Scores
from rewards.networks.hub import typed_line
from rewards.rows import by_row, chosen_score, column, eight_bit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')
PROBE = "HELLO WORLD"
WANTED = "the text to be shown; or quote it in the prompt"


class Ocr(RewardSettings):
    """Text read in the image compared with the requested text: 1 - edit distance / length (Flow-GRPO).

    The text is the prompt's column ``text``, or else the first part of the prompt in double quotes. Case and white
    space do not count. Text that is read with more around it scores 1; the distance is at most the length. Needs the
    extra ``ocr``, whose models come with the package.
    """

    kind: Literal["ocr"] = Field("ocr", description="match between the text in the image and the requested text")
    frames: int | None = Field(None, ge=1, description="frames read per video, evenly spaced; null = all")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load RapidOCR's models; they run on the CPU.

        Raises:
            RewardError: not installed, or not working: it reads a rendered word first.
        """
        read = self._reader()

        def function(
            media: Tensor, prompts: list[str], group: Tensor | None, metadata: list[Mapping[str, Any]]
        ) -> Scores:
            def judge(frames: Tensor, asked: tuple[str, Mapping[str, Any]]) -> dict[str, float]:
                target = wanted_text(*asked)
                return {"ocr": sum(closeness(read(pixels), target) for pixels in eight_bit(frames)) / len(frames)}

            return chosen_score(by_row(media, list(zip(prompts, metadata, strict=True)), judge, self.frames), "ocr")

        return Reward("ocr", function, range=(0.0, 1.0), wants=("metadata",))

    def _reader(self) -> Any:
        """``uint8 [H, W, 3] -> text``, tested on a rendered word."""
        rapidocr, _ = (optional(name, "reward 'ocr'", RewardError) for name in ("rapidocr", "onnxruntime"))
        try:
            engine = rapidocr.RapidOCR(params={"Global.log_level": "error"})

            def reader(pixels: Any) -> str:
                return " ".join(engine(pixels[..., ::-1].copy()).txts or ())  # it takes BGR

            seen = reader(_drawn(PROBE))
        except Exception as error:  # whatever the engine makes of its models
            raise RewardError(f"reward 'ocr': RapidOCR does not run: {typed_line(error)}") from error
        if closeness(seen, PROBE) < 0.8:
            raise RewardError(f"reward 'ocr': RapidOCR read {seen!r} in the test image of {PROBE!r}; reinstall it")
        return reader


def wanted_text(prompt: str, row: Mapping[str, Any]) -> str:
    """The text a prompt asks for: its column ``text``, or what is in double quotes.

    Raises:
        ValueError: neither, or nothing but white space.
    """
    quoted = QUOTED.search(prompt)
    found = column(row, "text", str, WANTED, default=next(filter(None, quoted.groups())) if quoted else None)
    if not _plain(found):
        raise ValueError(f"the text to be shown is empty ({WANTED})")
    return found


def closeness(seen: str, wanted: str) -> float:
    """1 - min(edit distance, length) / length of ``wanted``, without case and white space; 1 if it is contained.

    >>> closeness("helo", "Hello"), closeness("say: HEL LO!", "hello"), closeness("", "hello")
    (0.8, 1.0, 0.0)
    """
    seen, wanted = _plain(seen), _plain(wanted)
    return 1.0 if wanted in seen else 1.0 - min(edit_distance(seen, wanted), len(wanted)) / len(wanted)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions, 1 each.

    >>> edit_distance("kitten", "sitting")
    3
    """
    costs = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, costs[0] = costs[0], i
        for j, b in enumerate(second, 1):
            diagonal, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, diagonal + (a != b))
    return costs[-1]


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _drawn(text: str) -> Any:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(image).text((24, 24), text, fill="black", font=ImageFont.load_default(40))
    return np.asarray(image)
