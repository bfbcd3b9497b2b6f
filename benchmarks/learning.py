"""Held-out gold of recipes before and after training, over seeds.

    python -m benchmarks.learning configs/shapes/nft.yaml configs/shapes/grpo.yaml --seeds 0 1 2 --json out.json
    python -m benchmarks.learning configs/shapes/nft.yaml configs/shapes/grpo.yaml --out runs/learning
    alignflow compare runs/learning/*

A seed is that of training and of the held-out noise, so every seed has its own base. ``train.lr=0`` is
the control: nothing may rise. ``--out`` keeps the run folders, and the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from align.config.command_line import files_and_overrides
from align.config.load import default_name, load_config
from align.sweeps.members import name_of
from align.sweeps.words import CONFIG
from align.training.trainer import train
from alignflow.errors import AlignflowError


def learn(path: Path, seed: int, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """One run of a config; its summary.

    Args:
        out: where the run folder is kept, under :func:`run_name`; one that is there already is continued. None for a
            temporary folder.
    """
    with ExitStack() as kept:
        folder = out or Path(kept.enter_context(tempfile.TemporaryDirectory()))
        name = run_name(path, seed, overrides)
        fixed = [f"seed={seed}", f"evaluate.seed={seed}", "evaluate.every=0", "samples.count=0", "checkpoint.every=0"]
        place = [f"name={json.dumps(name)}", f"out={json.dumps(str(folder / name))}"]
        return train(load_config(path, [*fixed, *overrides, *place]), resume=out is not None)


def run_name(path: Path, seed: int, overrides: list[str]) -> str:
    """Name of a run by its config, overrides and seed: ``shapes-nft-lr-0-seed-2``."""
    given = dict(override.split("=", 1) for override in overrides)
    return name_of({CONFIG: default_name([path]), **given, "seed": str(seed)})


def main() -> None:
    """Run every config with every seed; print a row each and a mean, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help="configs, then overrides of all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the summaries here")
    parser.add_argument("--out", type=Path, help="keep the run folders here, for alignflow compare")
    options = parser.parse_args()
    configs, overrides = files_and_overrides(options.words[0], options.words[1:])
    results: dict[str, list[dict[str, Any]]] = {}
    for path in configs:
        runs = results[str(path)] = []
        for seed in options.seeds:
            runs.append(learn(path, seed, overrides, options.out))
            last = runs[-1]
            rise = last["gold_after"] - last["gold_before"]
            line = f"{last['gold_before']:.3f} -> {last['gold_after']:.3f}  {rise:+.3f}  {last['seconds']:.0f} s"
            print(f"{path}  seed {seed}  {line}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
        rises = [run["gold_after"] - run["gold_before"] for run in runs]
        print(f"{path}  mean {statistics.mean(rises):+.3f}  lowest {min(rises):+.3f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except AlignflowError as error:
        raise SystemExit(f"error: {error}") from None
