"""Qwen2-VL with a linear head read at special tokens, on tensors: clips and a question in, marks out.

As VideoAlign runs it: the language model sees plain positions 0, 1, 2 ..., not Qwen2-VL's three-dimensional ones,
because its forward pass hands over embeddings alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from rewards.base import RewardError
from rewards.hub import from_pretrained, weight_file
from rewards.preprocess import Preprocess
from rewards.state_dicts import check_keys, read_state_dict, skeleton

SMALLEST, LARGEST = 128 * 28 * 28, 200_704
"""Pixels of a frame, at least and at most."""
RATE, FEWEST, MOST = 2, 4, 768
"""Frames a second that are looked at, and how many of a clip at least and at most."""


@dataclass(frozen=True)
class Qwen2VLReward:
    """The network, its head ``[1 or n, D]``, its tokenizer, and the ids of the n tokens the head reads at."""

    model: Any
    head: Tensor
    tokenizer: Any
    tokens: Tensor

    @classmethod
    def load(
        cls, file: str, base: str, tokens: Sequence[str], alpha: float, dtype: str, device: torch.device | str
    ) -> Qwen2VLReward:
        """Read a checkpoint of VideoAlign, its LoRA merged, its keys in the names of this transformers.

        Raises:
            RewardError: not there, damaged, or not such a checkpoint of that base.
        """
        config = from_pretrained(AutoConfig, base)
        if config.model_type != "qwen2_vl":
            raise RewardError(f"{base} holds a {config.model_type} model, not Qwen2-VL")
        tokenizer = from_pretrained(AutoTokenizer, base)
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        path = weight_file(file, "published as KwaiVGI/VideoReward")
        state = merged(renamed(read_state_dict(path)), alpha)
        head = state.pop("rm_head.weight", None)
        words = state.get("language_model.embed_tokens.weight")
        if head is None or words is None or head.ndim != 2 or len(head) not in (1, len(tokens)):
            raise RewardError(
                f"{path} is no checkpoint of VideoReward: no head of {len(tokens)} marks, or no embeddings"
            )
        if len(words) < len(tokenizer):
            raise RewardError(f"the tokenizer of {base} knows {len(tokenizer)} tokens, {path} only {len(words)}")
        config.text_config.vocab_size = len(words)
        check_keys(state, skeleton(lambda: Qwen2VLModel(config)), str(path), f"a VideoReward on {base}")
        model = Qwen2VLModel(config).to(getattr(torch, dtype))
        model.load_state_dict(state)
        model.requires_grad_(False).eval().to(device)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(tokens)), device=device)
        return cls(model, head.to(model.device, model.dtype), tokenizer, ids)

    def __call__(self, clip: Tensor, question: str) -> Tensor:
        """Marks ``[n]`` float32 of ``clip [F, 3, H, W]`` in [0, 1], in the order of the tokens."""
        patches, grid = patched(clip.to(self.model.device), self.model.config.vision_config)
        seen = self.model.visual(patches.to(self.model.dtype), grid_thw=grid).pooler_output
        ids = self._ids(question, len(seen))
        embeddings = self.model.get_input_embeddings()(ids)[None]
        shown = (ids == self.model.config.video_token_id)[None, :, None]
        embeddings = embeddings.masked_scatter(shown, seen.to(embeddings.dtype))
        plain = torch.arange(len(ids), device=ids.device).expand(3, 1, -1)
        states = self.model.language_model(inputs_embeds=embeddings, position_ids=plain).last_hidden_state[0]
        marks = states[[int((ids == token).nonzero()) for token in self.tokens]] @ self.head.T
        return (marks.diagonal() if len(self.head) > 1 else marks[:, 0]).float()

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, for a digest."""
        return {**self.model.state_dict(), "rm_head.weight": self.head}

    def _ids(self, question: str, length: int) -> Tensor:
        """Token ids of the chat, with ``length`` places for the clip."""
        content = [{"type": "video"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, device=self.model.device)
        place = (ids == self.model.config.video_token_id).nonzero().flatten().tolist()
        if len(place) != 1:
            raise ValueError(f"the question has {len(place)} places for a clip, not one")
        return torch.cat([ids[: place[0]], ids[place].expand(length), ids[place[0] + 1 :]])


def frames_at(length: int, rate: float, count: int | None = None) -> list[int]:
    """Which of ``length`` frames at ``rate`` a second are looked at: two a second, evenly from the first to the last.

    >>> frames_at(81, 16.0)
    [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    >>> frames_at(5, 16.0), frames_at(1, 16.0), frames_at(9, 16.0, 3)
    ([0, 1, 3, 4], [0], [0, 4, 8])
    """
    if count is None:
        most = max(min(MOST, length) // 2 * 2, 1)
        count = round(min(max(length / rate * RATE, FEWEST), most) / 2) * 2
    count = min(max(count, 1), length)
    return torch.linspace(0, length - 1, count).round().long().tolist()


def fitting(height: int, width: int, factor: int) -> tuple[int, int]:
    """(height, width) in multiples of ``factor``, in about the same ratio, within the limits of pixels.

    >>> fitting(480, 832, 28), fitting(64, 64, 28)
    ((336, 588), (336, 336))
    """
    sides = [round(side / factor) * factor for side in (height, width)]
    if sides[0] * sides[1] > LARGEST:
        shrink = math.sqrt(height * width / LARGEST)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < SMALLEST:
        grow = math.sqrt(SMALLEST / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patched(clip: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """``[F, 3, H, W]`` in [0, 1] -> Qwen2-VL's rows of patches ``[P, 3 * t * p * p]`` and their grid ``[1, 3]``.

    Frames are resized (bicubic, antialiased) and normalised as CLIP's; an odd clip's last frame is shown twice. Rows go
    by time, then by squares of patches that are merged into one token.
    """
    patch, merge, span = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    target = fitting(clip.shape[-2], clip.shape[-1], patch * merge)
    frames = Preprocess(target, "exact", eight_bit=False)(clip)
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % span, -1, -1, -1)])
    grid = [len(frames) // span, target[0] // patch, target[1] // patch]
    rows = frames.reshape(grid[0], span, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch)
    rows = rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
    return rows, torch.tensor([grid], device=clip.device)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of older and newer transformers and of PEFT -> those of ``Qwen2VLModel``; the language head is left out."""
    found = {}
    for key, value in state.items():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
        if name.startswith("lm_head.") or ".original_module." in name:
            continue
        if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            name = f"language_{name}".replace("language_model.", "model.language_model.", 1)
        found[name.removeprefix("model.")] = value
    return found


def merged(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Weights with PEFT's LoRA added to them: W + alpha / rank B A.

    Raises:
        RewardError: a LoRA without its second half or without the layer it changes.
    """
    whole = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    for key, down in state.items():
        if ".lora_A." not in key:
            continue
        up, name = state.get(key.replace(".lora_A.", ".lora_B.")), key.split(".lora_A.")[0] + ".weight"
        if up is None or name not in whole:
            raise RewardError(
                f"the LoRA {key} has no {'lora_B' if up is None else name}; give model.pth, which has both"
            )
        weight = whole[name]
        whole[name] = (weight.float() + alpha / len(down) * up.float() @ down.float()).to(weight.dtype)
    return whole
