"""Policy gradient on the text encoders: the recipe of grpo with conditioning that is computed in the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.maths import advantages
from align.recipes.base import PARTS, Bench, Learns, Scored
from align.recipes.grpo import GRPO, StepTerms

if TYPE_CHECKING:
    from align.maths.samplers import Step


class TexForce(GRPO):
    """TexForce: clipped policy gradient on a LoRA of the text encoders (arXiv 2311.15657), or of text and network

    A rollout keeps prompts. Each chunk of the loss encodes them, and the negative prompt, with gradient.
    """

    kind: Literal["texforce"] = "texforce"  # type: ignore[assignment]
    trains: Literal["text", "both"] = Field(
        "text", description="parts with a LoRA: text = the text encoders | both = the network too"
    )
    normalise_by: advantages.Divisor = Field("group", description="divisor of the advantage, as for grpo")
    advantage_clip: float = Field(10.0, gt=0, description="maximum absolute advantage; larger ones are clipped")

    def learners(self) -> dict[str, Learns]:
        """One learner, with one optimizer for the LoRAs of both parts."""
        return {"policy": Learns(self, trains=PARTS[self.trains])}

    def steps(self, terms: StepTerms, rollout: Scored, bench: Bench) -> Callable[[str], Step]:
        """With text by the weights of the role."""
        return bench.steps(rollout, terms.sample, terms.slot, encode=True)
