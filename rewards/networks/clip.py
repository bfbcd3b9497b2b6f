"""A ``CLIPModel`` on tensors: resized, cropped and normalised here, so that gradients reach the pixels."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ftfy
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewards.base import RewardError
from rewards.frames import by_frame
from rewards.networks import open_clip_layout
from rewards.networks.hub import find_model, from_pretrained, is_file, network, weight_file
from rewards.networks.preprocess import Preprocess
from rewards.networks.state_dicts import read_state_dict
from rewards.texts import writable


@dataclass(frozen=True)
class Clip:
    """Model, tokenizer and preprocessing, ready to embed images and prompts.

    Args:
        repair: whether prompts are mended as OpenAI's tokenizer does (mojibake, HTML entities, curly quotes);
            tokenizers of transformers do not.
    """

    model: Any
    tokenizer: Any
    preprocess: Preprocess
    repair: bool = False

    @classmethod
    def load(
        cls,
        model: str,
        processor: str | None,
        dtype: str,
        device: torch.device | str,
        *,
        preprocess: Literal["settings", "cropped", "padded", "squashed"] = "settings",
        antialias: bool = True,
        quick_gelu: bool = False,
        repair: bool = False,
    ) -> Clip:
        """Read all three.

        Args:
            model: folder or hub id of a ``CLIPModel``, ``shapes`` for the embedded one, or a file of weights in the
                layout of open_clip.
            processor: folder or hub id of the tokenizer, and of the image settings; None = those of ``model``.
            preprocess: settings = as the image settings say; the others are those of :class:`Preprocess`.
            antialias: of ``padded`` and ``squashed``.
            quick_gelu: activation of a file's towers (OpenAI's weights), not to be seen in it.

        Raises:
            RewardError: not there, damaged, another model, missing or unexpected weights.
        """
        model, processor = find_model(model), find_model(processor or model)
        if is_file(processor):
            raise RewardError("a file of weights has no tokenizer; give the folder or hub id of one as processor")
        precision = getattr(torch, dtype)
        path = weight_file(model) if is_file(model) else None
        found: Any = None if path else _transformers_model(model, precision)
        tokenizer = from_pretrained(AutoTokenizer, processor)
        if path:
            state = read_state_dict(path)
            found = open_clip_layout.build(state, str(path), tokenizer.eos_token_id, quick_gelu, precision)
        known = found.config.text_config.vocab_size
        if len(tokenizer) > known:
            raise RewardError(f"the tokenizer {processor} has {len(tokenizer)} tokens, the model {model} only {known}")
        found.requires_grad_(False).eval().to(device)
        size = found.config.vision_config.image_size
        if preprocess == "settings":
            steps = Preprocess.of_processor(from_pretrained(CLIPImageProcessorPil, processor))
        elif preprocess == "cropped":
            steps = Preprocess.cropped(size)
        else:
            steps = (Preprocess.padded if preprocess == "padded" else Preprocess.squashed)(size, antialias)
        return cls(found, tokenizer, steps, repair)

    @property
    def logit_scale(self) -> float:
        """The model's factor of cosines, e.g. 100."""
        return self.model.logit_scale.float().exp().item()

    def by_frame(
        self,
        media: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        frames: int | None = None,
    ) -> Tensor:
        """Scores ``[N]``: ``score(image features [b, D], sample numbers [b])``, of videos the mean over frames."""
        return by_frame(media, lambda images, samples: score(self.image_features(images), samples), chunk, frames)

    def cosine(
        self, media: Tensor, prompts: list[str], chunk: int, frames: int | None = None, *, positive: bool = False
    ) -> Tensor:
        """Cosine ``[N]`` of ``media`` and ``prompts``, of videos the mean over frames.

        Args:
            positive: whether an image's negative cosine counts as 0.
        """
        text = self.text_features(prompts, chunk)

        def score(image: Tensor, samples: Tensor) -> Tensor:
            value = (image * text[samples]).sum(-1)
            return value.clamp(min=0) if positive else value

        return self.by_frame(media, score, chunk, frames)

    @torch.no_grad()
    def media_features(self, media: Tensor, chunk: int) -> Tensor:
        """``[N, D]`` float32 of ``[N, 3, H, W]`` or ``[N, F, 3, H, W]``, where a video's is the mean of its frames'."""
        seen = torch.cat([self.image_features(part) for part in media.flatten(0, -4).split(chunk)])
        return seen.unflatten(0, (len(media), -1)).mean(1)

    def image_features(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] -> unit rows ``[N, D]`` float32."""
        return self.pixel_features(self.preprocess(images.to(self.model.device)))

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """As :meth:`image_features`, of what :attr:`preprocess` has made."""
        pixels = pixels.to(self.model.dtype)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: list[str], chunk: int) -> Tensor:
        """Unit rows ``[N, D]`` float32; equal prompts are read once, long ones cut as CLIP does (77 tokens)."""
        distinct = list(dict.fromkeys(prompts))
        limit = self.model.config.text_config.max_position_embeddings
        rows = [torch.zeros(0, self.model.config.projection_dim, device=self.model.device)]
        for start in range(0, len(distinct), chunk):
            texts = [mended(text) if self.repair else writable(text) for text in distinct[start : start + chunk]]
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
            rows.append(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float())
        place = {prompt: i for i, prompt in enumerate(distinct)}
        return F.normalize(torch.cat(rows), dim=-1)[[place[prompt] for prompt in prompts]]


def _transformers_model(path: str, dtype: torch.dtype) -> Any:
    config = from_pretrained(AutoConfig, path)
    if config.model_type != "clip":
        raise RewardError(f"{path} holds a {config.model_type} model, not a CLIPModel")
    return network(CLIPModel, path, strict=True, dtype=dtype)


def mended(text: str) -> str:
    """``text`` as OpenAI's and open_clip's tokenizers read it."""
    return html.unescape(html.unescape(ftfy.fix_text(writable(text)))).strip()
