"""The shipped configs of four models on one card, with random weights of the published shapes: speed and memory.

    python -m benchmarks.card --out card            # at most 12 minutes; the same command continues a stopped run
    python -m benchmarks.card --out card --tiny     # a test's sizes on the CPU

Each part runs in its own process and leaves a JSON file. A part whose file is there is not run again, and parts
for which no time is left are dropped with a message. ``nft`` and ``grpo`` train: a first step, whose memory is
compared with the estimate of ``alignflow check``, then a step that is timed, then its network, decode and reward calls
alone (:mod:`benchmarks.step`). ``pipeline`` generates the samples of ``nft`` by diffusers' own pipeline. A prompt has
fewer samples than in the config where the step would take longer than about six seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from align.checking.estimate import CONTEXT, GB, estimate
from align.config.load import load_config
from align.config.settings import Config
from align.data.files import write_json
from align.runs.run_folder import RunFolder
from align.training.accelerating import accelerator_of
from align.training.trainer import Trainer
from benchmarks import roofline
from benchmarks.helpers import random_weights
from benchmarks.helpers.card_page import table
from benchmarks.step import Recorder, peak_memory

MODELS = ("sd35-medium", "flux-dev", "wan21-1.3b", "qwen-image")
PARTS = tuple((model, part) for part in ("nft", "pipeline", "grpo") for model in MODELS)
TOTAL, LONGEST, SHORTEST = 720.0, 180.0, 30.0
"""Seconds of all parts, the most of one, and the fewest with which one is begun."""
STEP, USE = 6.0, 0.35
"""Seconds that a step should take, and the share of the card's peak at which its samples are chosen."""
TINY = {"nft": {"recipe.timesteps": 2}, "grpo": {}}


def config_of(model: str, recipe: str, tiny: bool, words: Sequence[str] = (), *, reward: Any = None) -> Config:
    """The shipped config for one prompt and the random reward; prompts are encoded beforehand.

    Args:
        words: further ``KEY=VALUE``.
        reward: settings in place of the random reward.
    """
    chosen = {
        "reward": reward or random_weights.reward(tiny),
        "evaluate.rewards.pickscore": reward or random_weights.reward(tiny),
        "evaluate.rewards.hpsv2": None,
        "evaluate.gold": None,
        "memory.cache_prompts": "memory",
        "rollout.prompts": 1,
    }
    file = f"configs/{model}/{recipe}.yaml"
    if tiny:
        path = random_weights.smaller(load_config(file).generator.path)
        size = [32, 48] if model.startswith("wan") else [64, 64]
        steps = {"rollout.sampler.steps": 3, "rollout.group": 2} if recipe == "nft" else {"rollout.group": 2}
        chosen |= {"generator.path": path, "generator.size": size, "generator.text_length": 8, **steps, **TINY[recipe]}
        chosen |= {"generator.device": "cpu"} | ({"generator.frames": 5} if model.startswith("wan") else {})
    return load_config(file, [*(f"{key}={json.dumps(value)}" for key, value in chosen.items()), *words])


def samples_of(config: Config, peak: float | None) -> int:
    """Samples of the prompt: as many as a step of :data:`STEP` seconds has, between a chunk of at most 8 and all.

    Args:
        peak: operations of the card a second; None = all samples.
    """
    group = config.rollout.group
    if peak is None:
        return group
    found = roofline.work(config)
    fits = int(STEP * peak * USE / (found.sampling + found.updating))
    return max(2, min(group, fits))


def card() -> tuple[str, float | None]:
    """(name, dense bfloat16 operations a second); unknown operations are None."""
    if not torch.cuda.is_available():
        return "CPU", None
    name = torch.cuda.get_device_name()
    known = [peak for key, (peak, _) in roofline.CARDS.items() if key in name.lower()]
    return name, known[0] if known else None


def used() -> float:
    """GB in use on the card, with CUDA itself; torch gives nothing back, so this is the most so far.

    On the CPU the peak of the process.
    """
    if not torch.cuda.is_available():
        return peak_memory() / 2**10
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GB


def step(model: str, recipe: str, tiny: bool, words: Sequence[str] = ()) -> dict[str, Any]:
    """Train two steps of a config and replay the second; see the module."""
    name, peak = card()
    whole = config_of(model, recipe, tiny, words)
    samples = samples_of(whole, peak)
    fewer = [*words, f"rollout.group={samples}"]
    config = config_of(model, recipe, tiny, fewer)
    scored = {"kind": "clip", "model": "shapes" if tiny else "yuvalkirstain/PickScore_v1", "dtype": "bfloat16"}
    expected = estimate(config_of(model, recipe, tiny, fewer, reward=scored)).bytes
    with tempfile.TemporaryDirectory() as folder, mock.patch("align.policy.build.load", _load):
        accelerator = accelerator_of(config)
        trainer = Trainer(config, RunFolder(Path(folder)), accelerator)
        first = trainer.step(0)
        memory = used()
        trainer.phases.take()
        recorder = Recorder(trainer)
        row = recorder.record(1)
        bare = recorder.replay()
    return {
        "card": name,
        "samples": samples,
        "group": whole.rollout.group,
        "seconds": row["time"],
        "bare": bare,
        "images_per_second": row["images_per_second"],
        "mfu": _mfu(config, row["time"], samples, peak),
        "memory_gb": memory,
        "check_gb": expected / GB - (0 if torch.cuda.is_available() else CONTEXT / GB),
        "gap": {key.removeprefix("logp_gap/"): value for key, value in first.items() if key.startswith("logp_gap/")},
        "torch": torch.__version__,
    }


def _load(kind: str, path: str, *, dtype: str, options: Any, device: Any, memory: Any) -> Any:
    return random_weights.generator(kind, path, dtype=dtype, options=options, device=device)


def _mfu(config: Config, seconds: dict[str, float], samples: int, peak: float | None) -> dict[str, float]:
    """Phase -> share of the card's peak; recomputed activations count as operations."""
    if peak is None:
        return {}
    found = roofline.work(config)
    work = {"rollout": found.sampling, "update": found.updating}
    return {phase: samples * value / (seconds[phase] * peak) for phase, value in work.items()}


def pipeline(model: str, tiny: bool, words: Sequence[str] = ()) -> dict[str, Any]:
    """Seconds of diffusers' own pipeline for the samples of ``nft``, decoded."""
    name, peak = card()
    config = config_of(model, "nft", tiny, words)
    kind, options, device = config.generator.kind, config.generator, "cuda" if torch.cuda.is_available() else "cpu"
    sampler: Any = config.rollout.sampler  # type: ignore[union-attr]
    found = random_weights.pipeline(kind, options.path, options.dtype, "cpu" if tiny else device)
    samples = samples_of(config, peak)
    prompts = [f"prompt {number}" for number in range(samples)]
    given = random_weights.call(kind, found, prompts, options, sampler.guidance)
    seconds = 0.0
    for steps in (2, sampler.steps):  # the first call warms up
        _wait()
        started = time.perf_counter()
        found(**given, num_inference_steps=steps, output_type="pt")
        _wait()
        seconds = time.perf_counter() - started
    rate = samples / seconds
    return {"card": name, "samples": samples, "seconds": {"all": seconds}, "images_per_second": rate}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- all parts --------------------------------------------------------------------------------------------------------


def run_all(
    out: Path, parts: Sequence[tuple[str, str]], run: Callable[[str, str, float], str], total: float = TOTAL
) -> list[str]:
    """Run the parts that have no file in ``out`` while time is left; returns a sentence for each that is missing.

    Args:
        run: (model, part, seconds) -> why there is no file; empty if it was written.
        total: seconds of all.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends, missing = time.monotonic() + total, []
    for model, part in parts:
        if (out / f"{model}.{part}.json").is_file():
            continue
        left = ends - time.monotonic()
        if left < min(SHORTEST, total):
            missing.append(f"{model} {part}: dropped, {max(left, 0):.0f} s are left; run the command again")
            continue
        print(f"{model} {part}: at most {min(left, LONGEST):.0f} s", flush=True)
        if why := run(model, part, min(left, LONGEST)):
            missing.append(f"{model} {part}: {why}")
    return missing


def _in_a_process(out: Path, tiny: bool, words: Sequence[str]) -> Callable[[str, str, float], str]:
    def run(model: str, part: str, seconds: float) -> str:
        flags = ["--tiny"] if tiny else []
        command = [sys.executable, "-m", "benchmarks.card", "--out", str(out), "--part", model, part, *flags, *words]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        lines = ended.stderr.strip().splitlines()
        return (lines[-1] if lines else f"exit code {ended.returncode}") if ended.returncode else ""

    return run


def main() -> None:
    """Run one part, or all parts that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="overrides of every config")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--tiny", action="store_true", help="a test's sizes on the CPU")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of all parts together")
    parser.add_argument("--part", nargs=2, metavar=("MODEL", "PART"), help="run this one here")
    options = parser.parse_args()
    if options.part:
        model, part = options.part
        one = pipeline(model, options.tiny, options.words) if part == "pipeline" else None
        found = one or step(model, part, options.tiny, options.words)
        write_json(options.out / f"{model}.{part}.json", found)
        return
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no card here; --tiny measures a test's sizes on the CPU")
    parts = [one for one in PARTS if one[0] in options.models]
    missing = run_all(options.out, parts, _in_a_process(options.out, options.tiny, options.words), options.seconds)
    print(table(options.out, options.models), *missing, sep="\n")


if __name__ == "__main__":
    main()
