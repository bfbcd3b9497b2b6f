"""Saving and resuming of a training run: its checkpoints, the best of them, and their identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from align.rollout.sources import OnlineSource
from align.runs import checkpoint
from align.runs.identity import BY_CONTENT, data_digest, lasting, model_digest
from align.training.lr import new_course

if TYPE_CHECKING:
    from align.policy.roles import Roles
    from align.training.stepping import Stepper
    from align.training.trainer import Trainer


def identity_of(trainer: Trainer) -> dict[str, Any]:
    """Whose a checkpoint of this run is: lasting settings, digests of prompts and model, the run's id."""
    from align.config.load import resolved_settings

    return {
        "run": trainer.run.id,
        "settings": lasting(resolved_settings(trainer.config)),
        "data": data_digest(trainer.source.prompts),
        "model": model_digest(trainer.config.generator.path),
        "moved": sorted({BY_CONTENT[key] for key in trainer.run.changed if key in BY_CONTENT}),
    }


def save(trainer: Trainer, step: int) -> None:
    """Write a checkpoint, and drop those that are neither among the newest nor the best."""
    write(trainer, step, counters(trainer) | {"all_network_calls": trainer.calls()})
    trainer.accelerator.wait_for_everyone()


def counters(trainer: Trainer) -> dict[str, Any]:
    """Counters of a checkpoint; network calls as if every process had made as many as this one."""
    return {
        "seconds": trainer.seconds,
        "learners": {name: learner.stepper.counters for name, learner in trainer.learners.items()},
        **({"banned": [*banned]} if (banned := getattr(trainer.source, "banned", [])) else {}),
        "all_network_calls": trainer.calls_before + trainer.generator.network_calls * trainer.share.world,
        "drawn": trainer.drawing.in_hand is not None,
        "best": trainer.held_out.best.state(),
        "ending": trainer.held_out.ending.state(),
        "threads": torch.get_num_threads(),
    }


def write(trainer: Trainer, step: int, counted: dict[str, Any], *, any_data: bool = False) -> None:
    """Write a checkpoint in the process that writes; no process waits for another, unless weights are sharded: every
    process must call it then.

    Args:
        any_data: the run may continue from it with other prompts: those it has are to be mended.
    """
    if not trainer.run.writes:
        if trainer.processes.sharded:
            checkpoint.gathered(*_state(trainer), keep=False)
            trainer.export(None)
        return
    trainer.run.sync()
    whose = {**trainer.identity, "moved": []} | ({"data": ""} if any_data else {})
    checkpoint.save(
        trainer.run.checkpoints, step, *_state(trainer), {"step": step, **counted},
        trainer.export, trainer.refreshed, whose,
    )  # fmt: skip
    checkpoint.rotate(trainer.run.checkpoints, trainer.config.checkpoint.keep, trainer.held_out.best.step)


def _state(trainer: Trainer) -> tuple[dict[str, Roles], dict[str, Stepper]]:
    learners = trainer.learners
    return {name: one.roles for name, one in learners.items()}, {name: one.stepper for name, one in learners.items()}


def resume(trainer: Trainer) -> tuple[int, list[str]]:
    """Load the newest checkpoint; the steps done, and lines for the user.

    Raises:
        CheckpointError: it is damaged, or another run's.
    """
    run, notes = trainer.run, []
    path = trainer.processes.settled(lambda: checkpoint.latest(run.checkpoints))  # one answer: folders may be cached
    if path is None:
        if run.asked:
            found = (
                f"{run.path} has no checkpoint yet" if run.before is not None else f"nothing to resume in {run.path}"
            )
            notes.append(f"{found}: the run starts from the beginning")
        run.forget_after(-1)
        return 0, notes
    counters = checkpoint.load(path, *_state(trainer), trainer.refreshed, trainer.identity)
    if isinstance(trainer.source, OnlineSource):
        trainer.source.ban_places(counters.get("banned", []))
    trainer.threads_before = counters.get("threads")
    trainer.seconds, trainer.drawing.counted = counters["seconds"], counters.get("drawn", False)
    each = counters.get("network_calls", 0)  # older checkpoints counted those of one process
    trainer.calls_before = counters.get("all_network_calls", each * trainer.share.world)
    trainer.held_out.best.load(counters.get("best"))
    trainer.held_out.ending.load(counters.get("ending"))
    if unreadable := run.forget_after(counters["step"]):
        notes.append(
            f"{run.metrics}: {unreadable} lines could not be read and were dropped; the rows around them are kept"
        )
    if run.writes:
        checkpoint.rotate(run.checkpoints, trainer.config.checkpoint.keep, trainer.held_out.best.step)
    if run.changed:
        said = (f"{key} {then!r} -> {now!r}" for key, (then, now) in run.changed.items())
        notes.append("changed since the last part: " + ", ".join(said))
    if course := _course(trainer):
        notes.append(course)
    return int(counters["step"]), notes


def _course(trainer: Trainer) -> str | None:
    from align.config.settings import Train

    try:
        before = Train.model_validate((trainer.run.before or {}).get("train", {}))
    except ValidationError:
        return None
    updates = trainer.learners["policy"].stepper.updates
    return new_course(before, trainer.config.train, updates) if trainer.run.changed else None
