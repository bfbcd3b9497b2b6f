"""Settings of trained rewards: the backbone, the head on its features. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from alignflow.strict import Strict

if TYPE_CHECKING:
    from rewards.training.heads import Head


class Settings(Strict):
    """Base: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Settings):
    """The CLIPModel whose features a head reads, and which of its weights are trained too."""

    model: str = Field("shapes", description="shapes, a CLIPModel folder, a hub id, or a file in open_clip's layout")
    processor: str | None = Field(None, description="folder or hub id of tokenizer and image settings, if elsewhere")
    quick_gelu: bool = Field(False, description="a file's activation is QuickGELU, as in OpenAI's weights")
    tune: Literal["none", "lora", "last"] = Field(
        "none", description="none = frozen, read once | lora = adapters in the vision tower | last = its last layers"
    )
    rank: int = Field(8, ge=1, description="of the LoRA on queries and values; it is merged when saved")
    layers: int = Field(2, ge=1, description="how many last layers, with the projection behind them")


class HeadSettings(Settings):
    """Base of every head's settings: features of picture and prompt, ``[n, width]`` each -> outputs ``[n, K]``."""

    kind: str
    outputs: ClassVar[int] = 1
    users: ClassVar[bool] = False
    """Whether it wants to know who judged: a column ``user`` in the table."""

    def build(self, width: int, users: int) -> Head:
        """An untrained head for features of ``width`` numbers."""
        from rewards.training import heads

        return getattr(heads, type(self).__name__.removesuffix("Settings"))(self, width, users)


class MLPSettings(HeadSettings):
    """A linear layer or a small network on picture, prompt and their product."""

    kind: Literal["mlp"] = Field("mlp", description="linear or MLP")
    hidden: int = Field(0, ge=0, description="width of the hidden layer; 0 = linear")


class CosineSettings(HeadSettings):
    """Cosine of the prompt and the picture's features after a learned matrix, which begins as the identity."""

    kind: Literal["cosine"] = Field("cosine", description="projected cosine")


class UncertainSettings(HeadSettings):
    """Mean and deviation of a Gaussian score, as HPSv3's head (arXiv 2508.03789)."""

    outputs: ClassVar[int] = 2
    kind: Literal["uncertain"] = Field("uncertain", description="score with a deviation")
    hidden: int = Field(64, ge=0, description="width of the hidden layer; 0 = linear")


class MoESettings(HeadSettings):
    """Criteria mixed into aspects and aspects into the score, by gates that read the prompt (MJ-Video's head)."""

    kind: Literal["moe"] = Field("moe", description="mixture of criteria")
    groups: list[int] = Field([4, 4], min_length=1, description="criteria of each aspect")
    hidden: int = Field(64, ge=1, description="width of the gates' hidden layer")
    temperature: float = Field(1.0, gt=0, description="of the gate over aspects")


class IdealPointSettings(HeadSettings):
    """PAL: less the squared distance to a user's ideal point, a mixture of prototypes (arXiv 2406.08469)."""

    users: ClassVar[bool] = True
    kind: Literal["ideal_point"] = Field("ideal_point", description="PAL's ideal point")
    prototypes: int = Field(2, ge=1, description="points whose convex hull holds every user")
    dim: int = Field(32, ge=1, description="of the space that pictures and users share")


class VariationalSettings(HeadSettings):
    """VPL: a score given a latent user, who is inferred from some of his pairs (arXiv 2408.10075)."""

    users: ClassVar[bool] = True
    kind: Literal["variational"] = Field("variational", description="VPL's latent user")
    dim: int = Field(8, ge=1, description="of the latent user")
    hidden: int = Field(64, ge=1, description="width of encoder and decoder")
    beta: float = Field(0.01, ge=0, description="weight of the latent's KL, reached over the first half of training")
    per_user: int = Field(16, ge=2, description="pairs of a user in a batch; half of them tell who judged the others")


HEADS: dict[str, type[HeadSettings]] = {
    cls.model_fields["kind"].default: cls
    for cls in (MLPSettings, CosineSettings, UncertainSettings, MoESettings, IdealPointSettings, VariationalSettings)
}
"""Kind -> settings."""


def parse_head(data: Any) -> HeadSettings:
    """A mapping with ``kind`` -> settings; raises KeyError or ValidationError."""
    return data if isinstance(data, HeadSettings) else HEADS[data["kind"]].model_validate(data)
