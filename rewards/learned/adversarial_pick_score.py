"""PickScore, trained during the run until references score above the samples again (Adv-GRPO's first variant)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch

    from rewards.images import read_table
    from rewards.networks.clip import Clip
    from rewards.training.tuned_clip import TunedClip
else:
    read_table = lazy("rewards.images:read_table")
    Clip = lazy("rewards.networks.clip:Clip")
    TunedClip = lazy("rewards.training.tuned_clip:TunedClip")


class AdversarialPickScore(ModelRewardSettings):
    """PickScore whose last vision layers are trained to prefer references while samples score higher (Adv-GRPO).

    A rollout in which it learns is not learned from by the policy. Scores of different updates cannot be compared.
    """

    kind: Literal["adversarial_pick_score"] = Field(
        "adversarial_pick_score", description="PickScore, trained during the run"
    )
    references: str = Field(
        description=".jsonl table with columns prompt and image (files, relative to the table), or shapes: "
        "captioned renders of the embedded world; prompts without a row are not trained on"
    )
    model: str = Field("yuvalkirstain/PickScore_v1", description="folder or hub id of the CLIPModel, or shapes")
    processor: str = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="folder or hub id of the tokenizer and image settings"
    )
    dtype: Literal["float32"] = Field(
        "float32", description="compute dtype; updates this small would vanish in bfloat16"
    )
    layers: int = Field(2, ge=1, description="number of trained vision layers, counted from the last")
    lr: float = Field(5e-6, gt=0, description="learning rate of Adam")
    seed: int = Field(0, ge=0, description="random seed of the references chosen in each update")

    def load(self, device: torch.device | str) -> Reward:
        """Load model, tokenizer, image settings and references."""
        clip = Clip.load(self.model, self.processor, self.dtype, device)
        tuned = TunedClip(
            clip,
            read_table(self.references),
            layers=self.layers,
            lr=self.lr,
            seed=self.seed,
            chunk=self.chunk,
            frames=self.frames,
        )
        return tuned.reward("adversarial_pick_score")
