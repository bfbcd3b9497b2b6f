"""VideoReward: visual quality, motion quality and text alignment of a video (VideoAlign, arXiv 2501.13918)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.model_settings import LoadedRewardSettings
from rewards.networks.published_template import PLACE, read_template
from rewards.rate import fps_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks import qwen2_vl
else:
    qwen2_vl = lazy("rewards.networks.qwen2_vl")

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
NAMES = ("visual_quality", "motion_quality", "text_alignment")
MEANS, DEVIATIONS = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
PUBLISHED = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"


class VideoReward(LoadedRewardSettings):
    """VideoReward: visual quality, motion quality and text alignment of a video, or their sum.

    The authors' question is not part of this project: ``template`` is ``prompt_template.py`` of their repository
    KwaiVGI/VideoAlign (it is read, not run), or a text file with the three tokens and ``{text_prompt}``.
    """

    passes_gradient: ClassVar[bool] = True
    renamed: ClassVar[dict[str, str]] = {"frame_rate": "fps"}
    kind: Literal["video_reward"] = Field("video_reward", description="VideoReward (VideoAlign)")
    template: Path = Field(description="VideoAlign's prompt_template.py, or a text file with the question")
    score: Literal["overall", "visual_quality", "motion_quality", "text_alignment"] = Field(
        "overall", description="score to return; overall = the sum of the other three; all are logged"
    )
    normalise: bool = Field(True, description="(score - mean) / deviation for each score, with the authors' constants")
    fps: float | None = Field(
        None,
        gt=0,
        description="frames per second of the videos, of which two per second are used; null = the file's rate, "
        "or 16 if unknown",
    )
    frames: int | None = Field(
        None, ge=2, description="frames used per video, rounded to an even number; null = two per second"
    )
    weights: str = Field(
        "KwaiVGI/VideoReward/checkpoint-11352/model.pth", description="weight file, or owner/name/file on the hub"
    )
    base: str = Field(
        "Qwen/Qwen2-VL-2B-Instruct", description="folder or hub id of the base model, for its sizes and tokenizer"
    )
    lora_alpha: float = Field(128.0, gt=0, description="alpha of the LoRA in the weights; its rank is read from them")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")

    def load(self, device: torch.device | str) -> Reward:
        """Load question, tokenizer and weights."""
        published = qwen2_vl.Published(
            "VideoReward", "KwaiVGI/VideoReward", TOKENS, "video", (qwen2_vl.SMALLEST, qwen2_vl.LARGEST)
        )
        question = read_template(
            self.template, (PUBLISHED,), (*TOKENS[:2], PLACE, TOKENS[2]), "the repository KwaiVGI/VideoAlign"
        )
        judge = qwen2_vl.Qwen2VLReward.load(published, self.weights, self.base, self.lora_alpha, self.dtype, device)
        if judge.outputs not in (1, len(TOKENS)):
            raise RewardError(f"{self.weights} has {judge.outputs} outputs; VideoReward has 1 or {len(TOKENS)}")

        def three(video: Tensor, prompt: str) -> Tensor:
            found = judge(video, question.replace(PLACE, prompt))
            return found.diagonal() if found.shape[1] > 1 else found[:, 0]

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            videos = media if media.ndim == 5 else media[:, None]
            chosen = qwen2_vl.frames_at(videos.shape[1], fps_of(self.fps), self.frames)
            marks, reasons = judge.each(videos[:, chosen], prompts, three, 3)
            marks = normalised(marks) if self.normalise else marks
            parts = dict(zip(NAMES, marks.unbind(1), strict=True))
            return Scores(parts.get(self.score, marks.sum(1)), reasons, parts)

        return Reward("video_reward", function, differentiable=True, fingerprint=lambda: digest(judge.state_dict()))


def normalised(marks: Tensor) -> Tensor:
    """``[N, 3]`` -> (mark - mean) / deviation with the authors' constants.

    >>> import torch
    >>> normalised(torch.tensor([[3.6757 + 2.2476, 1.1646, 2.8105 - 2.5121]])).round(decimals=4).tolist()
    [[1.0, 0.0, -1.0]]
    """
    return (marks - marks.new_tensor(MEANS)) / marks.new_tensor(DEVIATIONS)
