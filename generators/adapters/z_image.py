"""Z-Image: ``ZImagePipeline``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from generators.base import Conditioning, Generator
from generators.spacing import even_sigmas, spaced


class ZImage(Generator):
    """Network whose time runs from noise to sample and which predicts ``x0 - eps``; samples and texts are lists.

    The pipeline's ``guidance_scale`` s is ``v_cond + s (v_cond - v_uncond)``: our guidance is 1 + s.
    """

    pipeline_class = "ZImagePipeline"
    accepts = ("size", "text_length", "negative_prompt")
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def native_size(self) -> tuple[int, int]:
        return 1024, 1024

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = self.options.text_length or 512
        self.check_length(prompts, self.pipeline.tokenizer, limit)
        texts, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=limit
        )
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        return {"embeds": pad_sequence(texts, batch_first=True), "mask": mask}

    def latent_shape(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.in_channels, self.size[0] // factor, self.size[1] // factor

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        texts = [text[keep] for text, keep in zip(cond.tensors["embeds"], cond.tensors["mask"], strict=True)]
        images = list(x.to(self.dtype).unsqueeze(2).unbind())
        out = self.network(images, 1 - t, [text.to(self.dtype) for text in texts], return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)

    def times(self, steps: int) -> Tensor:
        _, height, width = self.latent_shape()
        return spaced(self.pipeline.scheduler, steps, even_sigmas(steps), height * width // 4)
