"""How much of a slow reward's time a training step does not see.

    python -m benchmarks.overlap configs/shapes/nft.yaml rollout.chunk=24 --reward-seconds 1

A reward that takes a second a call, on no CPU of this machine, is trained on with each ``rollout.overlap``, all taking
turns. Its cost is what the loop waits for it without overlap, beyond a reward that takes no time; hidden is the share
of that which the loop does not wait for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.command_line import files_and_overrides
from align.config.load import load_config, settings_of
from align.config.settings import Config
from align.runs.run_folder import RunFolder
from align.training.accelerating import accelerator_of
from align.training.trainer import Trainer


class Slow:
    """The share of red, after ``seconds`` of sleep."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, media: Tensor, prompts: list[str]) -> Tensor:
        """``[N]``."""
        time.sleep(self.seconds)
        return media[:, 0].mean(dim=(-1, -2))


def trainer_of(path: Path, overrides: list[str], overlap: str, seconds: float, folder: Path) -> Trainer:
    """A trainer of the config with the slow reward, which evaluates nothing."""
    kind = {"kind": "benchmarks.overlap:Slow", "options": {"seconds": seconds}}
    tree = settings_of(load_config(path, [f"rollout.overlap={overlap}", *overrides]))
    tree["prompts"]["heldout"], tree["evaluate"] = None, {}
    config = Config.model_validate({**tree, "reward": kind})
    accelerator = accelerator_of(config)
    return Trainer(config, RunFolder(folder), accelerator)


def measure(path: Path, overrides: list[str], seconds: float, steps: int) -> dict[str, Any]:
    """Seconds per step without a slow reward and with one in every mode, and the share of its cost that is hidden."""
    cases = {"free": ("none", 0.0), **{overlap: (overlap, seconds) for overlap in ("none", "chunks", "next")}}
    times: dict[str, list[float]] = {name: [] for name in cases}
    waits: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(path, overrides, *case, Path(folder)) for name, case in cases.items()}
        for step in range(steps + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                row = trainer.step(step)
                if step:  # the first samples two rollouts
                    times[name].append(time.perf_counter() - started)
                    waits[name].append(row["time"]["reward"])
    seconds_of = {name: statistics.median(values) for name, values in times.items()}
    waited = {name: statistics.median(values) for name, values in waits.items()}
    paid = waited["none"] - waited["free"]
    hidden = {name: 1 - (waited[name] - waited["free"]) / paid for name in ("chunks", "next")}
    return {
        "reward_seconds": paid,
        "hidden": hidden,
        "waited_seconds": waited,
        "step_seconds": seconds_of,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure a config, print what came out, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help="config, then overrides of it")
    parser.add_argument("--reward-seconds", type=float, default=1.0, help="seconds per call of the reward")
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    (config,), overrides = files_and_overrides(options.words[0], options.words[1:])
    result = measure(config, overrides, options.reward_seconds, options.steps)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
