"""Qwen2-VL with a head on special tokens, on tensors: an image or video and a question in, scores out.

As VideoAlign and HPSv3 run it: the language model sees plain positions 0, 1, 2 ..., not Qwen2-VL's three-dimensional
ones, because their forward pass passes only embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

from rewards.base import RewardError
from rewards.networks.hub import from_pretrained, weight_file
from rewards.networks.preprocess import Preprocess
from rewards.networks.state_dicts import check_keys, read_state_dict, skeleton

SMALLEST, LARGEST = 128 * 28 * 28, 200_704
"""Pixels of a frame, at least and at most."""
RATE, FEWEST, MOST = 2, 4, 768
"""Frames per second that are used, and the least and largest number of a video."""


@dataclass(frozen=True)
class Published:
    """Description of a published checkpoint.

    Args:
        name: of the reward; ``place`` where its weights are published.
        tokens: the n tokens that the head reads at.
        medium: what is before the question.
        pixels: of a frame, at least and at most.
    """

    name: str
    place: str
    tokens: tuple[str, ...]
    medium: Literal["image", "video"]
    pixels: tuple[int, int]


@dataclass(frozen=True)
class Qwen2VLReward:
    """The network, its head ``[n, D] -> [n, K]``, its tokenizer, and the ids of the n tokens the head reads at."""

    model: Any
    head: nn.Module
    tokenizer: Any
    tokens: Tensor
    published: Published

    @classmethod
    def load(
        cls, published: Published, file: str, base: str, alpha: float, dtype: str, device: torch.device | str
    ) -> Qwen2VLReward:
        """Read a checkpoint, its LoRA merged, its keys in the names of this transformers.

        Raises:
            RewardError: not there, damaged, or not such a checkpoint of that base.
        """
        config = from_pretrained(AutoConfig, base)
        if config.model_type != "qwen2_vl":
            raise RewardError(f"{base} holds a {config.model_type} model, not Qwen2-VL")
        tokenizer = from_pretrained(AutoTokenizer, base)
        tokenizer.add_tokens(list(published.tokens), special_tokens=True)
        path = weight_file(file, f"published as {published.place}")
        state = merged(renamed(read_state_dict(path)), alpha)
        head = read_head({key: state.pop(key) for key in list(state) if key.startswith("rm_head.")})
        words = state.get("language_model.embed_tokens.weight")
        width = config.text_config.hidden_size
        if head is None or words is None or next(head.parameters()).shape[1] != width:
            raise RewardError(
                f"{path} is not a checkpoint of {published.name}: it has no head of that kind, or no embeddings"
            )
        if len(words) < len(tokenizer):
            raise RewardError(f"the tokenizer of {base} has {len(tokenizer)} tokens, {path} only {len(words)}")
        config.text_config.vocab_size = len(words)
        check_keys(state, skeleton(lambda: Qwen2VLModel(config)), str(path), f"a {published.name} on {base}")
        model = Qwen2VLModel(config).to(getattr(torch, dtype))
        model.load_state_dict(state)
        model.requires_grad_(False).eval().to(device)
        head = head.requires_grad_(False).to(
            model.device, model.dtype if isinstance(head, nn.Linear) else torch.float32
        )
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(published.tokens)), device=device)
        return cls(model, head, tokenizer, ids, published)

    def __call__(self, video: Tensor, question: str) -> Tensor:
        """Outputs of the head at each of the tokens, ``[n, K]`` float32, for ``video [F, 3, H, W]`` in [0, 1]."""
        video, config = video.to(self.model.device), self.model.config.vision_config
        patches, grid = patched(video, config, self.published.pixels, self.published.medium)
        seen = self.model.visual(patches.to(self.model.dtype), grid_thw=grid).pooler_output
        ids = self._ids(question, len(seen))
        embeddings = self.model.get_input_embeddings()(ids)[None]
        embeddings = embeddings.masked_scatter((ids == self._place)[None, :, None], seen.to(embeddings.dtype))
        plain = torch.arange(len(ids), device=ids.device).expand(3, 1, -1)
        states = self.model.language_model(inputs_embeds=embeddings, position_ids=plain).last_hidden_state[0]
        read = states[[int((ids == token).nonzero()) for token in self.tokens]]
        return self.head(read.to(next(self.head.parameters()).dtype)).float()

    def each(
        self, videos: Tensor, prompts: Sequence[str], marks: Callable[[Tensor, str], Tensor], width: int
    ) -> tuple[Tensor, dict[int, str]]:
        """``marks(video [F, 3, H, W], prompt) -> [width]`` of every sample as ``[N, width]``, and why some are NaN.

        A prompt that holds a control token of the model is not read: it could end the question.
        """
        control, rows, reasons = self.control, [], dict[int, str]()
        for index, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
            if any(token in prompt for token in control):
                reasons[index] = "the prompt holds a control token of the model"
                rows.append(torch.full((width,), torch.nan, device=videos.device))
            else:
                rows.append(marks(video, prompt).to(videos.device))
        return torch.stack(rows) if rows else videos.new_zeros(0, width), reasons

    @property
    def outputs(self) -> int:
        """K."""
        return len(list(self.head.parameters())[-1])

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, for a digest."""
        return {**self.model.state_dict(), **{f"rm_head.{key}": value for key, value in self.head.state_dict().items()}}

    @property
    def _place(self) -> int:
        """The token that stands for a part of the image or video."""
        config = self.model.config
        return config.video_token_id if self.published.medium == "video" else config.image_token_id

    @property
    def control(self) -> set[str]:
        """Texts that are control tokens of this model."""
        return {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab(), *self.published.tokens}

    def _ids(self, question: str, length: int) -> Tensor:
        """Token ids of the chat, with ``length`` places for the video."""
        content = [{"type": self.published.medium}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, device=self.model.device)
        place = (ids == self._place).nonzero().flatten().tolist()
        if len(place) != 1:
            raise ValueError(f"the question has {len(place)} places for a {self.published.medium}, not one")
        return torch.cat([ids[: place[0]], ids[place].expand(length), ids[place[0] + 1 :]])


def read_head(state: Mapping[str, Tensor]) -> nn.Module | None:
    """The head of these weights: VideoAlign's linear layer, HPSv3's three with rectifiers between; None if neither."""
    found = {key.removeprefix("rm_head."): value for key, value in state.items()}

    def layer(name: str, bias: bool = True) -> nn.Linear:
        outputs, inputs = found[name].shape
        return nn.Linear(inputs, outputs, bias=bias)

    if any(value.ndim != (2 if key.endswith("weight") else 1) for key, value in found.items()):
        return None
    if list(found) == ["weight"]:
        head: nn.Module = layer("weight", bias=False)
    elif sorted(found) == [f"{i}.{part}" for i in (0, 3, 5) for part in ("bias", "weight")]:
        first, second, last = (layer(f"{i}.weight") for i in (0, 3, 5))
        head = nn.Sequential(first, nn.ReLU(), nn.Identity(), second, nn.ReLU(), last)  # in the middle a dropout
    else:
        return None
    head.load_state_dict(found)
    return head


def frames_at(length: int, rate: float, count: int | None = None) -> list[int]:
    """Frames out of ``length`` at ``rate`` a second that are used: two a second, evenly from the first to the last.

    An even number, as the network sees them two by two; a given ``count`` is rounded, halves to a multiple of four.

    >>> frames_at(81, 16.0)
    [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    >>> frames_at(5, 16.0), frames_at(1, 16.0), frames_at(9, 16.0, 3)
    ([0, 1, 3, 4], [0], [0, 3, 5, 8])
    """
    most = max(min(MOST, length) // 2 * 2, 1)
    wanted = min(max(length / rate * RATE, FEWEST), most) if count is None else count
    count = min(max(round(wanted / 2) * 2, 1), length)
    return torch.linspace(0, length - 1, count).round().long().tolist()


def fitting(height: int, width: int, factor: int, pixels: tuple[int, int] = (SMALLEST, LARGEST)) -> tuple[int, int]:
    """(height, width) in multiples of ``factor``, in about the same ratio, within the limits of pixels.

    >>> fitting(480, 832, 28), fitting(64, 64, 28)
    ((336, 588), (336, 336))
    """
    smallest, largest = pixels
    sides = [round(side / factor) * factor for side in (height, width)]
    if sides[0] * sides[1] > largest:
        shrink = math.sqrt(height * width / largest)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif sides[0] * sides[1] < smallest:
        grow = math.sqrt(smallest / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patched(
    video: Tensor,
    config: Any,
    pixels: tuple[int, int] = (SMALLEST, LARGEST),
    medium: Literal["image", "video"] = "video",
) -> tuple[Tensor, Tensor]:
    """``[F, 3, H, W]`` in [0, 1] -> Qwen2-VL's rows of patches ``[P, 3 * t * p * p]`` and their grid ``[1, 3]``.

    Frames are resized as by Qwen's code, to whole 1/255 (an image by Pillow, a video by torchvision on 8-bit tensors),
    and normalised as CLIP's. An odd video's last frame is shown twice. Rows go by time, then by squares of patches that
    are merged into one token.
    """
    patch, merge, span = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    target = fitting(video.shape[-2], video.shape[-1], patch * merge, pixels)
    frames = Preprocess(target, "exact", eight_bit=True if medium == "image" else "tensor")(video)
    frames = torch.cat([frames, frames[-1:].expand(-len(frames) % span, -1, -1, -1)])
    grid = [len(frames) // span, target[0] // patch, target[1] // patch]
    rows = frames.reshape(grid[0], span, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch)
    rows = rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
    return rows, torch.tensor([grid], device=video.device)


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
