"""The trained part of a language model: a LoRA with its optimizer, its reference, and a checkpoint of both."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from align.data.files import write_bytes
from align.maths.losses import Loss
from align.maths.tokens import text_dpo, token_nll, token_pg, token_sum
from align.preference.settings import JudgeLora
from align.rewriting.settings import Method, PolicyGradient
from alignflow.errors import CheckpointError, RunFolderError
from alignflow.text import first_line
from rewards.judges.lora import add_lora

Tokens = list[int]
"""Token ids of an instruction or of a reply."""


class Writes(Protocol):
    """A model whose replies have log-probabilities. Its input depends on the model: tokens, or a question."""

    model: Any
    chunk: int

    def logps(self, asked: Sequence[Any], replies: Sequence[Tokens], temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability of each reply's tokens ``[n, L]``, 0 beyond its end, and where it has tokens ``[n, L]``."""


def trained_lora(model: Any, part: JudgeLora, loaded: bool, seed: int, **where: str) -> list[nn.Parameter]:
    """Parameters of the LoRA on a model, in float32 and alone trained: the one that was loaded, or a new one.

    Raises:
        RewardError: no linear layer has one of the names.
    """
    if not loaded:
        return add_lora(model, part.rank, part.alpha, part.targets, seed, **where)
    found = [value for name, value in model.named_parameters() if ".lora_" in name]
    for value in found:
        value.data = value.data.float()
        value.requires_grad_(True)
    return found


class Learner:
    """A writer in training. The reference is the writer as it was at the start of the run.

    Args:
        parameters: of :func:`trained_lora`.
        temperature: of the distribution that replies are sampled from.
    """

    def __init__(
        self, writer: Writes, parameters: list[nn.Parameter], method: Method, temperature: float = 1.0
    ) -> None:
        self.writer, self.parameters, self.method, self.temperature = writer, parameters, method, temperature
        self.start = [value.detach().clone() for value in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.method.lr, weight_decay=self.method.weight_decay)
        self.step = 0

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The writer as it was at the start; nothing has gradient."""
        now = [value.detach().clone() for value in self.parameters]
        self._put(self.start)
        try:
            with torch.no_grad():
                yield
        finally:
            self._put(now)

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for place, value in zip(self.parameters, values, strict=True):
                place.copy_(value)

    # -- losses -------------------------------------------------------------------------------------------------

    def imitate(self, asked: Sequence[Any], replies: Sequence[Tokens]) -> dict[str, float]:
        """A step of supervised learning on replies."""
        return self._update(len(asked), lambda rows: token_nll(*self._logps(asked, replies, rows)))

    def prefer(
        self, asked: Sequence[Any], better: Sequence[Tokens], worse: Sequence[Tokens], beta: float
    ) -> dict[str, float]:
        """A step of DPO on pairs of replies."""

        def sums(rows: range) -> tuple[Tensor, Tensor]:
            first, second = (token_sum(*self._logps(asked, side, rows)) for side in (better, worse))
            return first, second

        def loss(rows: range) -> Loss:
            with self.reference():
                ref_w, ref_l = sums(rows)
            return text_dpo(*sums(rows), ref_w, ref_l, beta)

        return self._update(len(asked), loss)

    def reinforce(
        self, asked: Sequence[Any], replies: Sequence[Tokens], advantage: Tensor, known: Tensor
    ) -> dict[str, float]:
        """The steps of GRPO on one round of replies, written by the writer as it is now.

        Args:
            advantage: ``[N]``.
            known: ``[N]`` bool, whether a reply has a score; others are left out of the mean.
        """
        how = self.method
        assert isinstance(how, PolicyGradient)
        chunks = self._chunks(len(asked))
        with torch.no_grad():
            old = [self._logps(asked, replies, rows)[0] for rows in chunks]
        with self.reference():
            reference = [self._logps(asked, replies, rows)[0] for rows in chunks] if how.kl else [None] * len(chunks)

        def loss(rows: range) -> Loss:
            place = rows.start // self.writer.chunk
            logp, mask = self._logps(asked, replies, rows)
            some = advantage[rows.start : rows.stop].to(logp.device)
            return token_pg(logp, old[place], some, mask, how.clip, how.kl, reference[place])

        found: dict[str, float] = {}
        for _ in range(how.updates):
            found = self._update(len(asked), loss, known.float())
        return found

    def _logps(self, asked: Sequence[Any], replies: Sequence[Tokens], rows: range) -> tuple[Tensor, Tensor]:
        some = slice(rows.start, rows.stop)
        temperature = self.temperature if isinstance(self.method, PolicyGradient) else 1.0
        return self.writer.logps(asked[some], replies[some], temperature)

    def _chunks(self, count: int) -> list[range]:
        size = self.writer.chunk
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _update(self, count: int, loss: Callable[[range], Loss], weight: Tensor | None = None) -> dict[str, float]:
        """One optimizer step on the weighted mean loss of ``count`` terms, chunk by chunk; means of the metrics."""
        weight = torch.ones(count) if weight is None else weight
        total, means = float(weight.sum()), dict[str, float]()
        self.optimizer.zero_grad(set_to_none=True)
        for rows in self._chunks(count) if total else ():
            found = loss(rows)
            share = weight[rows.start : rows.stop].to(found.value.device) / total
            value = (found.value * share).sum()
            value.backward()  # type: ignore[no-untyped-call]
            for name, each in {"loss": found.value.detach(), **found.metrics}.items():
                means[name] = means.get(name, 0.0) + float((each * share).sum())
        if total and not means["loss"] - means["loss"] == 0:
            raise RunFolderError(f"the loss is {means['loss']} at step {self.step}; try a smaller method.lr")
        means["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters, 1.0)) if total else 0.0
        if total:
            self.optimizer.step()
        return means

    # -- checkpoint ---------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write LoRA, its start and the optimizer in one step."""
        state = {
            "step": self.step,
            "lora": [value.detach().cpu() for value in self.parameters],
            "start": [value.cpu() for value in self.start],
            "optimizer": self.optimizer.state_dict(),
        }
        stream = io.BytesIO()
        torch.save(state, stream)
        write_bytes(file, stream.getvalue())

    def load(self, file: Path) -> bool:
        """Load the state in ``file``; False if there is none.

        Raises:
            CheckpointError: it is damaged, or of another LoRA.
        """
        if not file.is_file():
            return False
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            self._put(state["lora"])
            self.start = [value.to(one.device) for value, one in zip(state["start"], self.parameters, strict=True)]
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except Exception as error:  # the error of unpickling depends on the damage
            raise CheckpointError(
                f"{file} cannot be read: {first_line(error)}; start again with --overwrite"
            ) from error
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.lr
        return True
