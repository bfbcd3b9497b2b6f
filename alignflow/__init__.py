"""alignflow: align image and video generators with rewards.

The public functions load on first use, so ``import alignflow`` imports neither torch nor diffusers.

>>> import alignflow
>>> config = alignflow.load_config("configs/quickstart.yaml", ["train.steps=10"])
>>> summary = alignflow.train(config)
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "load_config": "align.config",
    "load_reward": "align.config",
    "load_generator": "align.build",
    "train": "align.trainer",
    "search": "align.search",
    "run_search": "align.search.run",
    "score": "align.scoring",
    "score_files": "align.scoring",
    "evaluate": "align.evaluate",
    "evaluate_run": "align.evaluate",
    "sample_to_folder": "align.evaluate",
    "export": "align.export",
    "write_report": "align.report",
    "AlignflowError": "align.errors",
    "ConfigError": "align.errors",
    "GeneratorError": "generators.errors",
    "RewardError": "rewards.base",
}

_CALLED = {"load_generator": "build_generator", "score": "score_files"}
"""Names that differ where they are defined."""

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'alignflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), _CALLED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
