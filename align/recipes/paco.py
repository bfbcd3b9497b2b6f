"""Flow-GRPO for sets of images that belong together: guarded ratio, tamed rewards, rollouts of their own size."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.maths import advantages
from align.recipes.grpo import GRPO


class PaCo(GRPO):
    """PaCo-RL: policy gradient with a guarded ratio, on log-tamed rewards and small rollouts (arXiv 2512.04784)

    Several rewards are mixed by ``how: log_tamed``, so that none of large spread decides alone; the published ones are
    ``paco`` and one of the prompt. ``generator.size`` is half of ``evaluate.size``, and of ten steps the second is
    stochastic: ``rollout.sampler.window``.
    """

    kind: Literal["paco"] = "paco"  # type: ignore[assignment]
    ratio: Literal["plain", "guard", "dppo"] = Field("guard", description="probability ratio, as for grpo")
    normalise_by: advantages.Divisor = Field("global", description="divisor of the advantage, as for grpo")

    def check(self, config: Any) -> list[tuple[str, str]]:
        """A mixture is tamed."""
        found, how = super().check(config), getattr(config.reward, "how", "log_tamed")
        if how != "log_tamed":
            found.append(("reward.how", f"is {how}, but paco mixes rewards by log_tamed: use log_tamed, or grpo"))
        return found
