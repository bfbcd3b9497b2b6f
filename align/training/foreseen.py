"""The units of a training run ahead of its first step: network calls of sampling, updates and evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.checking.sizes import terms_per_sample
from align.policy import held
from align.recipes.base import Recipe
from align.runs.forecast import Forecast, Kind, Unit
from align.runs.threads import settle
from align.training.lr import due

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.runs.progress import Progress
    from align.training.trainer import Trainer

BACKWARD = {"lora": 1.1, "full": 2.0}
"""Time of a backward pass over that of a forward pass: a LoRA's leaves out the gradients of the frozen weights."""
ESTIMATED = ("opd",)
"""Recipes whose loss takes velocities that are no roles."""
DRIFT_ROWS = 32
"""Rows of :meth:`align.rollout.bench.Bench.drift`."""


def foresee(trainer: Trainer, done: int, progress: Progress) -> None:
    """Choose the number of threads, say it with the forecast, and let the progress line use the forecast.

    With ``memory.compile`` nothing is timed before the first step.
    """
    config, share = trainer.config, trainer.share
    chunk = min(getattr(config.rollout, "chunk", config.train.chunk), config.rollout.prompts * config.rollout.group)
    compiled = config.memory.compile != "none"  # the first calls compile, so their time says nothing about the others
    speed = settle(
        trainer.generator, () if compiled else trainer.source.prompts, chunk,
        setting=config.train.threads, before=trainer.threads_before, context=trainer.accelerator.autocast,
    )  # fmt: skip
    ahead = units(config, len(trainer.held_out.prompts), done)
    forecast = Forecast(ahead, speed.seconds, exact=counted(config) and share.world == 1)
    for line in (speed.said, forecast.said() if ahead else ""):
        if line:
            progress.say(line)
    progress.foresee(forecast)


def units(config: Config, heldout: int, done: int = 0) -> list[Unit]:
    """Steps and evaluations after step ``done``, in order, over all processes.

    Args:
        heldout: number of held-out prompts.
    """
    found = [*_evaluation(config, heldout, 0)] if done == 0 and config.evaluate.at_start else []
    for step in range(done, config.train.steps):
        found += [_step(config, step), *_evaluation(config, heldout, step + 1)]
    return found


def counted(config: Config) -> bool:
    """Whether the calls of the updates follow from terms and roles alone: no learner but the policy, and losses that
    take every role's velocity once a term."""
    recipe = config.recipe
    looks = type(recipe).look is not Recipe.look
    if recipe.kind in ESTIMATED or getattr(config.rollout, "buckets", None) is not None:  # whose batches may be smaller
        return False
    return (
        not (looks or "reward_gradient" in recipe.needs or "text_gradient" in recipe.needs)
        and len(recipe.learners()) == 1
    )


def _evaluation(config: Config, heldout: int, at: int) -> list[Unit]:
    settings, steps = config.evaluate, config.train.steps
    full = due(at, settings.every, steps)
    shown = min(config.samples.count, heldout) if due(at, config.samples.every, steps) else 0
    count = heldout if full else shown
    calls = count * settings.sampler.steps * _branches(settings.sampler.guidance)
    return [_unit(config, "evaluate", at, calls, 0, 0, count)] if count else []


def _step(config: Config, step: int) -> Unit:
    rollout, recipe = config.rollout, config.recipe.at(step)
    samples, sampled = rollout.prompts * rollout.group, 0
    if rollout.kind == "online" and not getattr(rollout, "engine", None):
        sampled = samples * rollout.sampler.steps * _branches(rollout.sampler.guidance)
    with_gradient = without = 0.0
    if "reward_gradient" in recipe.needs:
        with_gradient, sampled = sampled, 0  # the loss samples
    else:
        for name, learns in recipe.learners().items():
            updates = config.train.updates if learns.updates is None else learns.updates
            guided = _branches(rollout.sampler.guidance) if recipe.needs and rollout.kind == "online" else 1
            rows = learns.objective.rows_per_term(config) * (guided if name == "policy" else 1)
            calls = samples * terms_per_sample(config, name) * rows
            with_gradient += calls if updates else 0
            if name == "policy" and updates:
                without += _other_roles(config, recipe, step, calls, updates)
                without += _drift(config, recipe, step, rows, calls / updates, updates)
    return _unit(config, "step", step + 1, sampled, with_gradient, without, 0 if rollout.kind != "online" else samples)


def _other_roles(config: Config, recipe: Recipe, step: int, calls: float, updates: int) -> float:
    """Network calls of roles other than the policy; a role that equals the policy costs none.

    Roles are equal before the run's first update; those that follow the policy at once are before the first of every
    rollout.
    """
    overlap = getattr(config.rollout, "overlap", "none") == "next"
    found = 0.0
    for role in recipe.roles(config):
        moves = role in ("behaviour", "anchor") and not overlap
        follows = moves and step > 0 and recipe.decay(role, step) == 0
        apart = role == "reference" and not held.starts_at_base(config)
        free = 1 if follows or (step == 0 and not apart) else 0
        found += calls * (updates - free) / updates
    return found


def _drift(config: Config, recipe: Recipe, step: int, rows: int, calls: float, updates: int) -> float:
    """Network calls of the distance from the base that is logged of every update where no loss computes it."""
    if "reference" in recipe.roles(config) or not held.reference_is_base(config):
        return 0
    free = 1 if step == 0 and held.starts_at_base(config) else 0
    return min(DRIFT_ROWS, config.train.chunk * rows, calls) * (updates - free)


def _branches(guidance: float) -> int:
    """Network calls per row: two with classifier-free guidance."""
    return 1 if guidance == 1.0 else 2


def _unit(
    config: Config, kind: Kind, at: int, sampled: float, with_gradient: float, without: float, samples: int
) -> Unit:
    back = 1 + BACKWARD["full" if config.policy.kind == "full" else "lora"]
    back += 1 if config.train.gradient_checkpointing else 0
    work = sampled + without + back * with_gradient
    return Unit(kind, at, sampled, with_gradient + without, samples, work)
