"""Scores, the errors of rewards, and the part of a reward that learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from alignflow.errors import AlignflowError

if TYPE_CHECKING:
    from torch import Tensor


class RewardError(AlignflowError, RuntimeError):
    """A reward cannot work as configured (missing weights, wrong shape); the message names it and the remedy."""


class RewardExitError(RewardError):
    """The code of a reward called ``sys.exit``."""


class Refreshed(Protocol):
    """The part of a reward that trains alongside the policy. Training calls :meth:`fit` once per rollout."""

    @property
    def instead(self) -> bool:
        """Whether the last :meth:`fit` replaces the policy's updates on that rollout."""
        ...

    def fit(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """One step on a rollout's N scored samples ``[N, ...]`` in [0, 1]; returns metrics for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that :meth:`fit` changes: tensors, numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; training continues bit for bit."""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of N samples.

    Args:
        values: ``[N]`` float32, higher is better; NaN = missing.
        reasons: index -> reason why ``values[index]`` is NaN. Every NaN has one.
        parts: name -> ``[N]`` raw components, such as the members of a mixture.
        steps: ``[N, S]`` scores of the clean samples that S sampling steps predict, for recipes that need them.
    """

    values: Tensor
    reasons: Mapping[int, str] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None

    def rows(self, start: int, stop: int) -> Scores:
        """Scores of the samples ``start`` to ``stop - 1``."""
        some = slice(start, stop)
        reasons = {index - start: why for index, why in self.reasons.items() if start <= index < stop}
        parts = {name: values[some] for name, values in self.parts.items()}
        return Scores(self.values[some], reasons, parts, None if self.steps is None else self.steps[some])
