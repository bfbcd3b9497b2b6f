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
    from align.training.held_out import HeldOut
    from align.training.state import RunState
    from align.training.stepping import Stepper


class Keeping:
    """Checkpoints of one run.

    Attributes:
        identity: that of the run's checkpoints; set by :meth:`resume`.
    """

    def __init__(self, state: RunState, held_out: HeldOut) -> None:
        self.state, self.held_out = state, held_out
        self.identity: dict[str, Any] = {}

    def _identity(self) -> dict[str, Any]:
        """Whose a checkpoint of this run is: lasting settings, digests of prompts and model, the run's id."""
        from align.config.load import resolved_settings

        return {
            "run": self.state.run.id,
            "settings": lasting(resolved_settings(self.state.config)),
            "data": data_digest(self.state.source.prompts),
            "model": model_digest(self.state.config.generator.path),
            "moved": sorted({BY_CONTENT[key] for key in self.state.run.changed if key in BY_CONTENT}),
        }

    def save(self, step: int) -> None:
        """Write a checkpoint, and drop those that are neither among the newest nor the best."""
        self.write(step, self.counters() | {"all_network_calls": self.state.calls()})
        self.state.accelerator.wait_for_everyone()

    def counters(self) -> dict[str, Any]:
        """Counters of a checkpoint; network calls as if every process had made as many as this one."""
        return {
            "seconds": self.state.seconds,
            "learners": {name: learner.stepper.counters for name, learner in self.state.learners.items()},
            **({"banned": [*banned]} if (banned := getattr(self.state.source, "banned", [])) else {}),
            "all_network_calls": self.state.calls_before + self.state.generator.network_calls * self.state.share.world,
            "drawn": self.state.drawing.in_hand is not None,
            "best": self.held_out.best.state(),
            "ending": self.held_out.ending.state(),
            "threads": torch.get_num_threads(),
        }

    def write(self, step: int, counted: dict[str, Any], *, any_data: bool = False) -> None:
        """Write a checkpoint in the process that writes. No process waits for another, unless weights are sharded: then
        every process must call it.

        Args:
            any_data: the run may continue from it with other prompts: those it has are to be mended.
        """
        if not self.state.run.writes:
            if self.state.processes.sharded:
                checkpoint.gathered(*self._learned(), keep=False)
                self.state.export(None)
            return
        self.state.run.sync()
        whose = {**self.identity, "moved": []} | ({"data": ""} if any_data else {})
        checkpoint.save(
            self.state.run.checkpoints, step, *self._learned(), {"step": step, **counted},
            self.state.export, self.state.refreshed, whose,
        )  # fmt: skip
        checkpoint.rotate(self.state.run.checkpoints, self.state.config.checkpoint.keep, self.held_out.best.step)

    def _learned(self) -> tuple[dict[str, Roles], dict[str, Stepper]]:
        learners = self.state.learners
        return {name: one.roles for name, one in learners.items()}, {
            name: one.stepper for name, one in learners.items()
        }

    def resume(self) -> tuple[int, list[str]]:
        """Load the newest checkpoint; the steps done, and lines for the user.

        Raises:
            CheckpointError: it is damaged, or another run's.
        """
        run, notes = self.state.run, []
        self.identity = self._identity()
        path = self.state.processes.settled(
            lambda: checkpoint.latest(run.checkpoints)
        )  # one answer: folders may be cached
        if path is None:
            if run.asked:
                began = run.before is not None
                found = f"{run.path} has no checkpoint yet" if began else f"nothing to resume in {run.path}"
                notes.append(f"{found}: the run starts from the beginning")
            run.forget_after(-1)
            return 0, notes
        counters = checkpoint.load(path, *self._learned(), self.state.refreshed, self.identity)
        if isinstance(self.state.source, OnlineSource):
            self.state.source.ban_places(counters.get("banned", []))
        self.state.threads_before = counters.get("threads")
        self.state.seconds, self.state.drawing.counted = counters["seconds"], counters.get("drawn", False)
        each = counters.get("network_calls", 0)  # older checkpoints counted those of one process
        self.state.calls_before = counters.get("all_network_calls", each * self.state.share.world)
        self.held_out.best.load(counters.get("best"))
        self.held_out.ending.load(counters.get("ending"))
        if unreadable := run.forget_after(counters["step"]):
            notes.append(
                f"{run.metrics}: {unreadable} lines could not be read and were dropped; the rows around them are kept"
            )
        if run.writes:
            checkpoint.rotate(run.checkpoints, self.state.config.checkpoint.keep, self.held_out.best.step)
        if run.changed:
            said = (f"{key} {then!r} -> {now!r}" for key, (then, now) in run.changed.items())
            notes.append("changed since the last part: " + ", ".join(said))
        if course := self._course():
            notes.append(course)
        return int(counters["step"]), notes

    def _course(self) -> str | None:
        from align.config.sections import Train

        try:
            before = Train.model_validate((self.state.run.before or {}).get("train", {}))
        except ValidationError:
            return None
        updates = self.state.learners["policy"].stepper.updates
        return new_course(before, self.state.config.train, updates) if self.state.run.changed else None
