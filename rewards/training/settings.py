"""Settings of trained rewards: the backbone, and the head on its features. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from alignflow.lazy import lazy
from alignflow.strict import Strict

if TYPE_CHECKING:
    from rewards.training import heads
    from rewards.training.heads import Head
else:
    heads = lazy("rewards.training.heads")


class Settings(Strict):
    """Base: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Settings):
    """The CLIPModel that provides a head's features, and which of its weights are trained too."""

    model: str = Field("shapes", description="shapes, a CLIPModel folder, a hub id, or a file in open_clip's layout")
    processor: str | None = Field(
        None, description="folder or hub id of the tokenizer and image settings; null = those of model"
    )
    quick_gelu: bool = Field(False, description="use QuickGELU for a file's activation, as OpenAI's weights require")
    tune: Literal["none", "lora", "last"] = Field(
        "none",
        description="none = frozen, features computed once | lora = adapters in the vision tower | last = the "
        "last layers",
    )
    rank: int = Field(8, ge=1, description="LoRA rank on queries and values; the LoRA is merged when saved")
    layers: int = Field(2, ge=1, description="number of trained last layers, together with the projection after them")


class HeadSettings(Settings):
    """Base of every head's settings: features of image and prompt, ``[n, width]`` each -> outputs ``[n, K]``."""

    kind: str
    outputs: ClassVar[int] = 1
    users: ClassVar[bool] = False
    """Whether it wants to know who judged: a column ``user`` in the table."""

    def build(self, width: int, users: int) -> Head:
        """An untrained head for features of ``width`` numbers."""
        return getattr(heads, type(self).__name__.removesuffix("Settings"))(self, width, users)


class MLPSettings(HeadSettings):
    """A linear layer or a small network on image, prompt and their product."""

    kind: Literal["mlp"] = Field("mlp", description="linear or MLP")
    hidden: int = Field(0, ge=0, description="width of the hidden layer; 0 = linear")


class CosineSettings(HeadSettings):
    """Cosine of the prompt and the image features after a learned matrix, initialised to the identity."""

    kind: Literal["cosine"] = Field("cosine", description="projected cosine")


class UncertainSettings(HeadSettings):
    """Mean and deviation of a Gaussian score, as in HPSv3's head (arXiv 2508.03789)."""

    outputs: ClassVar[int] = 2
    kind: Literal["uncertain"] = Field("uncertain", description="score with a deviation")
    hidden: int = Field(64, ge=0, description="width of the hidden layer; 0 = linear")


class MoESettings(HeadSettings):
    """Criteria mixed into aspects and aspects into the score, by gates that read the prompt (MJ-Video's head)."""

    kind: Literal["moe"] = Field("moe", description="mixture of criteria")
    groups: list[int] = Field([4, 4], min_length=1, description="number of criteria per aspect")
    hidden: int = Field(64, ge=1, description="width of the gates' hidden layer")
    temperature: float = Field(1.0, gt=0, description="softmax temperature of the gate over aspects")


class IdealPointSettings(HeadSettings):
    """PAL: nearness to a user's ideal point, a mixture of prototypes (arXiv 2406.08469)."""

    users: ClassVar[bool] = True
    kind: Literal["ideal_point"] = Field("ideal_point", description="PAL's ideal point")
    prototypes: int = Field(2, ge=1, description="number of prototypes; every user lies in their convex hull")
    dim: int = Field(32, ge=1, description="dimension of the space shared by images and users")
    form: Literal["distance", "angle"] = Field(
        "distance",
        description="nearness: distance = negative squared distance (PAL-A) | angle = product of the image's direction "
        "and the point (PAL-B)",
    )


class VariationalSettings(HeadSettings):
    """VPL: a score given a latent user, inferred from some of the user's pairs (arXiv 2408.10075)."""

    users: ClassVar[bool] = True
    kind: Literal["variational"] = Field("variational", description="VPL's latent user")
    dim: int = Field(8, ge=1, description="dimension of the latent user")
    hidden: int = Field(64, ge=1, description="width of the encoder and decoder")
    beta: float = Field(0.01, ge=0, description="weight of the latent's KL, reached after the first half of training")
    per_user: int = Field(16, ge=2, description="pairs per user in a batch; half of them are used to infer the user")


HEADS: dict[str, type[HeadSettings]] = {
    cls.model_fields["kind"].default: cls
    for cls in (MLPSettings, CosineSettings, UncertainSettings, MoESettings, IdealPointSettings, VariationalSettings)
}
"""Kind -> settings."""


def parse_head(data: Any) -> HeadSettings:
    """A mapping with ``kind`` -> settings; raises KeyError or ValidationError."""
    return data if isinstance(data, HeadSettings) else HEADS[data["kind"]].model_validate(data)
