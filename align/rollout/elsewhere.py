"""Construction of the engine that a config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from align.policy.build import parameters_of
from align.rollout.engine import Engine, Remote
from align.rollout.pool_engine import RayPool
from align.rollout.sglang_engine import Sglang
from align.rollout.vllm_omni_engine import VllmOmni
from generators.base import Generator

if TYPE_CHECKING:
    from align.config.settings import Config

BUILDERS: dict[str, Callable[[Any, Config, Generator], Engine]] = {
    "pool": RayPool,
    "sglang": Sglang,
    "vllm_omni": VllmOmni,
}
"""Kind of the settings -> makes the engine from them, the config and the generator."""


def remote_of(config: Config, generator: Generator) -> Remote | None:
    """The engine of ``rollout.engine``, which has answered once; None if this process samples.

    Raises:
        AlignflowError: its package is not installed, or it does not start.
    """
    settings = getattr(config.rollout, "engine", None)
    if settings is None:
        return None
    engine = BUILDERS[settings.kind](settings, config, generator)
    return Remote(engine, generator, dict(parameters_of(config, generator)), settings.retries, settings.backoff)
