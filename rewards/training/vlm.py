"""Heads on a vision-language model: hidden states after a question about a sample and a judge's text about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.base import RewardError
from rewards.judges.asking import Question, question, shown
from rewards.judges.loading import load_judge
from rewards.judges.local import LocalJudge
from rewards.judges.lora import add_lora
from rewards.judges.models import Local
from rewards.networks.query_attention import QueryReader, chosen_layers
from rewards.networks.state_dicts import check_keys
from rewards.training.heads import Head
from rewards.training.scorer import Scorer
from rewards.training.settings import AnyBackbone, VLMBackbone
from rewards.training.thoughts import Thoughts

QUERIES, READER = "queries", "attention."
"""Name of the trained tokens in a reward folder, and the beginning of the names of the attention over layers."""


class VLMScorer(Scorer):
    """See :class:`~rewards.training.scorer.Scorer`; image or video and prompt are read together.

    Args:
        reads_prompt: whether the head needs features of the prompt alone.
        thoughts: texts about samples, which the model reads behind the question.

    Raises:
        RewardError: the model has too few layers for ``settings``, or another width than attention over them needs.
    """

    fixed_text = False

    def __init__(
        self, settings: VLMBackbone, judge: LocalJudge, reads_prompt: bool, head: Head | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.judge, self.reads_prompt, self.thoughts = settings, judge, reads_prompt, thoughts
        if head is not None:
            self.head = head
        words = judge.model.get_input_embeddings().weight
        count = settings.queries if settings.read == "query" else 0
        self.reader: QueryReader | None = None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            start = torch.randn(count, words.shape[1]) * float(words.detach().float().std())
            if settings.read == "layers":
                depth = int(judge.model.config.text_config.num_hidden_layers)
                if settings.layers > depth:
                    raise RewardError(
                        f"backbone.layers: {settings.layers} is more than the {depth} layers of the language model"
                    )
                self.layers = chosen_layers(None, settings.layers, depth)
                self.reader = QueryReader(words.shape[1], settings.layers)
                for query in (self.reader.first, self.reader.last):
                    nn.init.normal_(query)
                self.reader.to(judge.model.device).requires_grad_(False)
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
        thoughts = None
        if settings.thought is not None:
            thoughts = Thoughts(settings.thought, load_judge(settings.thought.writer, device), settings.frames)
        return cls(settings, LocalJudge.load(local, device), reads_prompt, thoughts=thoughts)

    @property
    def device(self) -> torch.device:
        return self.judge.model.device  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        return int(self.judge.model.config.text_config.hidden_size) * max(1, len(self.queries))

    # -- features -----------------------------------------------------------------------------------------------

    def question(self, media: Tensor | None, prompt: str) -> Question:
        """Content of the question for a sample, or for its prompt alone."""
        images = [] if media is None else shown(media, self.settings.frames)
        medium = "image" if media is None or media.ndim == 3 else "video"
        return question(self.settings.template, prompt, *images, medium=medium)

    def text(self, prompts: Sequence[str], chunk: int) -> Tensor:
        if not self.reads_prompt:
            return torch.zeros(len(prompts), 0, device=self.device)
        return self._states([self.question(None, prompt) for prompt in prompts], [""] * len(prompts))

    def embed(self, media: Sequence[Tensor], prompts: Sequence[str], chunk: int) -> Tensor:
        said, reasons = self._said(media, prompts)
        if reasons:
            raise RewardError(next(iter(reasons.values())))
        head = getattr(self, "head", None)
        if self.thoughts is not None and head is not None and head.training:
            said = self.thoughts.thinned(said)
        return self._states([self.question(one, prompt) for one, prompt in zip(media, prompts, strict=True)], said)

    def refused(self, media: Tensor, prompts: Sequence[str]) -> dict[int, str]:
        asked = [self.question(one, prompt) for one, prompt in zip(media, prompts, strict=True)]
        said, reasons = self._said(media, prompts)
        for row, (one, thought) in enumerate(zip(asked, said, strict=True)):
            if why := one.refused or reasons.get(row) or self._too_long(one, thought):
                reasons[row] = why
        return reasons

    def _said(self, media: Sequence[Tensor] | Tensor, prompts: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        return self.thoughts(media, prompts) if self.thoughts is not None else ([""] * len(prompts), {})

    def _too_long(self, asked: Question, thought: str) -> str:
        count = len(self._tokens(asked, thought))
        return f"the question has {count} tokens, the model reads {self.judge.longest}" * (count > self.judge.longest)

    def _tokens(self, asked: Question, thought: str) -> list[int]:
        """A question, the thought as the beginning of the model's own reply, and places for the trained tokens."""
        said = self.judge.encode(self.judge.plain(thought)) if thought else []
        return [*self.judge.tokens(asked), *said, *[self._place] * len(self.queries)]

    def _states(self, questions: Sequence[Question], said: Sequence[str]) -> Tensor:
        """Unit features ``[N, D]`` float32 of hidden states where the head reads, of several tokens side by side.

        Raises:
            RewardError: a question cannot be asked.
        """
        for asked, thought in zip(questions, said, strict=True):
            if why := asked.refused or self._too_long(asked, thought):
                raise RewardError(why)
        size, found = self.judge.settings.chunk, []
        for start in range(0, len(questions), size):
            some = list(questions[start : start + size])
            rows = [self._tokens(*each) for each in zip(some, said[start : start + size], strict=True)]
            inputs = self.judge.inputs(rows, some)
            with self._queries():
                out = self.judge.model.model(**inputs, use_cache=False, output_hidden_states=self.reader is not None)
            found.append(F.normalize(self._read(out, inputs["attention_mask"].bool()), dim=-1))
        return torch.cat(found) if found else torch.zeros(0, self.width, device=self.device)

    def _read(self, out: Any, real: Tensor) -> Tensor:
        """``[b, D]`` of a network's output, of whose positions ``real [b, L]`` are tokens."""
        if self.reader is not None:
            states = [out.hidden_states[layer].float() for layer in self.layers]
            return self.reader.read(states, out.last_hidden_state.float(), real)
        read = out.last_hidden_state[:, -max(1, len(self.queries)) :].float()
        return F.normalize(read, dim=-1).flatten(1)

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
        if self.reader is not None:
            found += list(self.reader.requires_grad_(True).parameters())
        if settings.tune == "lora":
            found += add_lora(self.judge.model, settings.rank, settings.alpha, settings.targets, seed)
        return found

    def changed(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.judge.model.named_parameters() if ".lora_" in name}
        return {**state, **self._added()}

    def _added(self) -> dict[str, Tensor]:
        """Trained tensors beside the LoRA."""
        reader = {} if self.reader is None else self.reader.state_dict(keep_vars=True)
        tokens = {QUERIES: self.queries} if len(self.queries) else {}
        return {**tokens, **{f"{READER}{name}": value for name, value in reader.items()}}

    def take(self, settings: AnyBackbone, state: Mapping[str, Tensor], where: str) -> None:
        self.open(settings, 0)
        own = self.changed()
        check_keys(state, own, where, "of this backbone")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        self.judge.model.requires_grad_(False)
        for value in self._added().values():
            value.requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        writer = {} if self.thoughts is None else self.thoughts.state_dict()
        return {
            **self.judge.model.state_dict(),
            **self.head.state_dict(),
            QUERIES: self.queries,
            **self._added(),
            **writer,
        }
