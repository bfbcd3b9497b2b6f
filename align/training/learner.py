"""A learner: trained parameters, their roles, and the optimizer that changes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.policy.build import build_optimizer
from align.policy.roles import Roles, ema_decay
from align.recipes.base import Objective
from align.training.stepping import Stepper

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.runs.processes import Processes


@dataclass(frozen=True)
class Learner:
    """One set of trained parameters of a run.

    Args:
        name: ``policy`` for the learner that generates the samples.
        objective: its terms and loss.
        roles: its parameters as they are after the accelerator prepared the network, and copies of them.
        stepper: optimizer and learning rate.
        updates: optimizer steps per rollout.
        ema: decay of the role ``ema``; 0 = the learner has none.
    """

    name: str
    objective: Objective
    roles: Roles
    stepper: Stepper
    updates: int
    ema: float = 0.0

    def step(self) -> dict[str, float]:
        """Apply the gradients, and move the averaged weights; numbers for the log."""
        row, moved = self.stepper.step()
        if moved:
            self.roles.policy_changed()
        if self.ema:
            self.roles.follow("ema", ema_decay(self.stepper.updates, self.ema))
        return row


def build_learners(config: Config, roles: dict[str, Roles], processes: Processes) -> dict[str, Learner]:
    """Learner -> its state at the start of a run."""
    accelerator, found = processes.accelerator, {}
    for name, learns in config.recipe.learners().items():
        changed = {"lr": learns.lr, "updates": learns.updates}
        options = config.train.model_copy(update={key: value for key, value in changed.items() if value is not None})
        parameters = [parameter for _, parameter in roles[name].parameters]
        optimizer = accelerator.prepare_optimizer(build_optimizer(options, parameters))
        stepper = Stepper(options, parameters, optimizer, accelerator.scaler, processes)
        ema = options.ema if name == "policy" else 0.0
        found[name] = Learner(name, learns.objective, roles[name], stepper, options.updates, ema)
    return found
