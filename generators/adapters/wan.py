"""Wan 2.1 and 2.2 text to video: ``WanPipeline``, with one expert or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from generators.base import Conditioning, Options
from generators.experts import Experts
from generators.spacing import spaced
from generators.video import VideoGenerator


class Wan(VideoGenerator):
    """Network that predicts ``eps - x0`` at ``timestep = 1000 t``. In 2.2 a second expert is used below the boundary.

    Both experts are trained, each by the terms of its times. A 2.2 without a second expert counts time per token.
    """

    pipeline_class = "WanPipeline"
    splits_tokens = True
    user_attention = ("attn2",)
    optional: tuple[str, ...] = ("transformer_2",)

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        super().__init__(pipeline, options)
        boundary, second = pipeline.config.boundary_ratio, pipeline.transformer_2
        if boundary is not None and second is not None:
            self.backbone = self.network = Experts(pipeline.transformer, second, boundary).eval()

    def backbones(self) -> dict[str, nn.Module]:
        return dict(self.backbone.named_children()) if isinstance(self.backbone, Experts) else super().backbones()

    def native_size(self) -> tuple[int, int]:
        return 480, 832

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 512
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=limit, device=self.device
        )
        return {"embeds": embeds}

    def channels(self) -> int:
        return self.pipeline.vae.config.z_dim

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        route = {"t": t} if isinstance(self.backbone, Experts) else {"return_dict": False}
        return self.network(
            **route,
            hidden_states=self.seen(x, cond).to(self.dtype),
            timestep=self.timestep(x, t),
            encoder_hidden_states=cond.tensors["embeds"].to(self.dtype),
            encoder_hidden_states_image=cond.tensors.get("features"),
        )[0]

    def seen(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Network input of the video: its latents, and what is concatenated to them, ``[N, ..., F', H', W']``."""
        return x

    def timestep(self, x: Tensor, t: Tensor) -> Tensor:
        """``[N]``, or for 2.2's one-expert model ``[N, tokens]``."""
        scaled = t * self.pipeline.scheduler.config.num_train_timesteps
        if not self.pipeline.config.expand_timesteps:
            return scaled
        _, height, width = x.shape[2:]
        return scaled[:, None].expand(-1, x.shape[2] * (height // 2) * (width // 2))

    def times(self, steps: int) -> Tensor:
        return spaced(self.pipeline.scheduler, steps)
