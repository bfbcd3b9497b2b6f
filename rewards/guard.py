"""Protection of the inputs of rewards: their changes do not affect other rewards.

Code from outside this package is given copies, which are compared with the originals afterwards: only that shows every
way of writing, NumPy's views of the same memory among them. Code of this package is given the tensors themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.scores import Refreshed, RewardError

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def foreign(function: Callable[..., Any]) -> bool:
    """Whether a function is code from outside this package, or calls such code."""
    module = str(getattr(function, "__module__", ""))
    return not module.startswith("rewards.") or module == "rewards.call"


class Loan:
    """Tensors, lists and dicts lent to a reward by name.

    Args:
        who: names the reward in messages.
        outside: whether it gets copies.
    """

    def __init__(self, who: str, outside: bool) -> None:
        self.who, self.outside = who, outside
        self.lent: list[tuple[str, Tensor, Tensor, int | None]] = []

    def give(self, name: str, value: Any) -> Any:
        """Copy that the reward is given in place of ``value``."""
        if not isinstance(value, Tensor):
            return copy.deepcopy(value) if self.outside else value
        given = value.clone() if self.outside else value
        self.lent.append((name, value, given, _version(value)))
        return given

    def check(self) -> None:
        """Raise RewardError if the reward wrote into something it was lent."""
        for name, value, given, version in self.lent:
            written = not _same_bits(value, given) if self.outside else _version(value) != version
            if written:
                raise RewardError(
                    f"{self.who} changes the {name} it is given in place, which others still need; "
                    f"let it work on {name}.clone()"
                )


@dataclass(frozen=True)
class Guarded:
    """A reward in training, whose steps read the samples and cannot change them."""

    name: str
    inner: Refreshed

    @property
    def instead(self) -> bool:
        """See :class:`~rewards.base.Refreshed`."""
        return self.inner.instead

    def fit(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """One step; RewardError if it writes into the media."""
        loan = Loan(f"reward {self.name!r}, while it is trained,", foreign(type(self.inner)))
        found = self.inner.fit(loan.give("media", media), list(prompts))
        loan.check()
        return dict(found)

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~rewards.base.Refreshed`."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~rewards.base.Refreshed`."""
        self.inner.load_state_dict(state)


def lend(name: str, function: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Loan, dict[str, Any]]:
    """A loan to a reward's function, and what it is handed under each name."""
    loan = Loan(f"reward {name!r}", foreign(function))
    return loan, {key: loan.give(key, value) for key, value in inputs.items()}


def latent_loans(function: Callable[..., Any]) -> Callable[..., Any]:
    """A latent reward ``(x_t, t, prompts) -> [n]`` that cannot change the latents it judges."""

    def guarded(x: Tensor, t: Tensor, prompts: Sequence[str]) -> Any:
        loan, lent = lend(getattr(function, "__name__", type(function).__name__), function, {"x_t": x, "t": t})
        found = function(lent["x_t"], lent["t"], list(prompts))
        loan.check()
        return found

    return guarded


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both hold the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:  # resized or retyped in place
        return False
    a, b = a.detach(), b.detach()
    words = _WORDS.get(a.element_size())
    return torch.equal(a, b) if words is None or a.dtype == torch.bool else torch.equal(a.view(words), b.view(words))
