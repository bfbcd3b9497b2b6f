"""Settings of the generator and of its trained part. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

import generators
from alignflow.devices import malformed
from alignflow.kinds import listing, nearest, problems_at
from alignflow.settings import Settings
from alignflow.strict import Named, Word
from generators.settings import Options


class Pipeline(Settings):
    """Name of a pipeline and the dtype of its networks."""

    kind: str = Field("sd3", description="adapter: the name of a file in generators/adapters/, or package.module:Class")
    path: str = Field(
        description="pipeline: an embedded world (shapes, shapes-edit, shapes-fill, shapes-video), a local folder, or "
        "a hub id owner/name"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="compute dtype of the networks")


class GeneratorConfig(Options, Pipeline):
    """The diffusers pipeline to align."""

    device: str = Field("auto", description="device: auto (chosen by accelerate), cpu, cuda, cuda:1 or mps")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        known = generators.kinds()
        if kind not in known and ":" not in kind:
            others = f"there are {listing(known, kind)}, or package.module:Class"
            raise problems_at([("", f"no such generator{nearest(kind, known, others)}")], kind)
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
    alpha: float | None = Field(
        None, gt=0, description="LoRA alpha; the scale is alpha / rank; null = rank, for a scale of 1"
    )
    targets: list[Word] | None = Field(
        None, min_length=1, description="names of the modules to adapt; null = the generator's default list"
    )
    init: str | None = Field(
        None,
        description="LoRA file or folder to start training from; its ranks and layers override the settings "
        "above; null = a new LoRA",
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

    kind: Literal["full"] = Field("full", description="full fine-tuning")

    def shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(exclude_none=True)


class Expert(Settings):
    """A frozen LoRA that a gate mixes with others."""

    lora: str = Field(description="LoRA file or folder, or the folder of the run that trained it")


class GatePolicy(Settings):
    """Train a gate over frozen LoRAs: shares of each that depend on the block and the time."""

    kind: Literal["gate"] = Field("gate", description="a gate over frozen LoRAs")
    experts: Annotated[dict[str, Expert], Named] = Field(
        min_length=2, description="LoRAs to mix by name, such as one trained for each preference dimension"
    )
    features: int = Field(
        64, ge=2, le=4096, multiple_of=2, description="number of cosines and sines of the time that the gate reads"
    )

    def shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(exclude_none=True)


class UsersPolicy(Settings):
    """Train attention to the embedding of a prompt's user."""

    kind: Literal["users"] = Field("users", description="attention to users' embeddings, on the frozen backbone")
    embeddings: str = Field(
        description="safetensors file with an embedding [tokens, width] per user, as `alignflow reward users` writes it"
    )
    user: str | dict[str, float] | None = Field(
        None,
        description="user of prompts that have no column user, or {name: weight, ...} for a mixture; null = no "
        "user: samples of the base model",
    )

    def shown(self) -> dict[str, Any]:
        """The settings that count."""
        return self.model_dump(exclude_none=True)


POLICIES: dict[str, type[Settings]] = {"lora": LoRAPolicy, "full": FullPolicy, "gate": GatePolicy, "users": UsersPolicy}
"""Kind -> settings."""
