"""Settings of a training run, read from YAML by :mod:`align.config.load`."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from align.config import consistency
from align.config.sections import Sections
from alignflow.kinds import problems_at


class Config(Sections):
    """Settings of one training run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if found := consistency.problems(self):
            raise problems_at(found)
        return self
