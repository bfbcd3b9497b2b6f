"""Recipes side by side at equal cost: held-out gold of runs that may make equally many network calls.

    python -m benchmarks.leaderboard --world shapes --calls 30000 --seeds 0 1
    python -m benchmarks.leaderboard --world shapes-fill --recipes nft flow_dpo --calls 30000 --seeds 0
    python -m benchmarks.leaderboard --write

A recipe is a config of the world: ``configs/<world>/<recipe>.yaml``, or the recipe, optimisation and sampler of
``configs/shapes/<recipe>.yaml`` on that world. A trial of two rollouts measures the cost of a rollout; the number of
rollouts follows from the budget, ``--calls`` or ``--seconds``. Finished runs are kept in ``docs/leaderboard.json`` and
not repeated, and an interrupted run resumes from its checkpoint. ``docs/leaderboard.md`` is written after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from align.config.load import load_config, read_yaml, resolved_settings
from align.config.settings import Config
from align.data.files import write_json
from align.report.changes import change_of
from align.report.reading import Run, read_run
from align.training.trainer import train
from benchmarks.helpers.leaderboard_page import write_page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "leaderboard.json"
RUNS = ROOT / "runs" / "leaderboard"
CARRIED = ("recipe", "train", "policy")
"""Sections that a recipe of the world ``shapes`` takes to another world, with the rollout's size, sampler and noise."""
Record = dict[str, Any]


def config_of(world: str, recipe: str, overrides: list[str]) -> Config:
    """The config of a recipe on a world.

    Raises:
        ConfigError: there is no such recipe, or it cannot run on the world.
    """
    own = ROOT / "configs" / world / f"{recipe}.yaml"
    if own.exists():
        return load_config(own, overrides)
    source = resolved_settings(load_config(ROOT / "configs" / "shapes" / f"{recipe}.yaml"))
    carried = {name: source[name] for name in CARRIED}
    rollout = {name: source["rollout"][name] for name in ("prompts", "group", "sampler", "same_noise")}
    layers = [f"{name}={json.dumps(value)}" for name, value in {**carried, "rollout": rollout}.items()]
    base = ROOT / "configs" / world / "base.yaml"
    return load_config(base if base.exists() else ROOT / "configs" / world / "nft.yaml", [*layers, *overrides])


def recipes_of(world: str) -> list[str]:
    """Recipes with a config on a world that generate their samples and find all files that they name."""
    found = []
    for path in sorted((ROOT / "configs" / world).glob("*.yaml")):
        settings = read_yaml(path)
        if path.stem == "base" or "search" in settings:
            continue
        config = load_config(path)
        trained = getattr(config.reward, "path", None)
        if config.rollout.kind == "online" and (trained is None or Path(trained).is_dir()):
            found.append(path.stem)
    return found


def cost_of_a_rollout(world: str, recipe: str, overrides: list[str]) -> tuple[float, float]:
    """Network calls and seconds of one rollout and its updates, from two of them."""
    fixed = ["train.steps=2", "evaluate.every=0", "evaluate.at_start=false", "evaluate.prompts=1", "samples.count=0"]
    out = RUNS / "trial"
    config = config_of(world, recipe, [*overrides, *fixed, "checkpoint.every=0", f"out={out}"])
    train(config, overwrite=True)
    rows = read_run(out).train
    shutil.rmtree(out)
    return statistics.mean(row["network_calls"] for row in rows), rows[-1]["seconds"] - rows[0]["seconds"]


def folder_of(key: Record) -> Path:
    """Run folder of a recipe, world and seed, until its record is saved."""
    return RUNS / f"{key['world']}-{key['recipe']}-seed-{key['seed']}"


def run(key: Record) -> Record:
    """Train one recipe with one seed within its budget; its record."""
    world, recipe, seed, overrides = key["world"], key["recipe"], key["seed"], key["overrides"]
    calls, seconds = cost_of_a_rollout(world, recipe, overrides)
    steps = max(1, math.floor(key["calls"] / calls if key["calls"] else key["seconds"] / seconds))
    out = folder_of(key)
    fixed = [
        f"train.steps={steps}", f"seed={seed}", f"evaluate.seed={seed}", f"evaluate.every={math.ceil(steps / 2)}",
        "samples.count=0", f"checkpoint.every={math.ceil(steps / 4)}", f"out={out}",
    ]  # fmt: skip
    train(config_of(world, recipe, [*overrides, *fixed]), resume=out.exists())
    return {**key, **record_of(read_run(out))}


def record_of(run: Run) -> Record:
    """The results of a finished run: changes of its held-out scores, curve, cost, diversity, drift."""
    scores = {}
    for name in run.score_names():
        found = change_of(run, name)
        if found is not None:
            scores[name] = {"before": found.before, "after": found.after, "error": found.error}
    curve = [
        {"calls": sum(row["network_calls"] for row in run.train if row["step"] <= one["step"]), **one["scores"]}
        for one in run.evals
    ]
    last = run.train[-1]
    few = max(1, len(run.train) // 8)
    diversity = [statistics.mean(row["diversity"] for row in part) for part in (run.train[:few], run.train[-few:])]
    return {
        "steps": len(run.train),
        "spent_calls": sum(row["network_calls"] for row in run.train),
        "spent_seconds": last["seconds"],
        "scores": scores,
        "curve": curve,
        "diversity": diversity,
        "drift": last.get("kl_velocity"),
    }


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="shapes", help="folder of configs/")
    parser.add_argument("--recipes", nargs="+", help="default: all with a config in that folder")
    parser.add_argument("--calls", type=int, help="budget in network calls of training, one row = one call")
    parser.add_argument("--seconds", type=float, help="budget in seconds of training, instead of --calls")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every config")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write the page from the results, without a run")
    options = parser.parse_args()
    records: list[Record] = json.loads(options.results.read_text()) if options.results.exists() else []
    if not options.write:
        if bool(options.calls) == bool(options.seconds):
            parser.error("give a budget: either --calls or --seconds")
        measure(options, records)
    write_page(records, options.results.with_suffix(".md"))


def measure(options: argparse.Namespace, records: list[Record]) -> None:
    """Run every recipe and seed that has no record yet; each record is saved as soon as it is there."""
    budget = {"calls": options.calls, "seconds": options.seconds, "overrides": options.set}
    done = [{name: one.get(name) for name in ("world", "recipe", "seed", *budget)} for one in records]
    for seed in options.seeds:
        for recipe in options.recipes or recipes_of(options.world):
            key = {"world": options.world, "recipe": recipe, "seed": seed, **budget}
            if key in done:
                continue
            record = run(key)
            records.append(record)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.results, records)
            shutil.rmtree(folder_of(key))
            write_page(records, options.results.with_suffix(".md"))
            gold = record["scores"].get("gold") or next(iter(record["scores"].values()))
            print(f"{recipe}  seed {seed}  {gold['before']:.3f} -> {gold['after']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
