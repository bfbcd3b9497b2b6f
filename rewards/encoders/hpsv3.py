"""HPSv3: human preference for an image given its prompt, with uncertainty (arXiv 2508.03789)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.frames import middles
from rewards.model_settings import LoadedRewardSettings
from rewards.networks.published_template import PLACE, read_template

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks import qwen2_vl
else:
    torch, qwen2_vl = lazy("torch"), lazy("rewards.networks.qwen2_vl")

TOKEN = "<|Reward|>"
CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
PIXELS = 256 * 28 * 28


class HPSv3(LoadedRewardSettings):
    """HPSv3: mean human preference of an image, averaged over a video's frames; deviation is logged.

    The authors' question is not part of this project: ``template`` is ``hpsv3/dataset/data_collator_qwen.py`` of their
    package hpsv3 (it is read, not run), or a text file with ``{text_prompt}`` and then ``<|Reward|>``. Images are
    brought to about 256 x 28 x 28 pixels as Pillow does; the gradient passes its rounding as if it were not there.
    """

    passes_gradient: ClassVar[bool] = True
    kind: Literal["hpsv3"] = Field("hpsv3", description="Human Preference Score v3, a Qwen2-VL")
    template: Path = Field(description="the package's data_collator_qwen.py, or a text file with the question")
    weights: str = Field("MizzenAI/HPSv3/HPSv3.safetensors", description="weight file, or owner/name/file on the hub")
    base: str = Field(
        "Qwen/Qwen2-VL-7B-Instruct", description="folder or hub id of the base model, for its sizes and tokenizer"
    )
    frames: int | None = Field(8, ge=1, description="frames scored per video, evenly spaced; null = all")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")

    def load(self, device: torch.device | str) -> Reward:
        """Load question, tokenizer and weights."""
        published = qwen2_vl.Published("HPSv3", "MizzenAI/HPSv3", (TOKEN,), "image", (PIXELS, PIXELS))
        question = read_template(self.template, CONSTANTS, (PLACE, TOKEN), "the package hpsv3")
        judge = qwen2_vl.Qwen2VLReward.load(published, self.weights, self.base, 1.0, self.dtype, device)
        if judge.outputs != 2:
            raise RewardError(f"{self.weights} has {judge.outputs} outputs; HPSv3 has a mean and a deviation")

        def marks(video: Tensor, prompt: str) -> Tensor:
            asked = question.replace(PLACE, prompt)
            found = torch.cat([judge(frame[None], asked) for frame in video]).to(video.device)
            return torch.stack([found[:, 0].mean(), found[:, 1].exp().mean()])

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            videos = media if media.ndim == 5 else media[:, None]
            scores, reasons = judge.each(videos[:, middles(videos.shape[1], self.frames)], prompts, marks, 2)
            return Scores(scores[:, 0], reasons, {"deviation": scores[:, 1].detach()})

        return Reward("hpsv3", function, differentiable=True, fingerprint=lambda: digest(judge.state_dict()))
