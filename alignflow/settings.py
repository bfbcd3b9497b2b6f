"""Base classes of all settings. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from alignflow import secrets
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import problems_at
from alignflow.paths import expanded, unwritable
from alignflow.strict import Strict

Problems = list[tuple[str, str]]


class Settings(Strict):
    """Base of every part of the tree: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WithoutSecrets(Settings):
    """A tree that is copied into folders, pages and logs, and so may hold no password, key or token."""

    @model_validator(mode="after")
    def _no_secrets(self) -> Self:
        if paths := list(secrets.find(self.model_dump(mode="json"))):
            message = (
                "holds a secret, and configs are copied into run folders, reports and model cards: put it into an "
                "environment variable and write ${NAME} here, or name the variable in token_env where there is one"
            )
            raise problems_at([(".".join(path), message) for path in paths], secrets.HIDDEN)
        return self


class RunSettings(WithoutSecrets):
    """Settings of every config that writes its own folder."""

    command: ClassVar[str]
    """Command that runs it: ``alignflow`` and this."""
    trains: ClassVar[str] = ""
    """Name of the trained object, if one command has several trees of settings."""

    name: str = Field(
        pattern=r"^[\w+-][\w.+-]*$",
        max_length=200,
        description="name of the run folder; default: derived from the config's folder and file name",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="random seed of the run, except for parts that have their own seed"
    )
    out: str | None = Field(None, description="run folder; null = runs/<name>")

    @field_validator("out")
    @classmethod
    def _can_be_made(cls, out: str | None) -> str | None:
        if out is not None and (reason := unwritable(out)):
            raise problems_at([("", f"cannot be a run folder: {reason}")], out)
        return out

    @property
    def run_dir(self) -> Path:
        """The run folder; raises ConfigError where ``out`` begins with ``~`` and a user that is not there."""
        try:
            return expanded(self.out) if self.out is not None else Path("runs") / self.name
        except ValueError as error:
            raise ConfigError([Problem("out", str(error))]) from None
