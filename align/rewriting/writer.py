"""Rewriters: a causal language model in this process, or one behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from align.rewriting.words import cleaned
from rewards.base import RewardError
from rewards.judges.asking import Question
from rewards.judges.endpoint import EndpointJudge
from rewards.judges.lora import load_lora
from rewards.networks.hub import find_model, from_pretrained, network

if TYPE_CHECKING:
    from align.rewriting.settings import AnyWriter, LocalWriter, Reply


class Writer(Protocol):
    """A model that replies to instructions."""

    def write(self, asked: Sequence[str], seeds: Sequence[int], reply: Reply) -> list[str]:
        """A rewrite for each instruction, "" if there is none; a rewrite depends on its own seed alone."""


def build_writer(settings: AnyWriter, device: torch.device | str) -> Writer:
    """The writer of a config.

    Raises:
        RewardError: it cannot be loaded.
    """
    return LocalLM.load(settings, device) if settings.kind == "local" else RemoteLM(settings)


class RemoteLM:
    """A server's model, with one request per rewrite."""

    def __init__(self, settings: Any) -> None:
        self.judge = EndpointJudge(settings)

    def write(self, asked: Sequence[str], seeds: Sequence[int], reply: Reply) -> list[str]:
        """See :class:`Writer`; RewardError if no request was answered."""
        questions = [Question((text,)) for text in asked]
        found = self.judge.sample(questions, reply.longest, reply.temperature, seeds)
        if asked and len(found.reasons) == len(asked):
            raise RewardError(f"the rewriter sent no text: {found.reasons[0]}")
        return [cleaned(text or "") for text in found.values]


class LocalLM:
    """Model and tokenizer. Samples with a random generator per reply, so a reply does not depend on its batch."""

    def __init__(self, model: Any, tokenizer: Any, chunk: int) -> None:
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        added = tokenizer.added_tokens_decoder.values()
        self.control = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self.longest = model.config.max_position_embeddings

    @classmethod
    def load(cls, settings: LocalWriter, device: torch.device | str) -> LocalLM:
        """Read both, and the LoRA.

        Raises:
            RewardError: not there, damaged, not a causal language model, or without a chat template.
        """
        path = find_model(settings.model, "rewriter")
        from_pretrained(AutoConfig, path)
        tokenizer = from_pretrained(AutoTokenizer, path)
        if not tokenizer.chat_template:
            raise RewardError(f"the tokenizer in {path} has no chat template; take the model's Instruct version")
        model = network(AutoModelForCausalLM, path, dtype=getattr(torch, settings.dtype))
        if settings.lora is not None:
            load_lora(model, Path(settings.lora), "writer.lora")
        return cls(model.requires_grad_(False).eval().to(device), tokenizer, settings.chunk)

    @property
    def end(self) -> int:
        """The token that ends a reply."""
        return int(self.tokenizer.eos_token_id)

    def tokens(self, asked: str) -> list[int]:
        """An instruction in the chat format; control tokens inside it are plain characters."""
        for token in self.control:
            asked = asked.replace(token, f"{token[0]} {token[1:]}")
        chat = [{"role": "user", "content": asked}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as it stands, none added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def text(self, reply: Sequence[int]) -> str:
        """The rewrite in a reply's tokens."""
        return cleaned(self.tokenizer.decode(list(reply), skip_special_tokens=True))

    def write(self, asked: Sequence[str], seeds: Sequence[int], reply: Reply) -> list[str]:
        """See :class:`Writer`."""
        rows = [self.tokens(text) for text in asked]
        return [self.text(ids) for ids in self.sample(rows, seeds, reply)]

    @torch.no_grad()
    def sample(self, asked: Sequence[list[int]], seeds: Sequence[int], reply: Reply) -> list[list[int]]:
        """Tokens of a reply to each instruction, its end included where it was reached.

        Raises:
            RewardError: instruction and reply are longer than the model reads.
        """
        found: list[list[int]] = []
        if asked and (most := max(map(len, asked)) + reply.longest) > self.longest:
            raise RewardError(
                f"instruction and reply have {most} tokens, the rewriter's limit is {self.longest}; set a smaller "
                "reply.longest"
            )
        for start in range(0, len(asked), self.chunk):
            some = slice(start, start + self.chunk)
            found += self._sample(list(asked[some]), seeds[some], reply)
        return found

    def _sample(self, asked: list[list[int]], seeds: Sequence[int], reply: Reply) -> list[list[int]]:
        device, width = self.model.device, max(map(len, asked))
        ids = torch.tensor([[self.end] * (width - len(row)) + row for row in asked], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked], device=device)
        chance = torch.stack([torch.rand(reply.longest, generator=seeded(seed)) for seed in seeds]).to(device)
        said, past, done = ids[:, :0], None, torch.zeros(len(asked), dtype=torch.bool, device=device)
        for place in range(reply.longest):
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=past, use_cache=True)
            past, logits = out.past_key_values, out.logits[:, -1].float()
            ids = picked(logits, reply.temperature, chance[:, place])[:, None]
            ids = torch.where(done[:, None], self.end, ids)
            said, mask = torch.cat([said, ids], 1), torch.cat([mask, torch.ones_like(ids)], 1)
            done |= ids[:, 0] == self.end
            if bool(done.all()):
                break
        rows = said.tolist()
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]

    def logps(
        self, asked: Sequence[list[int]], replies: Sequence[list[int]], temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each reply's tokens ``[n, L]``, 0 beyond its end, and where it has tokens ``[n, L]``.

        Args:
            temperature: of the distribution that the replies were sampled from; 0 counts as 1.
        """
        device = self.model.device
        rows = [[*first, *then] for first, then in zip(asked, replies, strict=True)]
        width, longest = max(map(len, rows)), max(map(len, replies))
        ids = torch.tensor([row + [self.end] * (width - len(row)) for row in rows], device=device)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = self.model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
        each = -F.cross_entropy((logits / (temperature or 1.0)).transpose(1, 2), ids[:, 1:], reduction="none")
        starts = torch.tensor([len(first) - 1 for first in asked], device=device)
        lengths = torch.tensor([len(then) for then in replies], device=device)
        places = torch.arange(longest, device=device)
        mask = places < lengths[:, None]
        logs = each.gather(1, (starts[:, None] + places).clamp_max(width - 2))
        return torch.where(mask, logs, 0.0), mask


def seeded(seed: int) -> torch.Generator:
    """A random generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def picked(logits: Tensor, temperature: float, chance: Tensor) -> Tensor:
    """A token per row ``[n]``: the likeliest, or the inverse of the cumulative distribution at ``chance [n]``."""
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).double().cumsum(-1)
    return torch.searchsorted(total, chance[:, None].double() * total[:, -1:]).squeeze(1).clamp_max(logits.shape[1] - 1)
