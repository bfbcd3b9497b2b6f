"""Goal-baseline CLIP (VLM-RMs, arXiv 2310.12921): similarity to a goal along the direction from a baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, Scores
from rewards.model_settings import ModelRewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.clip import Clip
else:
    Clip = lazy("rewards.networks.clip:Clip")


class GoalBaseline(ModelRewardSettings):
    """Goal-baseline CLIP: similarity to a goal sentence; the part shared with a baseline sentence counts less."""

    kind: Literal["goal_baseline"] = Field("goal_baseline", description="goal-baseline CLIP")
    baseline: str | tuple[str, ...] = Field(
        min_length=1,
        description="baseline text that describes any image, such as 'a photo'; several texts are averaged",
    )
    goal: str | tuple[str, ...] | None = Field(None, min_length=1, description="goal text; null = each sample's prompt")
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="strength of the projection: 0 = plain CLIP cosine | 1 = only along the line from baseline to goal",
    )
    model: str = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="CLIPModel folder, hub id, or file in open_clip's layout"
    )
    processor: str | None = Field(None, description="folder or hub id of the tokenizer; null = that of model")
    quick_gelu: bool = Field(False, description="use QuickGELU for a file's activation, as OpenAI's weights require")
    antialias: bool = Field(True, description="antialias when downscaling, as torchvision does since 0.17")

    def load(self, device: torch.device | str) -> Reward:
        """Load model and tokenizer, and embed the baseline."""
        import torch

        clip = Clip.load(
            self.model,
            self.processor,
            self.dtype,
            device,
            preprocess="squashed",
            antialias=self.antialias,
            quick_gelu=self.quick_gelu,
            repair=True,
        )

        def mean(texts: str | tuple[str, ...]) -> Tensor:
            return clip.text_features([texts] if isinstance(texts, str) else list(texts), self.chunk).mean(0)

        baseline = mean(self.baseline)
        fixed = None if self.goal is None else mean(self.goal)

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            goal = clip.text_features(prompts, self.chunk) if fixed is None else fixed.expand(len(prompts), -1)

            def score(image: Tensor, samples: Tensor) -> Tensor:
                return projected(image, goal[samples], baseline, self.alpha)

            values = clip.by_frame(media, score, self.chunk, self.frames)
            # what tells equal texts apart is rounding, and would become the direction
            same = ((goal - baseline).norm(dim=-1) < 1e-3).cpu()
            same |= torch.tensor([text == self.baseline for text in (prompts if fixed is None else [])] or [False])
            values = values.masked_fill(same.to(values.device), torch.nan)
            why = "the goal equals the baseline, so no direction separates them"
            return Scores(values, dict.fromkeys(same.nonzero().flatten().tolist(), why))

        return Reward("goal_baseline", function, range=(-1.0, 1.0), differentiable=True)


def projected(image: Tensor, goal: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """``1 - |P (image - goal)|^2 / 2`` ``[b]``, P = alpha * (projection onto goal - baseline) + (1 - alpha) * identity.

    Args:
        image: unit rows ``[b, D]``.
        goal: ``[b, D]``, as is ``baseline`` or ``[D]``. Where they are equal the result is NaN.
    """
    direction = goal - baseline
    direction = direction / direction.norm(dim=-1, keepdim=True)
    offset = image - goal
    along = (offset * direction).sum(-1, keepdim=True) * direction
    return 1 - (alpha * along + (1 - alpha) * offset).square().sum(-1) / 2
