"""The embedded world's verifier as a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward, RewardError, RewardSettings, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ShapesVerifier(RewardSettings):
    """Reads a picture of the embedded world back into a scene and compares it with its caption; no model."""

    kind: Literal["shapes"] = Field("shapes", description="the embedded world's verifier")
    score: Literal["dense", "strict"] = Field(
        "dense", description="dense = share that is right; strict = all or nothing"
    )

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Needs no device: the verifier is numpy."""
        import torch

        from rewards.shapes import score_batch

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            if media.ndim != 4:
                raise RewardError("reward 'shapes' reads single images [N, 3, H, W], got video")
            found = score_batch(media.detach().float().cpu(), prompts)
            parts = {name: torch.as_tensor(found[name]) for name in ("strict", "dense")}
            return Scores(parts[self.score], found["reasons"], parts)

        return Reward("shapes", function, range=(0.0, 1.0))
