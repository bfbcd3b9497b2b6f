"""Settings of the generator and of what is trained of it. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

import generators
from alignflow.devices import malformed
from alignflow.kinds import listing, nearest, problems_at
from alignflow.settings import Settings
from alignflow.strict import Word

Side = Annotated[int, Field(ge=8, le=16_384, multiple_of=8)]
"""Pixels; no pipeline draws finer steps, most draw coarser ones, which the pipeline itself tells."""


class GeneratorConfig(Settings):
    """The pipeline whose samples are to get better."""

    kind: str = Field("sd3", description="adapter: a file of generators/, or package.module:Class")
    path: str = Field(description="embedded world (shapes, shapes-edit, shapes-fill), folder, or hub id owner/name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of the networks")
    size: tuple[Side, Side] | None = Field(None, description="[height, width] in pixels; null = the pipeline's own")
    frames: int | None = Field(None, ge=1, le=100_000, description="frames of a clip; null = the pipeline's own")
    text_length: int | None = Field(None, ge=1, description="prompt tokens the network reads; null = pipeline's own")
    embedded_guidance: float | None = Field(None, ge=0, description="guidance scale a distilled network takes as input")
    negative_prompt: str = Field("", description="what classifier-free guidance leads away from")
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the spread guidance adds that is taken back")
    frame_rate: int | None = Field(None, ge=1, description="frames a second the network is told; null = pipeline's own")
    device: str = Field("auto", description="auto (what accelerate chooses), cpu, cuda, cuda:1, mps")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        known = generators.kinds()
        if kind not in known and ":" not in kind:
            message = (
                f"no such generator{nearest(kind, known)}; there are {listing(known, kind)}, or package.module:Class"
            )
            raise problems_at([("", message)], kind)
        return kind

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if wrong := malformed(device, auto=True):
            raise problems_at([("", wrong)], device)
        return device


class LoRAPolicy(Settings):
    """Train low-rank adapters on the frozen backbone."""

    kind: Literal["lora"] = Field("lora", description="low-rank adapters")
    rank: int = Field(16, ge=1, description="rank of every adapter")
    alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; null = rank, so scale 1")
    targets: list[Word] | None = Field(
        None, min_length=1, description="module names to adapt; null = the generator's own list"
    )
    init: str | None = Field(
        None, description="LoRA that training starts from: a file or folder; its ranks and layers replace those above"
    )

    def shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(exclude_none=True, exclude={"rank"} if self.init else set())

    @model_validator(mode="after")
    def _from_the_file(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("rank", "alpha", "targets") if getattr(self, name) != fields[name].default]
        if self.init is not None and given:
            raise problems_at([(given[0], "comes from the file of policy.init; leave it out")], getattr(self, given[0]))
        return self


class FullPolicy(Settings):
    """Train every weight of the backbone."""

    kind: Literal["full"] = Field("full", description="all weights")

    def shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(exclude_none=True)
