"""What every part of a settings tree is. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

Problems = list[tuple[str, str]]


class Settings(BaseModel):
    """Base of every part of the tree: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSettings(Settings):
    """What every config holds that writes a folder of its own."""

    command: ClassVar[str]
    """What runs it: ``alignflow`` and this."""

    name: str = Field(pattern=r"^[\w+-][\w.+-]*$", description="names the run folder; default: the config's file name")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything random, but for what has a seed of its own")
    out: str | None = Field(None, description="run folder; null = runs/<name>")

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.out) if self.out is not None else Path("runs") / self.name
