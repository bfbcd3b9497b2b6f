"""One optimizer step: gradients summed over processes, clipped and applied, or skipped if not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.amp.grad_scaler import GradScaler

from align.policy.shards import part_of, whole
from align.training.lr import lr_at
from alignflow.errors import TrainingError

if TYPE_CHECKING:
    from accelerate.optimizer import AcceleratedOptimizer

    from align.config.sections import Train
    from align.runs.processes import Processes

RUNNING = 3
"""Updates running without a finite gradient after which a run ends."""


class Stepper:
    """The optimizer, its learning rate, and the loss scale of fp16.

    fp16 begins with a loss scale that is too large on purpose: an update that overflows is left out and halves the
    scale. Such an update is counted in :attr:`overflows`, and does not count as divergence until the scale is below 1.

    Args:
        parameters: what is trained.
        optimizer: as accelerate prepared it.
        scaler: of the loss, for fp16.
    """

    def __init__(
        self,
        options: Train,
        parameters: Sequence[nn.Parameter],
        optimizer: AcceleratedOptimizer,
        scaler: GradScaler | None,
        processes: Processes,
    ) -> None:
        self.options, self.parameters, self.optimizer, self.scaler = options, list(parameters), optimizer, scaler
        self.processes = processes
        self.updates, self.skipped, self.overflows = 0, 0, 0

    def scale(self, factor: float) -> None:
        """Multiply this process's gradients."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def step(self) -> tuple[dict[str, float], bool]:
        """Apply the gradients; numbers for the log, and whether the weights moved.

        Raises:
            TrainingError: no gradient was finite for :data:`RUNNING` updates, or at any loss scale down to 1.
        """
        options = self.options
        lr = lr_at(options, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.processes.add_gradients(self.parameters)
        norm = float(whole(self.processes.accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)))
        self.updates += 1
        moved = math.isfinite(norm)
        row = {"grad_norm": norm, "lr": lr}
        if self.scaler is not None:
            self.optimizer.step()  # leaves an overflow out by itself, and lowers the scale then
            moved = not self.optimizer.step_was_skipped
            self._count_overflow(moved)
            row |= {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        else:
            self._count_skipped(moved)
            if moved:
                self.optimizer.step()
        self.optimizer.zero_grad()
        return row, moved

    def _count_skipped(self, moved: bool) -> None:
        self.skipped = 0 if moved else self.skipped + 1
        if self.skipped >= RUNNING:
            raise TrainingError(
                f"the gradient was not finite in {RUNNING} consecutive optimizer steps (number {self.updates}); "
                "lower train.lr, or use precision 'no' or 'bf16'"
            )

    def _count_overflow(self, moved: bool) -> None:
        assert self.scaler is not None
        self.overflows += not moved
        if not moved and self.scaler.get_scale() < 1:
            raise TrainingError(
                f"the gradient was not finite at any loss scale down to 1 (optimizer step {self.updates}), so it "
                "is not the range of fp16; lower train.lr, or use train.precision 'no' or 'bf16'"
            )

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint beside the counters: that of the optimizer and of the loss scale.

        States of sharded parameters are shards; a checkpoint holds them whole.
        """
        scale = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {"optimizer": self.optimizer.optimizer.state_dict(), **scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from whole states of :meth:`state_dict`; one without a loss scale leaves the scale."""
        states = {number: self._parts(number, one) for number, one in state["optimizer"]["state"].items()}
        self.optimizer.optimizer.load_state_dict({**state["optimizer"], "state": states})
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def _parts(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """This process's part of one parameter's state."""
        mine = self.parameters[number]
        return {
            name: part_of(value, mine) if getattr(value, "shape", None) == mine.shape else value
            for name, value in state.items()
        }

    @property
    def counters(self) -> dict[str, int]:
        """Counters for a checkpoint's manifest."""
        return {"updates": self.updates, "skipped": self.skipped, "overflows": self.overflows}

    def load_counters(self, counters: dict[str, Any]) -> None:
        """Continue from :attr:`counters`."""
        self.updates, self.skipped = counters["updates"], counters["skipped"]
        self.overflows = counters.get("overflows", 0)
