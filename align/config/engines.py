"""Settings of engines that generate the samples of a rollout elsewhere. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rewards.serving.crew import Workers


class PoolEngine(Workers):
    """Copies of the generator in Ray actors, on this machine or across a cluster.

    Workers on other machines need the same packages and the files that the config names.
    """

    returns_steps: ClassVar[bool] = True
    kind: Literal["pool"] = Field("pool", description="copies of the generator in Ray actors")


ENGINES = {"pool": PoolEngine}
"""Kind -> settings."""
