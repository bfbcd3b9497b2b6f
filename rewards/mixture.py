"""A weighted sum of rewards, each brought to a common scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from rewards import AnyReward
from rewards.base import Reward, RewardError, RewardSettings, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Member(BaseModel):
    """One reward of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: AnyReward = Field(description="what scores: {kind: ...}")
    weight: float = Field(1.0, description="factor of the normalised score; negative to punish")
    normalise: Literal["none", "range", "group", "batch"] = Field(
        "none",
        description="none = raw | range = its declared range to 0..1 | group = (x - mean) / deviation among the "
        "samples of a prompt | batch = the same over all samples scored together",
    )


class Mixture(RewardSettings):
    """Weighted sum of other rewards; a sample one of them cannot score has no score."""

    kind: Literal["mixture"] = Field("mixture", description="weighted sum of rewards")
    parts: dict[str, Member] = Field(min_length=1, description="name -> {reward, weight, normalise}")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build every member.

        Raises:
            RewardError: a member to be normalised by its range has none.
        """
        import torch

        ready = {name: part.reward.build(device) for name, part in self.parts.items()}
        for name, part in self.parts.items():
            if part.normalise == "range" and not all(map(math.isfinite, ready[name].range)):
                raise RewardError(
                    f"mixture: {name!r} has no finite range; normalise it by group or batch, or not at all"
                )

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            groups = _numbers(prompts) if group is None else group.cpu()
            total = torch.zeros(len(prompts), device=media.device if differentiable else "cpu")
            reasons: dict[int, str] = {}
            raw: dict[str, Tensor] = {}
            for name, part in self.parts.items():
                scores = ready[name](media, prompts, group, inputs)
                values = normalise(scores.values, part.normalise, ready[name].range, groups)
                total = total + part.weight * (values if differentiable else values.detach()).to(total.device)
                raw |= {name: scores.values, **{f"{name}/{key}": value for key, value in scores.parts.items()}}
                for index, why in scores.reasons.items():
                    reasons[index] = "; ".join(filter(None, [reasons.get(index), f"{name}: {why}"]))
            return Scores(total, reasons, raw)

        differentiable = all(reward.differentiable for reward in ready.values())
        limits = [_limits(part, ready[name].range) for name, part in self.parts.items()]
        lowest, highest = sum(low for low, _ in limits), sum(high for _, high in limits)
        wants = tuple(dict.fromkeys(want for reward in ready.values() for want in reward.wants))
        return Reward("mixture", function, (lowest, highest), differentiable, wants)


def normalise(values: Tensor, how: str, span: tuple[float, float], groups: Tensor) -> Tensor:
    """``values [N]`` on the scale a member asks for; NaN stays NaN and does not count.

    Mean and deviation (of the population) are constants to the gradient. A group without spread becomes 0.
    """
    import torch

    if how == "none":
        return values
    if how == "range":
        return (values - span[0]) / (span[1] - span[0])
    index = (groups if how == "group" else torch.zeros_like(groups)).to(values.device)
    out = torch.full_like(values, torch.nan)
    for number in index.unique():
        rows = (index == number) & values.isfinite()
        known = values[rows].detach()
        if not len(known):
            continue
        deviation = known.std(correction=0)
        # equal scores differ by rounding at most: dividing by that would make noise of it
        flat = deviation <= 1e-6 * known.abs().max()
        scaled = (values - known.mean()) / torch.where(flat, torch.inf, deviation)
        out = torch.where(rows, scaled, out)
    return out


def _numbers(prompts: list[str]) -> Tensor:
    """Equal prompts are one group."""
    import torch

    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(prompt, len(first)) for prompt in prompts])


def _limits(part: Member, span: tuple[float, float]) -> tuple[float, float]:
    """Lowest and highest contribution of a member."""
    low, high = {"none": span, "range": (0.0, 1.0)}.get(part.normalise, (-math.inf, math.inf))
    if part.weight == 0:
        return 0.0, 0.0
    ends = (part.weight * low, part.weight * high)
    return min(ends), max(ends)
