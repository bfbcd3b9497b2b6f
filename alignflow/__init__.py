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
    "load_config": "align.config.load",
    "load_reward": "align.config.load",
    "load_generator": "align.policy.build",
    "train": "align.training.trainer",
    "search": "align.search",
    "run_search": "align.search.run",
    "score": "align.evaluation.files",
    "score_files": "align.evaluation.files",
    "evaluate": "align.evaluation.evaluate",
    "evaluate_run": "align.evaluation.evaluate",
    "sample_to_folder": "align.evaluation.evaluate",
    "export": "align.export",
    "write_report": "align.report",
    "AlignflowError": "alignflow.errors",
    "ConfigError": "alignflow.errors",
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
