"""Flow-GRPO on a reward that is trained to distinguish samples from references."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from align.maths import advantages
from align.recipes.grpo import GRPO


class AdvGRPO(GRPO):
    """Adv-GRPO: policy gradient on a reward trained to distinguish samples from references (arXiv 2511.20256)

    The reward is ``adversarial`` in a mixture with one that reads the prompt, ``adversarial_pick_score``, or a rule
    beside ``feature_similarity`` to the prompt's reference, which does not learn. Defaults are those of the authors'
    code.
    """

    kind: Literal["adv_grpo"] = "adv_grpo"  # type: ignore[assignment]
    ratio_clip: float = Field(1e-5, gt=0, description="clipping range of the probability ratio, as for grpo")
    normalise_by: advantages.Divisor = Field("global", description="divisor of the advantage, as for grpo")
