"""Match between requested actions and those an inverse dynamics model reads from a video (RLIR)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from rewards.base import Reward, RewardError, RewardSettings, Scores
from rewards.call import load_object
from rewards.rows import column
from rewards.videos import at_least

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class InverseDynamics(RewardSettings):
    """Share of the requested actions that a custom inverse dynamics model reads from the video (RLIR).

    The actions are the prompt's column ``actions``, a list of numbers. The model is called as ``model(videos)`` with
    ``[N, F, 3, H, W]`` and returns ``[N, n]`` actions, or ``[N, n, A]`` logits of which the highest counts.
    """

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["inverse_dynamics"] = Field(
        "inverse_dynamics", description="match between performed and requested actions"
    )
    model: str = Field(description="package.module:name or file.py:name of a function, or of a class to instantiate")
    options: dict[str, Any] = Field({}, description="keyword arguments of the class")
    scale: float | None = Field(
        None,
        gt=0,
        description="scale for continuous actions, each scored exp(-difference^2 / scale); null = equal or not",
    )
    chunk: int = Field(8, ge=1, description="videos per call")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Import the model, make it where it is a class.

        Raises:
            RewardError: not there, or not to be made with these options.
        """
        import torch

        model = load_object(self.model)
        if isinstance(model, type):
            try:
                model = model(**self.options)
            except TypeError as error:
                raise RewardError(f"reward 'inverse_dynamics': {self.model} cannot be made: {error}") from error
            model = model.eval().to(device) if isinstance(model, torch.nn.Module) else model

        def function(media: Tensor, prompts: list[str], group: Tensor | None, metadata: list[Any]) -> Scores:
            parts = at_least(media, 2, "inverse_dynamics").split(self.chunk)
            read = torch.cat([torch.as_tensor(model(part)).float().cpu() for part in parts])
            values, reasons = torch.full((len(prompts),), torch.nan), {}
            for index, row in enumerate(metadata):
                try:
                    values[index] = agreement(read[index], wanted_actions(row), self.scale)
                except ValueError as error:
                    reasons[index] = str(error)
            return Scores(values, reasons)

        return Reward("inverse_dynamics", function, range=(0.0, 1.0), wants=("metadata",))


def agreement(read: Tensor, wanted: Sequence[float], scale: float | None = None) -> float:
    """Mean over actions of 1 where equal, or of exp(-difference^2 / scale).

    Args:
        read: ``[n]`` actions, or ``[n, A]`` logits.

    Raises:
        ValueError: not as many as requested, or not finite.
    """
    actions = (read.argmax(-1).float() if read.ndim == 2 else read).tolist()
    if len(actions) != len(wanted):
        raise ValueError(f"the model reads {len(actions)} actions, the prompt asks for {len(wanted)}")
    if not all(map(math.isfinite, actions)):
        raise ValueError(f"the model reads actions that are not finite: {actions}")
    pairs = zip(actions, wanted, strict=True)
    return sum(float(a == b) if scale is None else math.exp(-((a - b) ** 2) / scale) for a, b in pairs) / len(wanted)


def wanted_actions(row: Mapping[str, Any]) -> list[float]:
    """A prompt's column ``actions``.

    Raises:
        ValueError: missing, empty, or not a list of numbers.
    """
    actions = column(row, "actions", list, "a list of numbers")
    if not actions or not all(isinstance(action, int | float) for action in actions):
        raise ValueError(f"column 'actions' should be a list of numbers, is {actions!r}")
    return actions
