"""Held-out gold of recipes before and after training, over seeds.

    python -m benchmarks.learning configs/shapes/nft.yaml configs/shapes/grpo.yaml --seeds 0 1 2 --json out.json

A seed is that of training and of the held-out noise, so every seed has its own base. ``train.lr=0`` is
the control: nothing may rise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from align.config.command_line import files_and_overrides
from align.config.load import load_config
from align.training.trainer import train


def learn(path: Path, seed: int, overrides: list[str]) -> dict[str, Any]:
    """One run of a config; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"seed={seed}", f"evaluate.seed={seed}", "evaluate.every=0", "samples.count=0", "checkpoint.every=0"]
        return train(load_config(path, [*fixed, *overrides, f"out={folder}/run"]))


def main() -> None:
    """Run every config with every seed; print a row each and a mean, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help="configs, then overrides of all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the summaries here")
    options = parser.parse_args()
    configs, overrides = files_and_overrides(options.words[0], options.words[1:])
    results: dict[str, list[dict[str, Any]]] = {}
    for path in configs:
        runs = results[str(path)] = []
        for seed in options.seeds:
            runs.append(learn(path, seed, overrides))
            last = runs[-1]
            rise = last["gold_after"] - last["gold_before"]
            line = f"{last['gold_before']:.3f} -> {last['gold_after']:.3f}  {rise:+.3f}  {last['seconds']:.0f} s"
            print(f"{path}  seed {seed}  {line}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
        rises = [run["gold_after"] - run["gold_before"] for run in runs]
        print(f"{path}  mean {statistics.mean(rises):+.3f}  lowest {min(rises):+.3f}", flush=True)


if __name__ == "__main__":
    main()
