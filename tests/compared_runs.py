"""Folders of runs, searches and benchmarks with scores that a test chose, for comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from report_run import draw_scene
from ruamel.yaml import YAML

from align.data.grids import save_samples
from align.runs.owned import TRAINING, mark
from align.runs.per_prompt import PromptScores, write_scores

GOLD = {"kind": "shapes"}
CONFIG: dict[str, Any] = {
    "seed": 0,
    "generator": {"kind": "sd3", "path": "shapes"},
    "prompts": {"train": "shapes:train", "heldout": "shapes:heldout"},
    "rollout": {"prompts": 4},
    "reward": GOLD,
    "recipe": {"kind": "nft"},
    "train": {"steps": 4, "lr": 1e-3},
    "evaluate": {"gold": "gold", "seed": 0, "sampler": {"kind": "ode", "steps": 10}, "rewards": {"gold": GOLD}},
}


def changed(tree: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A copy of a config with settings by dotted key, dots written as two underscores."""
    found = deepcopy(tree)
    for dotted, value in settings.items():
        *keys, last = dotted.split("__")
        place = found
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = value
    return found


def training(
    folder: Path, after: Sequence[float | None], before: Sequence[float] | None = None, *, prompts: Sequence[str] = (),
    seeds: Sequence[int] = (), status: str | None = "finished", evaluated: bool = True, **settings: Any,
) -> Path:  # fmt: skip
    """A training run of four steps whose held-out gold is ``before`` at step 0 and ``after`` at step 4."""
    config = changed(CONFIG, name=folder.name, **settings)
    folder.mkdir(parents=True)
    mark(folder, TRAINING)
    with (folder / "config.yaml").open("w") as file:
        YAML(typ="safe").dump(config, file)
    texts = list(prompts) or [f"prompt {row}" for row in range(len(after))]
    noise = list(seeds) or list(range(len(texts)))
    rows: list[dict[str, Any]] = [
        {"event": "train", "step": step, "seconds": 2.0 * step, "reward": 0.1 * step, "loss": 1.0, "samples": 32,
         "network_calls": 100, "kl_velocity": 0.01 * step, "zero_variance_groups": 1}
        for step in range(1, 5)
    ]  # fmt: skip
    start = list(before) if before is not None else [0.0] * len(texts)
    for step, values in ((0, start), (4, after)) if evaluated else ():
        known = [value for value in values if value is not None]
        scores, missing = {"gold": sum(known) / len(known)}, {"gold": len(values) - len(known)}
        rows.append({"event": "eval", "step": step, "role": "ema", "prompts": len(texts), "scores": scores,
                     "stderr": {"gold": 0.01}, "missing": missing})  # fmt: skip
        found = [PromptScores(*one, {"gold": value}) for *one, value in zip(texts, noise, values, strict=True)]
        write_scores(folder, step, "ema", found)
        images = [draw_scene(row, 0.5 + step / 8, 32) for row in range(min(2, len(texts)))]
        shown = {"gold": [value if value is not None else float("nan") for value in values[:2]]}
        save_samples(folder / "samples" / f"step-{step:06d}", images, texts[:2], noise[:2], shown)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is not None:
        summary = {"name": folder.name, "status": status, "steps": 4, "seconds": 8.0, "network_calls": 480, "seed": 0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def search(folder: Path, plain: Sequence[float], best: Sequence[float], **settings: Any) -> Path:
    """A finished search of as many prompts, whose gold equals its reward."""
    base = {key: CONFIG[key] for key in ("seed", "generator", "reward")}
    own = {"prompts": {"source": "shapes:heldout"}, "search": {"kind": "best_of_n"}, "gold": {"gold": GOLD}}
    folder.mkdir(parents=True)
    with (folder / "config.yaml").open("w") as file:
        YAML(typ="safe").dump(changed({**base, **own}, name=folder.name, **settings), file)
    rows = []
    for number, (before, after) in enumerate(zip(plain, best, strict=True)):
        place = folder / "candidates" / f"{number:04d}"
        place.mkdir(parents=True)
        for name, quality in (("plain.png", 0.3), ("0003.png", 0.9)):
            draw_scene(number, quality, 32).save(place / name)
        curve = [{"network_calls": 10.0 * k, "reward": after * k / 2} for k in (1, 2)]
        rows.append({
            "prompt": f"prompt {number}", "number": number, "plain": before, "reward": after, "plain_file": "plain.png",
            "gold": {"gold": {"plain": before, "best": after}}, "kept": [{"file": "0003.png", "reward": after}],
            "curve": curve,
        })  # fmt: skip
    results = {"status": "finished", "name": folder.name, "gold": {"gold": {}}, "spent": {"network_calls": 20.0}}
    (folder / "results.json").write_text(json.dumps({**results, "found": rows}))
    return folder


def benchmark(folder: Path, scores: Sequence[Sequence[float]], **settings: Any) -> Path:
    """A finished benchmark: of every prompt, the scores of its samples."""
    folder.mkdir(parents=True)
    base = {"set": "table", "generator": CONFIG["generator"], "evaluate": CONFIG["evaluate"]}
    (folder / "benchmark.json").write_text(json.dumps(changed(base, **settings)))
    (folder / "results.json").write_text("{}")
    lines = []
    for number, several in enumerate(scores):
        for copy, value in enumerate(several):
            file = f"{number:05d}-{copy}.png"
            draw_scene(number, value, 32).save(folder / file)
            lines.append({"file": file, "prompt": f"prompt {number}", "number": number, "scores": {"gold": value}})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
