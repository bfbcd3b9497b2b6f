"""Units of work in a training run, counted before its first step: network calls of samples, updates, evaluations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from align.checking.sizes import terms_per_sample
from align.policy import held
from align.recipes.base import Objective, Recipe
from align.runs.forecast import Forecast, Kind, Unit
from align.runs.threads import settle
from align.training.lr import due

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.runs.progress import Progress
    from align.training.state import RunState

BACKWARD = {"lora": 1.1, "full": 2.0}
"""Time of a backward pass over that of a forward pass: a LoRA's leaves out the gradients of the frozen weights."""
ESTIMATED = ("opd",)
"""Recipes whose loss takes velocities that are no roles."""
DRIFT_ROWS = 32
"""Rows of :meth:`align.rollout.bench.Bench.drift`."""


def foresee(state: RunState, heldout: int, done: int, progress: Progress) -> None:
    """Choose the number of threads, say it with the forecast, and let the progress line use the forecast.

    Every process calls this. All wait for the slowest one, whose measured time is that of the forecast. With
    ``memory.compile`` nothing is timed before the first step.

    Args:
        heldout: number of held-out prompts.
        done: steps that a resumed run has behind it.
    """
    config, share, processes = state.config, state.share, state.processes
    chunk = min(getattr(config.rollout, "chunk", config.train.chunk), config.rollout.prompts * config.rollout.group)
    compiled = config.memory.compile != "none"  # the first calls compile, so their time says nothing about the others
    speed = settle(
        state.generator, () if compiled else state.source.prompts, chunk,
        setting=config.train.threads, before=state.threads_before, context=state.accelerator.autocast,
        shared=processes.sharded or config.parallel.context > 1,
    )  # fmt: skip
    measured = processes.objects([speed.seconds])
    seconds = None if None in measured else max(measured)
    ahead = units(config, heldout, done, share.world)
    forecast = Forecast(ahead, seconds, exact=counted(config) and share.world == 1)
    for line in (speed.said, forecast.said() if ahead else ""):
        if line:
            progress.say(line)
    progress.foresee(forecast)


def units(config: Config, heldout: int, done: int = 0, shares: int = 1) -> list[Unit]:
    """Steps and evaluations after step ``done``, in order.

    Args:
        heldout: number of held-out prompts.
        shares: processes, or groups of processes, among which the work is divided.
    """
    found = [*_evaluation(config, heldout, 0, shares)] if done == 0 and config.evaluate.at_start else []
    for step in range(done, config.train.steps):
        found += [_step(config, step, shares), *_evaluation(config, heldout, step + 1, shares)]
    return found


def counted(config: Config) -> bool:
    """Whether the calls of the updates follow from terms and roles alone: no learner but the policy, and losses that
    take every role's velocity once a term."""
    recipe = config.recipe
    looks = type(recipe).look is not Recipe.look
    if recipe.kind in ESTIMATED or getattr(config.rollout, "buckets", None) is not None:  # whose batches may be smaller
        return False
    if _by_update(config, recipe.learners()["policy"].objective, config.train.updates) is None:
        return False
    return (
        not (looks or "reward_gradient" in recipe.needs or "text_gradient" in recipe.needs)
        and len(recipe.learners()) == 1
    )


def _evaluation(config: Config, heldout: int, at: int, shares: int) -> list[Unit]:
    settings, steps = config.evaluate, config.train.steps
    full = due(at, settings.every, steps)
    shown = min(config.samples.count, heldout) if due(at, config.samples.every, steps) else 0
    count = heldout if full else shown
    calls = count * settings.sampler.steps * _branches(settings.sampler.guidance)
    return [_unit(config, "evaluate", at, calls, 0, 0, count, _busiest(count, shares))] if count else []


def _step(config: Config, step: int, shares: int) -> Unit:
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
            terms = samples * terms_per_sample(config, name)
            with_gradient += terms * rows if updates else 0
            if name == "policy" and updates:
                each = _by_update(config, learns.objective, updates) or (terms / updates,) * updates
                without += _other_roles(config, recipe, step, [rows * one for one in each])
                without += _drift(config, recipe, step, rows, [rows * one for one in each])
    scored, most = 0 if rollout.kind != "online" else samples, _busiest(rollout.prompts, shares)
    return _unit(config, "step", step + 1, sampled, with_gradient, without, scored, most)


def _busiest(count: int, shares: int) -> float:
    """Share of ``count`` prompts, which are divided whole, that the process with the most of them has."""
    return math.ceil(count / shares) / count


def _by_update(config: Config, objective: Objective, updates: int) -> tuple[float, ...] | None:
    """Terms of the policy in every update of a rollout, as :meth:`align.training.learning.Learning._part` divides them.

    None where the scores decide how many they are.
    """
    rollout = config.rollout
    at, slots = objective.division(config)
    if slots and slots % updates == 0:
        return (rollout.prompts * rollout.group * terms_per_sample(config) / updates,) * updates
    if at is None or getattr(rollout, "keep", None):
        return None
    return _spread(tuple(at), rollout.group if rollout.kind == "pairs" else 1, slots, updates)


@lru_cache(maxsize=16)  # asked for every step
def _spread(at: tuple[int, ...], unit: int, slots: int, updates: int) -> tuple[float, ...]:
    counts = Counter((slot + sample // unit) % updates for sample in at for slot in range(slots))
    return tuple(float(counts[number]) for number in range(updates))


def _other_roles(config: Config, recipe: Recipe, step: int, calls: Sequence[float]) -> float:
    """Network calls of roles other than the policy; a role that equals the policy costs none.

    Roles are equal before the run's first update; those that follow the policy at once are before the first of every
    rollout.

    Args:
        calls: of the policy in every update.
    """
    overlap = getattr(config.rollout, "overlap", "none") == "next"
    found = 0.0
    for role in recipe.roles(config):
        moves = role in ("behaviour", "anchor") and not overlap
        follows = moves and step > 0 and recipe.decay(role, step) == 0
        apart = role == "reference" and not held.starts_at_base(config)
        free = follows or (step == 0 and not apart)
        found += sum(calls[1:] if free else calls)
    return found


def _drift(config: Config, recipe: Recipe, step: int, rows: int, calls: Sequence[float]) -> float:
    """Network calls of the distance from the base that is logged of every update where no loss computes it.

    Args:
        calls: of the policy in every update.
    """
    if "reference" in recipe.roles(config) or not held.reference_is_base(config):
        return 0
    free = step == 0 and held.starts_at_base(config)
    return sum(min(DRIFT_ROWS, config.train.chunk * rows, one) for one in (calls[1:] if free else calls))


def _branches(guidance: float) -> int:
    """Network calls per row: two with classifier-free guidance."""
    return 1 if guidance == 1.0 else 2


def _unit(
    config: Config, kind: Kind, at: int, sampled: float, with_gradient: float, without: float, samples: int, most: float
) -> Unit:
    """A unit of these network calls of all processes, of which the one with the most makes the share ``most``."""
    back = 1 + BACKWARD["full" if config.policy.kind == "full" else "lora"]
    back += 1 if config.train.gradient_checkpointing else 0
    work = sampled + without + back * with_gradient
    return Unit(kind, at, sampled, with_gradient + without, math.ceil(most * samples), most * work)
