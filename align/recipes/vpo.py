"""Policy gradient on several rewards at once, with the contribution of a sample to its prompt's set as credit."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from align.maths import advantages
from align.maths import credit as formulas
from align.recipes.base import Need, Scores, Tensor, torch
from align.recipes.grpo import GRPO
from alignflow.errors import TrainingError
from alignflow.words import listing


class VPO(GRPO):
    """VPO: policy gradient on a sample's contribution to its group under random weightings of rewards: our adaptation

    Weightings are uniformly random, per prompt. A set's score is the mean over them of its best sample. A rollout of
    Vector Policy Optimization (arXiv 2605.22817) is a set; here it is a single sample, so both ways to credit it are
    ours. A mixture's own weights do not count.
    """

    needs: ClassVar[tuple[Need, ...]] = ("trajectory", "parts")
    kind: Literal["vpo"] = "vpo"  # type: ignore[assignment]
    normalise_by: advantages.Divisor = Field("group", description="divisor of the advantage, as for grpo")
    parts: list[str] | None = Field(
        None, min_length=2, description="names of the rewards, higher is better; null = all members of the mixture"
    )
    share: Literal["set", "marginal"] = Field(
        "set",
        description="credit of a sample: set = score of its set; a group has several sets | marginal = loss in the "
        "group's score without the sample, 0 if others dominate it; noisier, because few samples have any",
    )
    set_size: int = Field(3, ge=2, description="with share: set, samples per set; rollout.group must be a multiple")
    draws: int = Field(64, ge=1, description="random weightings per prompt")
    scale: Literal["batch", "none"] = Field(
        "batch", description="scale of the rewards: batch = range within the rollout mapped to [0, 1] | none = raw"
    )

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs several members that count upwards, and whole sets."""
        found, group = super().check(config), config.rollout.group
        members = getattr(config.reward, "parts", None)
        if isinstance(members, dict):
            named = self.parts or list(members)
            odd = [name for name in named if (one := members.get(name)) and (one.gate is not None or one.weight <= 0)]
            if unknown := [name for name in named if name.partition("/")[0] not in members]:
                found.append(
                    ("recipe.parts", f"no member {unknown[0]!r} in reward.parts; there are {listing(members)}")
                )
            if odd:
                found.append(("recipe.parts", f"member {odd[0]!r} is a gate or a penalty: name the others"))
            if len(named) < 2:
                found.append(("reward.parts", "vpo needs several rewards, but there is one: use grpo"))
        if self.share == "set" and (group % self.set_size or group < 2 * self.set_size):
            found.append(
                ("rollout.group", f"{group} samples cannot be divided into two or more sets of {self.set_size}")
            )
        return found

    def seeded_credit(self, scores: Scores, group: Tensor, seed: int) -> Tensor:
        """Advantages ``[N]``."""
        if not scores.values.isfinite().any():
            return torch.zeros_like(scores.values)
        rewards = self._rewards(scores)
        if self.scale == "batch":
            rewards = formulas.unit_scale(rewards)
        values = formulas.set_credit(rewards, group, seed, self.draws, self.set_size if self.share == "set" else None)
        return self.advantage(Scores(values), group, self.advantage_clip)

    def _rewards(self, scores: Scores) -> Tensor:
        """``[N, d]``, NaN for a sample without score.

        Raises:
            TrainingError: a part that the reward does not give.
        """
        names = self.parts or [name for name in scores.parts if "/" not in name]
        if missing := [name for name in names if name not in scores.parts]:
            raise TrainingError(f"recipe.parts: the reward has no part {missing[0]!r}, only {listing(scores.parts)}")
        found = torch.stack([scores.parts[name].double() for name in names], 1)
        return torch.where(scores.values.isfinite()[:, None] & found.isfinite(), found, torch.nan)
