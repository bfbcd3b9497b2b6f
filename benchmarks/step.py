"""How much of a training step is ours: a step against the bare network, decode and reward calls it consists of.

    python -m benchmarks.step configs/shapes/*.yaml --steps 5 --json out.json

One step is recorded: every network call with its arguments and whether it carried a gradient, every decode, every
reward call. Then whole steps and replays of the recorded calls (forward, backward, nothing else) take turns, so that a
busy neighbour slows both. Overhead is the median of step / replay, less one.

    python -m benchmarks.step --operations configs/quickstart.yaml configs/shapes/nft.yaml

counts the floating-point operations of a step, of a held-out evaluation and of the whole run, as torch counts those of
matrix products, convolutions and attention. One step and one evaluation are run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from align.config.command_line import files_and_overrides
from align.config.load import load_config
from align.config.settings import Config
from align.runs.run_folder import RunFolder
from align.training.accelerating import accelerator_of
from align.training.lr import due
from align.training.trainer import Trainer
from generators.conditioning import Conditioning

Call = Callable[[], None]


class Recorder:
    """Records the calls of one training step so that they can be made again without the step around them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.calls: dict[str, list[Call]] = {"network": [], "decode": [], "reward": []}

    def record(self, step: int = 0) -> dict[str, Any]:
        """Run one step with every network, decode and reward call noted; returns its row of ``metrics.jsonl``."""
        generator, drawing = self.trainer.generator, self.trainer.drawing
        reward = drawing.reward
        predict, decode = generator.predict, generator.decode
        generator.predict = self._noting("network", predict, self._network)  # type: ignore[method-assign]
        generator.decode = self._noting("decode", decode, _plain)  # type: ignore[method-assign]
        if reward is not None:
            drawing.reward = self._noting("reward", reward, _plain)  # type: ignore[assignment]
        row = self.trainer.step(step)
        drawing.reward = reward
        generator.predict, generator.decode = predict, decode  # type: ignore[method-assign]
        return row

    def _noting(self, kind: str, function: Any, remake: Callable[..., Call]) -> Any:
        def noted(*arguments: Any) -> Any:
            kept = [_detached(a) for a in arguments]
            self.calls[kind].append(remake(function, kept, torch.is_grad_enabled()))
            return function(*arguments)

        noted.name = getattr(function, "name", kind)  # type: ignore[attr-defined]
        noted.scope = getattr(function, "scope", "sample")  # type: ignore[attr-defined]
        return noted

    def _network(self, predict: Any, arguments: list[Any], with_grad: bool) -> Call:
        parameters = self.trainer.learners["policy"].stepper.parameters

        def call() -> None:
            with torch.set_grad_enabled(with_grad):
                v = predict(*arguments)
                if with_grad:
                    torch.autograd.grad(v.float().square().mean(), parameters, allow_unused=True)

        return call

    def replay(self) -> dict[str, float]:
        """Seconds of the recorded calls by kind."""
        seconds = {}
        for kind, calls in self.calls.items():
            started = time.perf_counter()
            for call in calls:
                call()
            _wait()
            seconds[kind] = time.perf_counter() - started
        return seconds


def _detached(argument: Any) -> Any:
    """Without the graph of text encoders, which a replay would pass through again."""
    if isinstance(argument, Conditioning):
        tensors = {name: value.detach() for name, value in argument.tensors.items()}
        return replace(argument, tensors=tensors, negative=_detached(argument.negative))
    return argument.detach() if isinstance(argument, torch.Tensor) else argument


def _plain(function: Any, arguments: list[Any], with_grad: bool) -> Call:
    def call() -> None:
        with torch.no_grad():
            function(*arguments)

    return call


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Benchmark one config: seconds, overhead, images per second and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = accelerator_of(config)
        trainer = Trainer(config, RunFolder(Path(folder)), accelerator)
        recorder = Recorder(trainer)
        recorder.record()
        whole, bare = [], []
        for step in range(1, steps + 1):
            started = time.perf_counter()
            row = trainer.step(step)
            _wait()
            whole.append(time.perf_counter() - started)
            bare.append(recorder.replay())
    ratios = [seconds / sum(parts.values()) for seconds, parts in zip(whole, bare, strict=True)]
    parts = {kind: statistics.median(part[kind] for part in bare) for kind in bare[0]}
    samples = config.rollout.prompts * getattr(config.rollout, "group", 2)
    return {
        "recipe": config.recipe.kind,
        "step_seconds": statistics.median(whole),
        **{f"{kind}_seconds": seconds for kind, seconds in parts.items()},
        "overhead": statistics.median(ratios) - 1,
        "overhead_range": [min(ratios) - 1, max(ratios) - 1],
        "images_per_second": samples / statistics.median(whole),
        "network_calls": row["network_calls"],
        "peak_memory_mib": peak_memory(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def operations(config: Config) -> dict[str, float]:
    """Floating-point operations in units of 1e12: of a step, of an evaluation, and of the run with all of both."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, RunFolder(Path(folder)), accelerator_of(config))
        held_out = trainer.held_out
        held_out.screen(print)
        counted = []
        for work in (lambda: held_out._evaluate(held_out.prompts), lambda: trainer.step(0)):
            with FlopCounterMode(display=False) as counter:
                work()
            counted.append(counter.get_total_flops() / 1e12)
    evaluation, step = counted
    looks = sum(due(n, config.evaluate.every, config.train.steps) for n in range(config.train.steps + 1))
    looks -= not config.evaluate.at_start
    return {"step": step, "evaluation": evaluation, "run": config.train.steps * step + looks * evaluation}


def peak_memory() -> float:
    """MiB: the accelerator's peak where there is one, else the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Benchmark every config named on the command line; print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help="configs, then overrides of all of them")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per config")
    parser.add_argument("--operations", action="store_true", help="count floating-point operations instead")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    configs, overrides = files_and_overrides(options.words[0], options.words[1:])
    results: dict[str, Any] = {}
    if options.operations:
        print("config".ljust(28), *(f"TFLOP of a {name}".rjust(22) for name in ("step", "evaluation", "run")))
        for path in configs:
            results[str(path)] = found = operations(load_config(path, overrides))
            print(str(path).ljust(28), *(f"{value:22.3f}" for value in found.values()), flush=True)
        _write(options.json, results)
        return
    columns = ("step_seconds", "network_seconds", "decode_seconds", "reward_seconds", "overhead", "images_per_second")
    print("config".ljust(28), *(column.rjust(17) for column in columns), "peak MiB".rjust(9))
    for path in configs:
        result = measure(load_config(path, overrides), options.steps)
        results[str(path)] = result
        cells = [f"{result[column]:17.3f}" for column in columns]
        print(str(path).ljust(28), *cells, f"{result['peak_memory_mib']:9.0f}", flush=True)
    _write(options.json, results)


def _write(file: Path | None, results: dict[str, Any]) -> None:
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
