"""SoliReward: physical plausibility of a video, or match with its prompt (arXiv 2512.22170)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alignflow.lazy import lazy
from rewards.base import Reward, RewardError, Scores
from rewards.digest import digest
from rewards.model_settings import LoadedRewardSettings
from rewards.networks.published_template import read_dictionary

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards.networks.internvl import InternVLReward, frames_at
else:
    InternVLReward = lazy("rewards.networks.internvl:InternVLReward")
    frames_at = lazy("rewards.networks.internvl:frames_at")

PUBLISHED = {
    "phy_deform": "Yukino271828/SoliReward/pixel_orm/physics-deformity-HPQA-InternVL3-1B/model.safetensors",
    "text_alignment": "Yukino271828/SoliReward/pixel_orm/TA-HPQA-InternVL3-1B/model.safetensors",
}
HINT = "published below Yukino271828/SoliReward/pixel_orm"
PLACE = "{prompt}"


class SoliReward(LoadedRewardSettings):
    """SoliReward: physical plausibility of a video, or how well it matches the prompt.

    The authors' questions are not part of this project: ``template`` is ``solireward/inference/arguments.py`` of their
    repository (it is read, not run), or a JSON file {task: {system_prompt: ..., user_prompt: ...}}. An image is a video
    of one frame, which is shown as often as ``frames`` says.
    """

    passes_gradient: ClassVar[bool] = True
    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["soli_reward"] = Field("soli_reward", description="SoliReward, an InternVL3 that scores videos")
    template: Path = Field(description="SoliReward's inference/arguments.py, or a JSON file with the questions")
    task: Literal["phy_deform", "text_alignment"] = Field(
        "phy_deform",
        description="phy_deform = physics and deformed subjects, without the prompt | text_alignment = match "
        "with the prompt",
    )
    weights: str | None = Field(
        None, description="weight file, or owner/name/file on the hub; null = the published file of the task"
    )
    base: str = Field(
        "OpenGVLab/InternVL3-1B-hf",
        description="folder or hub id of the base model in transformers' layout, for its sizes and tokenizer",
    )
    layers: tuple[int, ...] | None = Field(
        None, description="layers that the head reads, 1 = the first; null = evenly spaced, as published"
    )
    frames: int = Field(8, ge=1, description="frames used per video, evenly spaced")
    chunk: int = Field(1, ge=1, description="videos per network call")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")

    def load(self, device: torch.device | str) -> Reward:
        """Load the task's questions, tokenizer and weights."""
        system, user = self._questions()
        file = self.weights or PUBLISHED[self.task]
        judge = InternVLReward.load(file, self.base, self.layers, self.dtype, device, HINT)
        control = judge.control

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            videos = media if media.ndim == 5 else media[:, None]
            videos = videos[:, frames_at(videos.shape[1], self.frames)]
            read = PLACE in user
            refused = [i for i, prompt in enumerate(prompts) if read and any(token in prompt for token in control)]
            good = [i for i in range(len(prompts)) if i not in refused]
            values = media.new_full((len(prompts),), float("nan"))
            for start in range(0, len(good), self.chunk):
                some = good[start : start + self.chunk]
                marks = judge(videos[some], [(system, user.replace(PLACE, prompts[i])) for i in some])
                values = values.index_put((values.new_tensor(some).long(),), marks.to(values))
            return Scores(values, dict.fromkeys(refused, "the prompt holds a control token of the model"))

        return Reward("soli_reward", function, differentiable=True, fingerprint=lambda: digest(judge.state_dict()))

    def _questions(self) -> tuple[str, str]:
        """The system's and the user's words of the task."""
        found = read_dictionary(self.template, "DEFAULT_PROMPTS", "the repository lian700/SoliReward").get(self.task)
        words = found if isinstance(found, dict) else {}
        system, user = words.get("system_prompt"), words.get("user_prompt")
        if not isinstance(system, str) or not isinstance(user, str):
            raise RewardError(f"template {self.template} has no system_prompt and user_prompt of {self.task}")
        if user.count(PLACE) != (self.task == "text_alignment"):
            wanted = f"should hold {PLACE} once" if self.task == "text_alignment" else f"should not hold {PLACE}"
            raise RewardError(f"template {self.template}: the user_prompt of {self.task} {wanted}")
        return system, user
