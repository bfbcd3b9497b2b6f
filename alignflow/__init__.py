"""alignflow: align image and video generators with rewards.

The public functions load on first use, so ``import alignflow`` imports neither torch nor diffusers.

>>> import alignflow
>>> config = alignflow.load_config("configs/quickstart.yaml", ["train.steps=10"])
>>> summary = alignflow.train(config)

For notebooks there is one call each: ``load_generator``, ``load_reward``, ``sample``, ``grid``, ``animation``,
``search``, and ``training`` for steps by hand (:mod:`align.by_hand`).
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "load_config": "align.config.load",
    "load_generator": "align.by_hand",
    "load_reward": "align.by_hand",
    "sample": "align.by_hand",
    "grid": "align.by_hand",
    "animation": "align.by_hand",
    "training": "align.by_hand",
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

_CALLED = {"score": "score_files"}
"""Names that differ where they are defined."""

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'alignflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), _CALLED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
