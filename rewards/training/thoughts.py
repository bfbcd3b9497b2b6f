"""Texts of a frozen judge about samples before a head scores them (DeScore, arXiv 2605.05922)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.judges.asking import Judge, Question, each_sample, texts
from rewards.training.settings import Thought

KEPT = 65536
"""Thoughts in memory."""


class Thoughts:
    """``thoughts(media, prompts) -> texts``; the text of a sample that was seen before is cached.

    Args:
        frames: shown per video.
    """

    def __init__(self, settings: Thought, writer: Judge, frames: int | None) -> None:
        self.settings, self.writer, self.frames = settings, writer, frames
        self.known: dict[bytes, str] = {}
        writer.ready("reply", ())

    @torch.no_grad()
    def __call__(self, media: Sequence[Tensor] | Tensor, prompts: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """Texts about N images ``[3, H, W]`` or videos ``[F, 3, H, W]``, "" where there is a reason; the reasons."""
        keys = [_key(one, prompt) for one, prompt in zip(media, prompts, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self.known]
        asked = [
            each_sample(self.settings.template, media[row].detach()[None], [prompts[row]], self.frames)[0]
            for row in new
        ]
        found = texts(self.writer, asked, self.settings.longest)
        reasons = {new[place]: f"the writer: {why}" for place, why in found.reasons.items()}
        if len(self.known) + len(new) > KEPT:
            self.known = {key: self.known[key] for key in keys if key in self.known}
        self.known |= {keys[row]: text for row, text in zip(new, found.values, strict=True) if row not in reasons}
        return [self.known.get(key, "") for key in keys], reasons

    def _asked(self, media: Tensor, prompt: str) -> list[Question]:
        return each_sample(self.settings.template, media.detach()[None], [prompt], self.frames)

    def thinned(self, said: Sequence[str]) -> list[str]:
        """The texts, each "" with the probability ``dropout``; by torch's global random numbers."""
        left_out = (torch.rand(len(said)) < self.settings.dropout).tolist()
        return ["" if out else text for out, text in zip(left_out, said, strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """The writer's fingerprint as bytes, for a digest."""
        return {"writer": torch.tensor([*self.writer.fingerprint().encode()], dtype=torch.uint8)}


def _key(media: Tensor, prompt: str) -> bytes:
    digest = hashlib.sha256(repr((prompt, tuple(media.shape))).encode())
    digest.update(media.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.digest()
