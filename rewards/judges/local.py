"""A judge in this process: Qwen2-VL, Qwen2.5-VL and Qwen3-VL of transformers, with gradients to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLImageProcessorPil,
)

from rewards.base import RewardError
from rewards.digest import digest
from rewards.judges.asking import Question, Replies
from rewards.judges.lora import load_lora
from rewards.judges.models import Local, Needs
from rewards.judges.pixels import Patches
from rewards.judges.replies import spellings
from rewards.networks.hub import find_model, from_pretrained, network

Reply: TypeAlias = "str | Sequence[int]"
"""A text, or tokens as a model wrote them."""
Choose: TypeAlias = "Callable[[list[int]], Callable[[Tensor, Tensor], Tensor]]"
"""Numbers of questions -> ``(ids [n, L], scores [n, vocabulary]) -> scores`` of their next tokens."""
KNOWN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Batch:
    """Some questions as the model reads them, padded on the left.

    Args:
        rows: which of the questions these are.
        lengths: tokens of each one's reply, 0 if it has none.
        inputs: arguments of the model.
    """

    rows: list[int]
    lengths: list[int]
    inputs: dict[str, Tensor]


class LocalJudge:
    """Model, tokenizer and patches, ready to use."""

    differentiable = True

    def __init__(self, settings: Local, model: Any, tokenizer: Any, patches: Patches) -> None:
        self.settings, self.model, self.tokenizer, self.patches = settings, model, tokenizer, patches
        self.image_token = model.config.image_token_id
        self.longest = min(settings.longest, model.config.text_config.max_position_embeddings)
        added = tokenizer.added_tokens_decoder.values()
        self.control = sorted((token.content for token in added if token.special), key=len, reverse=True)

    @classmethod
    def load(cls, settings: Local, device: torch.device | str) -> LocalJudge:
        """Read all three.

        Raises:
            RewardError: not there, damaged, another kind of model, no chat template.
        """
        path = find_model(settings.model, "judge")
        config = from_pretrained(AutoConfig, path)
        if config.model_type not in KNOWN:
            raise RewardError(f"{path} holds a {config.model_type} model; a local judge is one of {', '.join(KNOWN)}")
        tokenizer = from_pretrained(AutoTokenizer, path)
        if not tokenizer.chat_template:
            raise RewardError(f"the tokenizer in {path} has no chat template; take the model's Instruct version")
        patches = Patches.of_processor(from_pretrained(Qwen2VLImageProcessorPil, path), settings.pixels)
        model = network(
            AutoModelForImageTextToText,
            path,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=settings.attention,
        )
        if settings.lora is not None:
            load_lora(model, Path(settings.lora))
        return cls(settings, model.requires_grad_(False).eval().to(device), tokenizer, patches)

    def fingerprint(self) -> str:
        """Digest of the weights."""
        return digest(self.model.state_dict())

    def ready(self, needs: Needs, answers: Sequence[Sequence[str]]) -> None:
        """Raises RewardError if an answer is not a single token."""
        self.token_ids(answers)

    def token_ids(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """For each answer the tokens that are a spelling of it.

        Raises:
            RewardError: no spelling is a single token, or two answers share one.
        """
        encode = self.tokenizer.encode
        found = []
        for words in answers:
            tokens = [encode(spelling, add_special_tokens=False) for spelling in spellings(words)]
            found.append(sorted({token[0] for token in tokens if len(token) == 1}))
            if not found[-1]:
                raise RewardError(f"no spelling of the answer {words[0]!r} is one token of this judge's tokenizer")
        every = [token for ids in found for token in ids]
        if len(set(every)) < len(every):
            raise RewardError(f"two of the answers {[words[0] for words in answers]} share a token")
        return found

    def answers(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Replies:
        """See :class:`rewards.judges.asking.Judge`."""
        ids = [torch.tensor(tokens, device=self.model.device) for tokens in self.token_ids(answers)]
        found, reasons = self._empty(len(questions), len(ids))
        for batch in self._batches(questions, [""] * len(questions), reasons):
            ends = self._logits(batch, 1)[:, -1].log_softmax(-1)
            rows = torch.stack([ends[:, tokens].logsumexp(-1) for tokens in ids], 1)
            found = found.index_copy(0, torch.tensor(batch.rows, device=rows.device), rows)
        return Replies(found, reasons)

    def likelihoods(self, questions: Sequence[Question], replies: Sequence[str]) -> Replies:
        """See :class:`rewards.judges.asking.Judge`."""
        found, reasons = self._empty(len(questions), 2)
        for asked, logs, lengths in self.reply_logs(questions, replies, reasons):
            rows = torch.stack([logs.sum(1), lengths.float()], 1)
            found = found.index_copy(0, torch.tensor(asked, device=rows.device), rows)
        return Replies(found, reasons)

    def reply_logs(
        self,
        questions: Sequence[Question],
        replies: Sequence[Reply],
        reasons: dict[int, str],
        temperature: float = 1.0,
        banned: Sequence[int] = (),
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Log-probabilities of the replies' tokens, a batch at a time: (which questions, ``[n, L]``, lengths ``[n]``).

        Beyond a reply's length there is 0. What cannot be asked gets a reason.

        Args:
            temperature: of the distribution.
            banned: tokens that have no probability.
        """
        for batch in self._batches(questions, replies, reasons):
            longest = max(batch.lengths)
            ids = batch.inputs["input_ids"][:, -longest:]
            logits = self._logits(batch, longest + 1)[:, :-1] / temperature
            if banned:
                logits = logits.index_fill(2, torch.tensor(list(banned), device=logits.device), -torch.inf)
            each = -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
            lengths = torch.tensor(batch.lengths, device=ids.device)
            at = torch.arange(longest, device=ids.device) + longest - lengths[:, None]  # replies end a row
            logs = each.gather(1, at.clamp_max(longest - 1))
            yield batch.rows, torch.where(at < longest, logs, 0.0), lengths

    def write(self, questions: Sequence[Question], longest: int) -> Replies:
        """See :class:`rewards.judges.asking.Judge`."""
        reasons: dict[int, str] = {}
        tokens = self.reply_tokens(questions, longest, reasons)
        texts = [None if ids is None else self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        return Replies(texts, reasons)

    @torch.no_grad()
    def reply_tokens(
        self, questions: Sequence[Question], longest: int, reasons: dict[int, str], choose: Choose | None = None
    ) -> list[list[int] | None]:
        """Tokens of a reply to each question, its end included where it was reached; None if there is a reason.

        Args:
            choose: makes the function that picks the tokens of some of the questions; the likeliest ones if None.
        """
        found: list[list[int] | None] = [None] * len(questions)
        greedy = GenerationConfig(
            max_new_tokens=longest,
            do_sample=False,
            eos_token_id=list(self.ends),
            pad_token_id=self._padding,
        )
        for batch in self._batches(questions, [""] * len(questions), reasons, longest):
            how = {} if choose is None else {"logits_processor": [choose(batch.rows)]}
            ids = self.model.generate(**batch.inputs, generation_config=greedy, **how)
            for row, said in zip(batch.rows, ids[:, batch.inputs["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((place + 1 for place, token in enumerate(said) if token in self.ends), len(said))
                found[row] = said[:length]
        return found

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        end = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return tuple(end) if isinstance(end, list) else (end,)

    @property
    def _padding(self) -> int:
        token = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if token is None else token

    def _empty(self, count: int, width: int) -> tuple[Tensor, dict[int, str]]:
        return torch.full((count, width), torch.nan, device=self.model.device), {}

    def _logits(self, batch: Batch, last: int) -> Tensor:
        """Float32 logits ``[b, last, vocabulary]`` at the last positions."""
        return self.model(**batch.inputs, use_cache=False, logits_to_keep=last).logits.float()

    def _batches(
        self, questions: Sequence[Question], replies: Sequence[Reply], reasons: dict[int, str], more: int = 0
    ) -> Iterator[Batch]:
        """Questions with their replies, a batch at a time; those that are too long get a reason instead.

        Args:
            more: tokens that will be written.
        """
        fitting: list[tuple[int, list[int], int]] = []
        for row, (asked, reply) in enumerate(zip(questions, replies, strict=True)):
            tail = list(reply) if not isinstance(reply, str) else self.encode(self.plain(reply)) if reply else []
            ids = [*self.tokens(asked), *tail]
            if len(ids) + more > self.longest:
                said = f"the question has {len(ids) + more} tokens, its reply included"
                reasons[row] = f"{said}; the limit is {self.longest}, the smaller of judge.longest and the model's own"
            else:
                fitting.append((row, ids, len(tail)))
        for start in range(0, len(fitting), self.settings.chunk):
            some = fitting[start : start + self.settings.chunk]
            rows = [row for row, _, _ in some]
            inputs = self.inputs([ids for _, ids, _ in some], [questions[row] for row in rows])
            yield Batch(rows, [length for _, _, length in some], inputs)

    def tokens(self, question: Question) -> list[int]:
        """The question in the model's chat format, every image as many tokens as it will fill."""
        content = [
            {"type": "text", "text": self.plain(part)} if isinstance(part, str) else {"type": "image"}
            for part in question.content
        ]
        chat = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        sizes = [self.patches.tokens(part) for part in question.content if isinstance(part, Tensor)]
        ids = self.encode(text)
        places = ids.count(self.image_token)
        if places != len(sizes):
            raise RewardError(f"the chat template of {self.settings.model} includes {places} of {len(sizes)} images")
        left = iter(sizes)
        return [token for one in ids for token in ([one] * next(left) if one == self.image_token else [one])]

    def plain(self, text: str) -> str:
        """``text`` without control tokens: a space behind the first character makes them characters."""
        for token in self.control:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as it stands, none added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def inputs(self, rows: list[list[int]], questions: list[Question]) -> dict[str, Tensor]:
        """Arguments of the model for these tokens, padded on the left, and the images of their questions."""
        device, width = self.model.device, max(map(len, rows))
        pad = self._padding
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        inputs = {"input_ids": ids, "attention_mask": real, "mm_token_type_ids": (ids == self.image_token).int()}
        images = [part.to(device) for asked in questions for part in asked.content if isinstance(part, Tensor)]
        if images:
            inputs["pixel_values"], inputs["image_grid_thw"] = self.patches(images)
        return inputs
