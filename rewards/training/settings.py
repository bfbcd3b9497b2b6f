"""Settings of trained rewards: the backbone, and the head on its features. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from alignflow.strict import Strict
from rewards.judges.models import AnyJudge, Local


class Settings(Strict):
    """Base: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


QUESTION = 'How well does this {medium} show "{prompt}", and how well is it made?'
"""Question before the place where a vision-language model's features are read. In our words."""


SAY = 'Say what this {medium} shows, and how well it shows "{prompt}".'
"""Question to the judge that writes about a sample before it is scored. In our words."""


class Thought(Settings):
    """Text that a frozen judge writes about a sample before the head reads both (DeScore, arXiv 2605.05922)."""

    writer: AnyJudge = Field(
        Local(), description="judge that writes; its lora may be the run folder of alignflow reward reason"
    )
    template: str = Field(SAY, description="question to the writer, with {prompt}; use the one from its training")
    longest: int = Field(1024, ge=1, description="maximum number of tokens per thought")
    dropout: float = Field(
        0.5, ge=0, lt=1, description="share of training samples that are read without their thought (published: 0.5)"
    )


class Backbone(Settings):
    """The CLIPModel that provides a head's features, and which of its weights are trained too."""

    apart: ClassVar[bool] = True
    """Whether image and prompt have features of their own."""
    kind: Literal["clip"] = Field("clip", description="CLIPModel: image and prompt are encoded separately")
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


class VLMBackbone(Settings):
    """A vision-language model that reads image or video and prompt together; the head reads its last hidden states.

    VideoReward (arXiv 2501.13918), HPSv3 (arXiv 2508.03789) and DeScore read at tokens of their own (``read: query``),
    BaseReward (arXiv 2509.16127) at the last one (``read: last``), SoliReward (arXiv 2512.22170) at all tokens of
    several layers (``read: layers``).
    """

    apart: ClassVar[bool] = False
    kind: Literal["vlm"] = Field(
        "vlm", description="vision-language model: image or video and prompt are read together"
    )
    model: str = Field(
        "Qwen/Qwen2-VL-2B-Instruct",
        description="Qwen2-VL, Qwen2.5-VL or Qwen3-VL: shapes (the embedded world's judge), or a folder or hub id with "
        "model, tokenizer and image settings",
    )
    template: str = Field(QUESTION, description="text after the images, with {prompt} and optionally {medium}")
    read: Literal["query", "last", "layers"] = Field(
        "query",
        description="hidden states that the head reads: query = of trained tokens after the question | last = of the "
        "question's last token | layers = of all tokens of several layers, by trained attention",
    )
    queries: int = Field(1, ge=1, description="number of trained tokens; the head reads all of them")
    layers: int = Field(
        4, ge=1, description="number of layers that the attention reads, evenly spaced up to the last one"
    )
    thought: Thought | None = Field(
        None, description="text about the sample that a judge writes first and the model reads too; null = none"
    )
    tune: Literal["none", "lora"] = Field("lora", description="none = frozen | lora = adapters in the language model")
    rank: int = Field(16, ge=1, description="LoRA rank")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="language-model layers to adapt, by the end of their names",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of the frozen weights in training; trained weights are float32"
    )
    chunk: int = Field(4, ge=1, description="questions per network call in training; affects memory only")
    pixels: int | None = Field(None, ge=1, description="maximum number of pixels per image; null = the model's default")
    frames: int | None = Field(8, ge=1, description="frames shown per video, evenly spaced; null = all")
    longest: int = Field(16384, ge=1, description="maximum number of tokens per question, including images")

    @field_validator("template")
    @classmethod
    def _shows_the_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise PydanticCustomError("setting", "does not show {place}", {"place": "{prompt}"})
        return template

    @model_validator(mode="after")
    def _dropped_while_it_learns(self) -> Self:
        if self.thought is not None and self.thought.dropout and self.tune == "none" and self.read == "last":
            raise PydanticCustomError(
                "setting", "reads features once, so it cannot leave thoughts out: use thought.dropout=0"
            )
        return self


BACKBONES: dict[str, type[Settings]] = {"clip": Backbone, "vlm": VLMBackbone}
AnyBackbone = Backbone | VLMBackbone


class HeadSettings(Settings):
    """Base of every head's settings: features of image and prompt, ``[n, width]`` each -> outputs ``[n, K]``.

    Features of an image that was read together with its prompt hold the prompt too.
    """

    kind: str
    users: ClassVar[bool] = False
    """Whether it needs the column ``user`` of the table, who judged."""
    compares: ClassVar[bool] = False
    """Whether it compares features of the image with those of the prompt, which must have been read apart."""
    reads_prompt: ClassVar[bool] = False
    """Whether it reads features of the prompt alone, also where the image was read together with it."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the outputs after the score, which are reported beside it."""
        return ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the scores in the table, columns chosen_score.NAME and rejected_score.NAME, it may learn from."""
        return ()


class MLPSettings(HeadSettings):
    """A linear layer or a small network on image, prompt and their product."""

    kind: Literal["mlp"] = Field("mlp", description="linear or MLP")
    hidden: int = Field(0, ge=0, description="width of the hidden layer; 0 = linear")


class CosineSettings(HeadSettings):
    """Cosine of the prompt and the image features after a learned matrix, initialised to the identity."""

    compares: ClassVar[bool] = True
    kind: Literal["cosine"] = Field("cosine", description="projected cosine")


class UncertainSettings(HeadSettings):
    """Mean and deviation of a Gaussian score, as in HPSv3's head (arXiv 2508.03789)."""

    kind: Literal["uncertain"] = Field("uncertain", description="score with a deviation")
    hidden: int = Field(64, ge=0, description="width of the hidden layer; 0 = linear")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("deviation",)


class DimensionsSettings(HeadSettings):
    """A score per dimension, and their sum, as in VideoReward's head (arXiv 2501.13918)."""

    kind: Literal["dimensions"] = Field("dimensions", description="scores of several dimensions and their sum")
    names: list[str] = Field(
        ["visual_quality", "motion_quality", "text_alignment"],
        min_length=1,
        description="names of the dimensions; the table has columns chosen_score.NAME and rejected_score.NAME",
    )
    hidden: int = Field(0, ge=0, description="width of the hidden layer; 0 = linear")

    @field_validator("names")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        return distinct(names)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.names)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.names)


class MoESettings(HeadSettings):
    """Criteria mixed into aspects and aspects into the score, by gates that read the prompt (MJ-Video's head)."""

    reads_prompt: ClassVar[bool] = True
    kind: Literal["moe"] = Field("moe", description="mixture of criteria")
    groups: list[Annotated[int, Field(ge=1)]] = Field(
        [4, 4], min_length=1, description="number of criteria per aspect, where they have no names"
    )
    aspects: dict[str, list[str]] | None = Field(
        None,
        description="names of the criteria of each aspect, in place of groups; loss criteria learns them from columns "
        "chosen_score.NAME and rejected_score.NAME, and they are reported beside the score; null = no names",
    )
    hidden: int = Field(64, ge=1, description="width of the gates' hidden layer")
    temperature: float = Field(1.0, gt=0, description="softmax temperature of the gate over aspects")

    @field_validator("aspects")
    @classmethod
    def _named(cls, aspects: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
        if aspects is not None:
            if not aspects or not all(aspects.values()):
                raise PydanticCustomError("setting", "needs at least one aspect, and a criterion in each")
            distinct([*aspects, *(name for names in aspects.values() for name in names)])
        return aspects

    @property
    def sizes(self) -> list[int]:
        """Number of criteria of each aspect."""
        return list(self.groups) if self.aspects is None else [len(names) for names in self.aspects.values()]

    @property
    def parts(self) -> tuple[str, ...]:
        known = self.aspects or {}
        return (*known, *(name for names in known.values() for name in names))

    @property
    def labels(self) -> tuple[str, ...]:
        return self.parts


class IdealPointSettings(HeadSettings):
    """PAL: nearness to a user's ideal point, a mixture of prototypes (arXiv 2406.08469)."""

    users: ClassVar[bool] = True
    kind: Literal["ideal_point"] = Field("ideal_point", description="PAL's ideal point")
    prototypes: int = Field(2, ge=1, description="number of prototypes; every user is a convex combination of them")
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


def distinct(names: list[str]) -> list[str]:
    """The names; an error for one that is there twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise PydanticCustomError("setting", "names {name} twice", {"name": twice[0]})
    return names


HEADS: dict[str, type[HeadSettings]] = {
    cls.model_fields["kind"].default: cls
    for cls in (
        MLPSettings, CosineSettings, UncertainSettings, DimensionsSettings, MoESettings, IdealPointSettings,
        VariationalSettings,
    )
}  # fmt: skip
"""Kind -> settings."""


def parse_backbone(data: Any) -> Any:
    """A mapping -> settings of its kind, ``clip`` where none is given."""
    if isinstance(data, Settings):
        return data
    return BACKBONES[data.get("kind", "clip")].model_validate(data)


def parse_head(data: Any) -> HeadSettings:
    """A mapping with ``kind`` -> settings; raises KeyError or ValidationError."""
    return data if isinstance(data, HeadSettings) else HEADS[data["kind"]].model_validate(data)
