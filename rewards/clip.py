"""CLIP similarity of a picture and its prompt, by any ``CLIPModel``, with gradients to the pixels."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rewards.base import Reward, RewardError, RewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ClipReward(RewardSettings):
    """CLIP similarity of image and prompt, differentiable; takes CLIP, PickScore and other CLIPModel weights.

    The score of a video is the mean over its frames.
    """

    kind: Literal["clip"] = Field("clip", description="CLIP similarity")
    model: str = Field("shapes", description="shapes (the embedded world's own), a CLIPModel folder, or a hub id")
    processor: str | None = Field(None, description="folder or hub id of tokenizer and image settings, if elsewhere")
    variant: Literal["cosine", "percent", "logit"] = Field(
        "cosine",
        description="cosine in -1..1 | percent = 100 cosine | logit = the model's scale times cosine (PickScore)",
    )
    batch: int = Field(32, ge=1, description="images through the model at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of the model")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load model, tokenizer and image settings.

        Raises:
            RewardError: not there, not a CLIP model, or weights missing.
        """
        from rewards.clip_model import Clip

        clip = Clip.load(weights(self.model), weights(self.processor or self.model), self.dtype, device)
        scale = {"cosine": 1.0, "percent": 100.0, "logit": clip.logit_scale}[self.variant]

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return scale * clip.similarity(media, prompts, self.batch)

        return Reward("clip", function, range=(-scale, scale), differentiable=True)


def weights(path: str) -> str:
    """What ``from_pretrained`` is to read: the folder of an embedded model, else ``path`` as it is.

    Embedded models lie with the world they were trained on; only their folder is named here, nothing is imported.
    """
    embedded = Path(str(files("generators"))) / "shapes" / "weights" / "clip"
    folder = embedded if path == "shapes" else Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise RewardError(f"reward 'clip': no folder {folder}; model is shapes, a folder, or a hub id owner/name")
    return path


def from_pretrained(cls: Any, path: str, **options: Any) -> Any:
    """``cls.from_pretrained`` from a folder or the hub's cache, and from the hub only if it is not there.

    Raises:
        RewardError: neither has it, or it is damaged.
    """
    try:
        try:
            return cls.from_pretrained(path, local_files_only=True, **options)
        except OSError:
            if Path(path).is_dir():
                raise
            _ask_hub()
            return cls.from_pretrained(path, **options)
    except Exception as error:  # transformers raises whatever its readers raise
        said = (str(error).strip().splitlines() or [""])[0]
        why = f"{type(error).__name__}: {said}"
        raise RewardError(f"reward 'clip': {path} does not load as {cls.__name__}: {why}") from error


def _ask_hub() -> None:
    """One request that raises when the hub does not answer, because its client retries for 20 s a file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        raise RewardError("not in the local hub cache, and HF_HUB_OFFLINE is set")
    get_session().head(constants.ENDPOINT, timeout=2.0)
