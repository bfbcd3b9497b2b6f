"""Heads on a vision-language model: hidden states at trained tokens behind a question about a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.judges.asking import Question, question, shown
from rewards.judges.local import LocalJudge
from rewards.judges.lora import add_lora
from rewards.judges.settings import Local
from rewards.networks.state_dicts import check_keys
from rewards.training.heads import Head
from rewards.training.scorer import Scorer
from rewards.training.settings import AnyBackbone, VLMBackbone

QUERIES = "queries"
"""Name of the trained tokens in a reward folder."""


class VLMScorer(Scorer):
    """See :class:`~rewards.training.scorer.Scorer`; image or video and prompt are read together.

    Args:
        reads_prompt: whether the head wants features of the prompt alone.
    """

    fixed_text = False

    def __init__(self, settings: VLMBackbone, judge: LocalJudge, reads_prompt: bool, head: Head | None = None) -> None:
        self.settings, self.judge, self.reads_prompt = settings, judge, reads_prompt
        if head is not None:
            self.head = head
        words = judge.model.get_input_embeddings().weight
        count = settings.queries if settings.read == "query" else 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            start = torch.randn(count, words.shape[1]) * float(words.detach().float().std())
        self.queries = nn.Parameter(start.to(judge.model.device), requires_grad=False)

    @classmethod
    def load(
        cls, settings: VLMBackbone, device: torch.device | str, reads_prompt: bool, dtype: str | None = None,
        chunk: int | None = None,
    ) -> VLMScorer:  # fmt: skip
        """The frozen model.

        Args:
            dtype: of the frozen weights, other than in training.
            chunk: questions per network call, other than in training.

        Raises:
            RewardError: it is not there, damaged, or another kind of model.
        """
        local = Local(
            model=settings.model, dtype=cast(Any, dtype or settings.dtype), chunk=chunk or settings.chunk,
            pixels=settings.pixels, longest=settings.longest,
        )  # fmt: skip
        return cls(settings, LocalJudge.load(local, device), reads_prompt)

    @property
    def device(self) -> torch.device:
        return self.judge.model.device  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        return int(self.judge.model.config.text_config.hidden_size) * max(1, len(self.queries))

    # -- features -----------------------------------------------------------------------------------------------

    def question(self, media: Tensor | None, prompt: str) -> Question:
        """What is shown for a sample, or for its prompt alone."""
        images = [] if media is None else shown(media, self.settings.frames)
        medium = "image" if media is None or media.ndim == 3 else "video"
        return question(self.settings.template, prompt, *images, medium=medium)

    def text(self, prompts: Sequence[str], chunk: int) -> Tensor:
        if not self.reads_prompt:
            return torch.zeros(len(prompts), 0, device=self.device)
        return self._states([self.question(None, prompt) for prompt in prompts])

    def embed(self, media: Sequence[Tensor], prompts: Sequence[str], chunk: int) -> Tensor:
        return self._states([self.question(one, prompt) for one, prompt in zip(media, prompts, strict=True)])

    def refused(self, media: Tensor, prompts: Sequence[str]) -> dict[int, str]:
        asked = [self.question(one, prompt) for one, prompt in zip(media, prompts, strict=True)]
        return {row: why for row, one in enumerate(asked) if (why := one.refused or self._too_long(one))}

    def _too_long(self, asked: Question) -> str:
        count = len(self.judge.tokens(asked)) + len(self.queries)
        return f"the question has {count} tokens, the model reads {self.judge.longest}" * (count > self.judge.longest)

    def _states(self, questions: Sequence[Question]) -> Tensor:
        """Unit hidden states ``[N, D]`` float32 where the head reads, those of several tokens side by side.

        Raises:
            RewardError: a question cannot be asked.
        """
        for asked in questions:
            if why := asked.refused or self._too_long(asked):
                raise RewardError(why)
        size, found = self.judge.settings.chunk, []
        for start in range(0, len(questions), size):
            some = list(questions[start : start + size])
            rows = [[*self.judge.tokens(asked), *[self._place] * len(self.queries)] for asked in some]
            inputs = self.judge.inputs(rows, some)
            with self._queries():
                states = self.judge.model.model(**inputs, use_cache=False).last_hidden_state
            read = states[:, -max(1, len(self.queries)) :].float()
            found.append(F.normalize(F.normalize(read, dim=-1).flatten(1), dim=-1))
        return torch.cat(found) if found else torch.zeros(0, self.width, device=self.device)

    @property
    def _place(self) -> int:
        """A plain token, whose embedding is replaced."""
        return self.judge.encode(".")[0]

    @contextmanager
    def _queries(self) -> Iterator[None]:
        """The last tokens of every row, which are padded on the left, have the trained embeddings."""

        def put(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            queries = self.queries.to(out.dtype).expand(len(out), -1, -1)
            return torch.cat([out[:, : out.shape[1] - len(self.queries)], queries], 1)

        hook = self.judge.model.get_input_embeddings().register_forward_hook(put)
        try:
            yield
        finally:
            hook.remove()

    # -- weights ------------------------------------------------------------------------------------------------

    def open(self, settings: AnyBackbone, seed: int) -> list[nn.Parameter]:
        assert isinstance(settings, VLMBackbone)
        self.queries.requires_grad_(len(self.queries) > 0)
        found = [self.queries] if len(self.queries) else []
        if settings.tune == "lora":
            found += add_lora(self.judge.model, settings.rank, settings.alpha, settings.targets, seed)
        return found

    def changed(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.judge.model.named_parameters() if ".lora_" in name}
        return {**state, **({QUERIES: self.queries} if len(self.queries) else {})}

    def take(self, settings: AnyBackbone, state: Mapping[str, Tensor], where: str) -> None:
        self.open(settings, 0)
        own = self.changed()
        check_keys(state, own, where, "of this backbone")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        self.judge.model.requires_grad_(False)
        self.queries.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.judge.model.state_dict(), **self.head.state_dict(), QUERIES: self.queries}
