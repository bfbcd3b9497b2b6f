"""VideoReward: visual quality, motion quality and text alignment of a clip (VideoAlign, arXiv 2501.13918)."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rewards.base import Reward, RewardError, RewardSettings, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
NAMES = ("visual_quality", "motion_quality", "text_alignment")
MEANS, DEVIATIONS = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)
PLACE = "{text_prompt}"
PUBLISHED = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"


class VideoReward(RewardSettings):
    """VideoReward: visual quality, motion quality and text alignment of a clip, or their sum; differentiable.

    The authors' question is not part of this project: ``template`` is ``prompt_template.py`` of their repository
    KwaiVGI/VideoAlign (it is read, not run), or a text file with the three tokens and ``{text_prompt}``.
    """

    kind: Literal["video_reward"] = Field("video_reward", description="VideoReward (VideoAlign)")
    template: Path = Field(description="VideoAlign's prompt_template.py, or a text file with the question")
    score: Literal["overall", "visual_quality", "motion_quality", "text_alignment"] = Field(
        "overall", description="overall = the sum of the three. All three are logged"
    )
    normalise: bool = Field(True, description="(score - mean) / deviation of each, by the authors' constants")
    frame_rate: float = Field(16.0, gt=0, description="frames a second of the clips; two of a second are looked at")
    frames: int | None = Field(None, ge=2, description="frames that are looked at, instead of two a second")
    weights: str = Field(
        "KwaiVGI/VideoReward/checkpoint-11352/model.pth", description="file of weights, or owner/name/file of the hub"
    )
    base: str = Field(
        "Qwen/Qwen2-VL-2B-Instruct", description="folder or hub id: sizes and tokenizer of the base model"
    )
    lora_alpha: float = Field(128.0, gt=0, description="alpha of the LoRA in the weights; its rank is seen in them")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load tokenizer and weights onto ``device``.

        Raises:
            RewardError: not there, damaged, or of another architecture; a template without its tokens.
        """
        from rewards.digest import digest
        from rewards.qwen2_vl_reward import Qwen2VLReward, frames_at

        try:
            question = read_template(self.template)
            judge = Qwen2VLReward.load(self.weights, self.base, TOKENS, self.lora_alpha, self.dtype, device)
        except RewardError as error:
            raise RewardError(f"reward 'video_reward': {error}") from error

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Scores:
            import torch

            clips = media if media.ndim == 5 else media[:, None]
            clips = clips[:, frames_at(clips.shape[1], self.frame_rate, self.frames)]
            rows, reasons = [], {}
            for index, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
                if any(token in prompt for token in TOKENS):
                    reasons[index] = f"the prompt holds one of the tokens {', '.join(TOKENS)}"
                    rows.append(torch.full((3,), torch.nan, device=media.device))
                else:
                    rows.append(judge(clip, question.replace(PLACE, prompt)).to(media.device))
            marks = torch.stack(rows) if rows else media.new_zeros(0, 3)
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


def read_template(file: Path) -> str:
    """The question of a text file, or of VideoAlign's ``prompt_template.py``, which is parsed and not run.

    Raises:
        RewardError: no such file, or not the three tokens in their order with the prompt before the last.
    """
    path = file.expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RewardError(
            f"template {file} cannot be read ({error}); it is in the repository KwaiVGI/VideoAlign"
        ) from None
    if path.suffix == ".py":
        text = _constant(text, PUBLISHED, file)
    places = [text.find(mark) for mark in (*TOKENS[:2], PLACE, TOKENS[2])]
    if -1 in places or places != sorted(places) or any(text.count(mark) != 1 for mark in (*TOKENS, PLACE)):
        order = " ".join((*TOKENS[:2], PLACE, TOKENS[2]))
        raise RewardError(f"template {file} should hold each of {order} once, in this order")
    return text


def _constant(source: str, name: str, file: Path) -> str:
    try:
        statements: Sequence[ast.stmt] = ast.parse(source).body
    except SyntaxError as error:
        raise RewardError(f"template {file} is not Python: {error}") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            value = statement.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    raise RewardError(f"template {file} does not define {name}")
