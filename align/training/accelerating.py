"""The accelerator of a training run, on the device named in the config."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from align.checking import context_check
from align.checking.check import master_weights, trackers
from align.config import sharding
from align.runs.devices import require
from alignflow.errors import ConfigError, Problem

if TYPE_CHECKING:
    from align.config.settings import Config

DEVICE = "ACCELERATE_TORCH_DEVICE"
"""The variable by which accelerate is told of one card among several."""
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def accelerator_of(config: Config) -> Accelerator:
    """An accelerator that does what ``generator.device``, ``train.precision`` and ``trackers`` ask for.

    Raises:
        ConfigError: this machine, or the way the processes were launched, does not allow it.
    """
    wanted = config.generator.device
    if wanted != "auto":
        require(wanted)
    checks = (trackers, master_weights, sharding.problems, context_check.problems)
    if wrong := [problem for check in checks for problem in check(config)]:
        raise ConfigError(wrong, config.name)
    AcceleratorState._reset_state()  # a second run in one process may use another precision
    if PartialState._shared_state and PartialState().num_processes == 1:
        PartialState._reset_state()  # or another device
    sharded = sharding.asked()
    with _without_fsdp():
        with _on_card(wanted):
            state = PartialState(cpu=wanted == "cpu")
        _check(config, state, sharded)
        return Accelerator(
            mixed_precision=config.train.precision,
            cpu=wanted == "cpu",
            log_with=list(config.trackers) or None,
            project_dir=config.run_dir,
        )


@contextmanager
def _without_fsdp() -> Iterator[None]:
    """accelerate shards one whole model with its optimizer; :func:`align.training.sharding.shard` does it here."""
    os.environ[sharding.LOADING] = "false"
    before = os.environ.pop(sharding.USE, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[sharding.USE] = before


@contextmanager
def _on_card(name: str) -> Iterator[None]:
    """While the state is made, accelerate takes this card, where one is named by its number."""
    if ":" not in name:
        yield
        return
    before = os.environ.get(DEVICE)
    os.environ[DEVICE] = name
    torch.cuda.set_device(name)
    try:
        yield
    finally:
        os.environ.pop(DEVICE)
        if before is not None:
            os.environ[DEVICE] = before


def _check(config: Config, state: PartialState, sharded: bool) -> None:
    wanted, found = config.generator.device, state.device.type
    problems = []
    if state.distributed_type not in REPLICATED:
        problems.append(
            Problem("", f"launched with {state.distributed_type.value}; a run needs processes that hold whole networks")
        )
    if ":" in wanted and state.num_processes > 1:
        problems.append(Problem("generator.device", f"{wanted} for {state.num_processes} processes: use cuda"))
    elif wanted != "auto" and wanted.partition(":")[0] != found:
        problems.append(
            Problem("generator.device", f"{wanted} is set, but accelerate chose {found}: see its configuration")
        )
    if config.train.precision == "fp16" and found == "cpu":
        problems.append(Problem("train.precision", "fp16 needs a card; a CPU trains with 'no' or 'bf16'"))
    problems += _divisions(config, state.num_processes, sharded)
    if problems:
        raise ConfigError(problems, config.name)


def _divisions(config: Config, world: int, sharded: bool) -> list[Problem]:
    """Processes of this launch that cannot be divided as the section ``parallel`` says."""
    ways, copies = config.parallel.context, config.parallel.replicas
    problems = []
    if world % ways:
        said = f"{ways} processes compute a sample together, and this launch has {world}"
        problems.append(Problem("parallel.context", f"{said}: start a multiple of {ways}"))
    if copies > 1 and not sharded:
        said = f"{copies} copies of a sharded network, and this launch shards none"
        problems.append(Problem("parallel.replicas", f"{said}: launch with FSDP2 (docs/memory.md), or use 1"))
    elif world % copies:
        said = f"{copies} copies cannot be spread evenly over {world} processes"
        problems.append(Problem("parallel.replicas", f"{said}: use a divisor of {world}"))
    return problems
