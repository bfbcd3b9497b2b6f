"""Several rewards trained during the run, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.base import Refreshed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Together:
    """Each takes its step on the same samples; numbers and states are below their names."""

    parts: Mapping[str, Refreshed]

    @property
    def instead(self) -> bool:
        """Whether one of them has the policy wait."""
        return any(one.instead for one in self.parts.values())

    def fit(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """One step each."""
        found = {name: one.fit(media, prompts) for name, one in self.parts.items()}
        return {f"{name}/{key}": value for name, numbers in found.items() for key, value in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """State of each part."""
        return {name: one.state_dict() for name, one in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Each continues from its own."""
        for name, one in self.parts.items():
            one.load_state_dict(state[name])


def together(parts: Mapping[str, Refreshed | None]) -> Refreshed | None:
    """The trained ones of ``parts`` as one, or None if there are none."""
    learning = {name: one for name, one in parts.items() if one is not None}
    return Together(learning) if learning else None
