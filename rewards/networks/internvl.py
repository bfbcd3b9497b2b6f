"""InternVL with a head that attends to several of its layers, on tensors: videos and questions in, scores out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, InternVLModel

from rewards.base import RewardError
from rewards.networks.hub import from_pretrained, weight_file
from rewards.networks.preprocess import Preprocess
from rewards.networks.query_attention import QueryAttention, chosen_layers
from rewards.networks.state_dicts import check_keys, counted, read_state_dict, skeleton

START, PLACE, END = "<img>", "<IMG_CONTEXT>", "</img>"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NAMES = (  # name in InternVL's own code -> name in transformers
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"^vision_model\.", "vision_tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "language_model."),
)
_HEAD_NAMES = (  # name in SoliReward's code -> name in QueryAttention
    (r"^attention_query_first_layer\.query\.weight$", "first"),
    (r"^attention_query_first_layer\.attention\.0\.", "chain.0."),
    (r"^attention_query_other_layers\.(\d+)\.", lambda found: f"chain.{int(found[1]) + 1}."),
    (r"^attention_query_final_layer\.query\.weight$", "last"),
    (r"^attention_query_final_layer\.attention\.0\.", "end."),
    (r"^reward_head\.0\.", "score.0."),
    (r"^reward_head\.3\.", "score.2."),
)


@dataclass(frozen=True)
class InternVLReward:
    """The network, its head, its tokenizer, and the language model's layers that the head reads."""

    model: Any
    head: QueryAttention
    tokenizer: Any
    layers: tuple[int, ...]

    @classmethod
    def load(
        cls, file: str, base: str, layers: Sequence[int] | None, dtype: str, device: torch.device | str, hint: str
    ) -> InternVLReward:
        """Read a checkpoint in the layout of InternVL's own code.

        Args:
            layers: that the head reads, counted from 1; by default equally far apart up to the last.
            hint: where the weights are published.

        Raises:
            RewardError: not there, damaged, or not such a checkpoint of that base.
        """
        config = from_pretrained(AutoConfig, base)
        if config.model_type != "internvl":
            raise RewardError(f"{base} holds a {config.model_type} model, not InternVL in transformers' own layout")
        tokenizer = from_pretrained(AutoTokenizer, base)
        if len(tokenizer(PLACE, add_special_tokens=False).input_ids) != 1:
            raise RewardError(f"the tokenizer of {base} has no token {PLACE}")
        path = weight_file(file, hint)
        state = renamed(read_state_dict(path))
        head_state = {key.removeprefix("head."): state.pop(key) for key in list(state) if key.startswith("head.")}
        words, what = state.get("language_model.embed_tokens.weight"), f"a SoliReward on {base}"
        known = config.text_config.vocab_size = config.text_config.vocab_size if words is None else len(words)
        check_keys(state, skeleton(lambda: InternVLModel(config)), str(path), what)
        if known < len(tokenizer):
            raise RewardError(f"the tokenizer of {base} has {len(tokenizer)} tokens, {path} only {known}")
        width, reads = config.text_config.hidden_size, counted(head_state, "chain.")
        check_keys(head_state, skeleton(lambda: QueryAttention(width, max(reads, 1))), str(path), what)
        chosen = chosen_layers(layers, reads, config.text_config.num_hidden_layers)
        precision = getattr(torch, dtype)
        model, head = InternVLModel(config), QueryAttention(width, reads)
        model.load_state_dict(state)
        head.load_state_dict(head_state)
        for module in (model, head):
            module.to(device, precision).requires_grad_(False).eval()
        return cls(model, head, tokenizer, chosen)

    def __call__(self, videos: Tensor, questions: Sequence[tuple[str, str]]) -> Tensor:
        """Scores ``[b]`` float32 of ``videos [b, F, 3, H, W]`` in [0, 1].

        Args:
            questions: of each video the system's and the user's words; the frames are behind the latter.
        """
        size = tuple(self.model.config.vision_config.image_size)
        shrink = Preprocess(size, "exact", mean=MEAN, std=DEVIATION)
        pixels = shrink(videos.to(self.model.device).flatten(0, 1)).to(self.model.dtype)
        seen = self.model.get_image_features(pixels).pooler_output
        rows = [self._ids(*asked, videos.shape[1], seen.shape[1]) for asked in questions]
        ids = pad_sequence(rows, batch_first=True).to(seen.device)
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(seen.device).bool()
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter((ids == self.place)[..., None], seen.to(embeddings.dtype))
        states = self.model.language_model(
            inputs_embeds=embeddings, attention_mask=real.long(), output_hidden_states=True, use_cache=False
        ).hidden_states
        return self.head([states[layer] for layer in self.layers], states[-1], real).float()

    @property
    def place(self) -> int:
        """The token that stands for a part of a frame."""
        return self.tokenizer.convert_tokens_to_ids(PLACE)

    @property
    def control(self) -> set[str]:
        """Texts that are control tokens of this model."""
        return {*self.tokenizer.all_special_tokens, START, PLACE, END}

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, for a digest."""
        return {**self.model.state_dict(), **{f"head.{key}": value for key, value in self.head.state_dict().items()}}

    def _ids(self, system: str, user: str, frames: int, length: int) -> Tensor:
        """Token ids of the chat, with ``length`` places for every frame."""
        shown = "".join(f"Frame{i + 1}: {START}{PLACE * length}{END}\n" for i in range(frames))
        chat = [{"role": "system", "content": system}, {"role": "user", "content": user + shown}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        places = int((ids == self.place).sum())
        if places != frames * length:
            raise ValueError(f"the question has {places} places for {frames} frames of {length} tokens")
        return ids


def frames_at(length: int, count: int) -> list[int]:
    """The ``count`` of ``length`` frames that are looked at, as InternVL's loader takes them; few are repeated.

    >>> frames_at(81, 8), frames_at(5, 8), frames_at(1, 2)
    ([5, 15, 25, 35, 45, 55, 65, 75], [0, 0, 1, 2, 2, 2, 3, 4], [0, 0])
    """
    step = (length - 1) / count
    return [int(step / 2 + round(step * i)) for i in range(count)]


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of InternVL's own code -> ``InternVLModel``'s, and ``head.`` before :class:`QueryAttention`'s.

    Queries, keys and values of the vision tower are one layer there; the language head is left out.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("language_model.lm_head."):
            continue
        name = _replaced(key, _NAMES)
        head = _replaced(name, _HEAD_NAMES)
        if ".attention.qkv." in name:
            parts = zip("qkv", value.chunk(3), strict=False)
            found |= {name.replace(".qkv.", f".{letter}_proj."): part.clone() for letter, part in parts}
        else:
            found[f"head.{head}" if head != name else name] = value
    return found


def _replaced(name: str, pairs: Sequence[tuple[str, Any]]) -> str:
    for pattern, to in pairs:
        name = re.sub(pattern, to, name)
    return name
