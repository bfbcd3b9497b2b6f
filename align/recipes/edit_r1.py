"""DiffusionNFT for editors: solved groups are left out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from align.config import registry
from align.maths import advantages
from align.recipes.base import OldPolicy
from align.recipes.nft import NFT


class EditR1(NFT):
    """Edit-R1: DiffusionNFT on an editor, without the groups that are solved (UniWorld-V2, arXiv 2510.16888)

    ``rollout.filter`` leaves groups out of training whose rewards are high and alike, and bans their prompts. The
    published reward is ``digit_judge`` with ``source: true``. Defaults are those of the authors' code.
    """

    kind: Literal["edit_r1"] = "edit_r1"  # type: ignore[assignment]
    timesteps: int = Field(5, ge=1, description="re-noised copies per sample, as for nft")
    normalise_by: advantages.Divisor = Field("global", description="divisor of the advantage, as for nft")
    behaviour_decay: OldPolicy = Field("linear", description="decay of the old policy, as for nft")

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs an editor, its own samples, and the filter."""
        found, kind = super().check(config), config.generator.kind
        if ":" not in kind and kind != "generic" and "image" not in registry.inputs(kind):
            found.append(("generator.kind", f"edit_r1 trains an editor, and {kind} takes no source image; use nft"))
        if config.rollout.kind != "online":
            found.append(("rollout.kind", "edit_r1 samples in training, to leave out solved groups: use kind 'online'"))
        elif config.rollout.filter is None:
            found.append(("rollout.filter", "is missing; write {} for Edit-R1's bounds, or use nft"))
        return found
