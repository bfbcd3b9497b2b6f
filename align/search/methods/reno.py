"""ReNO: the reward's gradient moves the noise of a one-step or few-step generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from align.maths.losses import column
from align.search.base import Method
from align.search.noises import surprise
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.search.task import Task
else:
    torch = lazy("torch")


class ReNO(Method):
    """ReNO: gradient ascent on the initial noise, kept likely by a regulariser (arXiv 2406.04312)

    One step needs one network call and its gradient an iteration; of several steps each network call is made again on
    the way back, so that the memory is that of one. Every iterate is a candidate, by its reward alone.
    """

    gradients = True
    deterministic = True

    kind: Literal["reno"] = Field("reno", description="gradient ascent on noise")
    noises: int = Field(1, ge=1, description="noises per prompt at a time")
    iterations: int = Field(
        50, ge=1, description="iterations per noise; then a new noise is started while the budget lasts"
    )
    lr: float = Field(5.0, gt=0, description="learning rate of gradient ascent with Nesterov momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum; 0 = none")
    max_norm: float = Field(0.1, gt=0, description="maximum gradient norm per noise")
    strength: float = Field(1.0, gt=0, description="strength of the reward relative to the regulariser")
    regularise: float = Field(
        0.01, ge=0, description="weight of the regulariser, the negative log-density of the noise's norm; 0 = none"
    )

    def search(self, task: Task) -> None:
        """Noise after noise."""
        for _, count in task.rounds(task.cost.reward_grad_through_ode, self.noises):
            self.ascend(task, count)

    def ascend(self, task: Task, count: int) -> None:
        """Improve ``count`` new noises per prompt; the last iterate is scored without a step after it."""
        begun = task.begin(count)
        x, momentum = begun.x, torch.zeros_like(begun.x)
        for i in range(self.iterations):
            if task.meter.affordable(task.cost.reward_grad_through_ode, count) < count:
                return
            now = begun if i == 0 else begun.named(f"iteration {i}").moved(x)
            ascent = self.ascent(task.reward_grad_through_ode(now), x)
            momentum = self.momentum * momentum + ascent
            x = x + self.lr * (ascent + self.momentum * momentum)

    def ascent(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the objective at noise ``x [N, ...]``, no longer than ``max_norm``."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            back = torch.autograd.grad(surprise(point).sum(), point)[0]
        ascent = self.strength * grad - self.regularise * back
        length = ascent.flatten(1).norm(dim=1)
        return ascent * column((self.max_norm / length.clamp_min(1e-12)).clamp_max(1.0), x)
