"""The commands that :mod:`benchmarks.kill` kills, and what they need."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN = """\
generator: {path: shapes, device: cpu}
prompts: {train: "shapes:train", heldout: "shapes:heldout", limit: 8}
rollout: {prompts: 2, group: 2, sampler: {steps: 2}}
reward: {kind: "benchmarks.helpers.kill_jobs:red"}
recipe: {kind: nft}
train: {steps: 3, lr: 0.01}
evaluate: {every: 2, prompts: 2, sampler: {steps: 2}}
samples: {every: 0, count: 2}
checkpoint: {every: 1, keep: 2}
"""
SEARCH = """\
generator: {path: shapes, device: cpu}
prompts: {source: "shapes:heldout", limit: 3}
reward: {kind: "benchmarks.helpers.kill_jobs:red"}
search: {kind: best_of_n, sampler: {steps: 2}}
budget: {network_calls: 8}
batch: 1
"""
REWARD = "data: {train: pairs.jsonl}\nfit: {steps: 2, batch: 4}\nhead: {kind: mlp, hidden: 8}\n"


def red(media: Any, prompts: list[str]) -> Any:
    """The share of red: a reward that needs nothing."""
    return media[:, 0].mean(dim=(-1, -2))


# -- the commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A command.

    Args:
        run: does it in a working folder; ``again`` says that it was killed before.
        out: what it writes there.
        prepare: makes what it needs.
        processes: whether it is one that several processes share.
    """

    run: Callable[[Path, bool], object]
    out: str
    prepare: Callable[[Path], object] = lambda folder: None
    processes: bool = False


def _train(folder: Path, again: bool, *, overwrite: bool = False) -> None:
    from align.config.load import load_config
    from align.training.trainer import train

    config = load_config(folder / "train.yaml", [f"out={folder / 'run'}"])
    train(config, resume=again and not overwrite, overwrite=overwrite)


def _overwrite(folder: Path, again: bool) -> None:
    _train(folder, again, overwrite=True)


def _search(folder: Path, again: bool) -> None:
    from align.search.run import run_search
    from align.search.settings import load_search

    run_search(load_search(folder / "search.yaml", [f"out={folder / 'run'}"]), resume=again)


def _reward(folder: Path, again: bool) -> None:
    from align.preference.settings import load_reward_training
    from align.preference.train import train_reward

    config = load_reward_training(folder / "reward.yaml", [f"out={folder / 'reward'}"])
    train_reward(config, overwrite=(folder / "reward").exists())


def _export(folder: Path, again: bool) -> None:
    from align.export import export
    from align.runs.trained import find_policy
    from alignflow.errors import RunFolderError

    try:
        export(find_policy(folder / "run"), "diffusers", folder / "out")
    except RunFolderError:  # it was complete before the kill
        if not again:
            raise


def _write(**files: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name, text in files.items():
            (folder / f"{name}.yaml").write_text(text)

    return prepare


def _trained(folder: Path) -> None:
    _write(train=TRAIN)(folder)
    _train(folder, False)


def _pairs(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    _write(reward=REWARD)(folder)
    rows = []
    for index in range(8):
        row = {"prompt": f"a circle {index}"}
        for channel, side in enumerate(("chosen", "rejected")):
            pixels = np.full((32, 32, 3), 20 + 10 * index, np.uint8)
            pixels[..., channel] = 200
            Image.fromarray(pixels).save(folder / f"{index}-{side}.png")
            row[side] = f"{index}-{side}.png"
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")


JOBS = {
    "train": Job(_train, "run", _write(train=TRAIN), processes=True),
    "overwrite": Job(_overwrite, "run", _trained),
    "search": Job(_search, "run", _write(search=SEARCH)),
    "reward": Job(_reward, "reward", _pairs),
    "export": Job(_export, "out", _trained),
}
