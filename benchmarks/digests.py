"""Digests of short runs of every kind, to compare before and after a change that should change no result.

    python -m benchmarks.digests before.json
    python -m benchmarks.digests after.json --compare before.json

Each run goes through the command line in its own folder. A digest covers the tensors of every weight file, the
pixels of every image and the scores of the run; times, paths and versions are left out. Exits with 1 where two
digests differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "train.steps=2", "rollout.prompts=2", "rollout.group=4", "evaluate.prompts=4", "samples.count=2",
    "checkpoint.every=1", "train.threads=1",
)  # fmt: skip
LEFT_OUT = (
    "seconds",
    "time",
    "images_per_second",
    "spent",
    "folder",
    "git_commit",
    "packages",
    "busy",
    "per_second",
    "overhead",
    "curve",
)
METHODS = (
    "best_of_n", "zero_order", "trust_region", "paths", "fk", "beam", "svdd", "rbf", "evo", "das", "psi", "reno",
    "hyper_noise", "guidance", "prune",
)  # fmt: skip


def cases(folder: Path) -> Iterator[tuple[str, list[list[str]], Path]]:
    """(name, commands, folder with the results) of every run."""
    for world, recipe in [
        *(("shapes", recipe) for recipe in ("nft", "grpo", "flow_rwr", "flow_dpo", "re_dmd")),
        ("shapes-edit", "nft"), ("shapes-fill", "nft"), ("shapes-video", "nft"),
    ]:  # fmt: skip
        out = folder / f"{world}-{recipe}"
        yield out.name, [["train", f"configs/{world}/{recipe}.yaml", *SMALL, "--out", str(out)]], out
    out = folder / "full"
    yield "full", [["train", "configs/shapes/nft.yaml", *SMALL, "policy={kind: full}", "--out", str(out)]], out
    out = folder / "resumed"
    start = ["train", "configs/shapes/nft.yaml", *SMALL, "--out", str(out)]
    yield "resumed", [[*start, "train.steps=1"], [*start, "--resume"]], out
    out = folder / "two-processes"
    yield "two-processes", [["@2", *start[:-1], str(out)]], out
    for kind in METHODS:
        out = folder / f"search-{kind}"
        given = ["prompts.limit=2", "budget={network_calls: 60}", f"search={{kind: {kind}}}", "--out", str(out)]
        yield out.name, [["search", "configs/shapes/search.yaml", *given]], out
    out = folder / "latent"
    fit = ["fit.steps=10", "prompts.limit=16", "prompts.measured=4"]
    yield "latent", [["reward", "train", "configs/rewards/latent_shapes.yaml", *fit, "--out", str(out)]], out


def run(command: list[str]) -> None:
    """One command of the suite; ``@2`` before it runs it on two processes."""
    launch = [sys.executable, "-m"]
    if command[0] == "@2":
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        command = command[1:]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, "align", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def digest(folder: Path) -> dict[str, str]:
    """Digests of the weights, pixels and scores below a folder."""
    weights, pixels, scores = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            for name, value in sorted(load_file(file).items()):
                weights.update(name.encode() + str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
        elif file.suffix in (".png", ".webp") and file.name != "grid.png":
            with Image.open(file) as image:
                for frame in ImageSequence.Iterator(image):
                    pixels.update(np.asarray(frame.convert("RGB")).tobytes())
        elif file.name in ("metrics.jsonl", "prompts.json", "results.json", "results.jsonl"):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            for line in lines:
                for number in numbers(json.loads(line)):
                    scores.update(repr(number).encode())
    return {"weights": weights.hexdigest(), "pixels": pixels.hexdigest(), "scores": scores.hexdigest()}


def numbers(data: Any) -> Iterator[float]:
    """The numbers of a JSON value in the order of its keys, without those of time."""
    if isinstance(data, dict):
        for key in sorted(data):
            if not any(word in key for word in LEFT_OUT):
                yield from numbers(data[key])
    elif isinstance(data, list):
        for value in data:
            yield from numbers(value)
    elif isinstance(data, int | float):
        yield float(data)


def main() -> None:
    """Run every case, write the digests, compare them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", type=Path, help="digests to compare with")
    parser.add_argument("--only", nargs="*", help="names of the runs; all by default")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, commands, out in cases(Path(folder)):
            if options.only and name not in options.only:
                continue
            for command in commands:
                run(command)
            found[name] = digest(out)
            print(name, {kind: value[:8] for kind, value in found[name].items()}, flush=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.compare:
        before = json.loads(options.compare.read_text())
        pairs = [(name, kind) for name in found for kind in found[name]]
        different = [f"{name} {kind}" for name, kind in pairs if before[name][kind] != found[name][kind]]
        print("\n".join(f"differs: {one}" for one in different) or f"all {len(found)} runs have the same results")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
