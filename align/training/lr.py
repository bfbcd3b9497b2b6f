"""Schedules and learning rate as functions of the step counters, so there is no state to save."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.config.sections import Train


def due(step: int, every: int, last: int) -> bool:
    """Before the first update, after the last, and every ``every`` updates between (0 = not between)."""
    return step in (0, last) or (every > 0 and step % every == 0)


def lr_factor(update: int, total: int, warmup: int, schedule: str) -> float:
    """Factor of the learning rate at ``update`` (from 0) of ``total``: linear warm-up, then the schedule.

    Args:
        schedule: ``constant``, ``linear`` (to 0) or ``cosine`` (to 0).
    """
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((update - warmup) / max(total - warmup, 1), 1.0)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def lr_at(options: Train, update: int) -> float:
    """The learning rate at ``update`` (from 0)."""
    return options.lr * lr_factor(update, options.steps * options.updates, options.warmup, options.schedule)


def new_course(before: Train, now: Train, update: int) -> str | None:
    """How the learning rate continues from ``update`` where a resumed run leaves the planned curve; None if it does
    not."""
    total = now.steps * now.updates
    if all(lr_at(before, one) == lr_at(now, one) for one in range(update, total)):
        return None
    planned, next_one, last = lr_at(before, update), lr_at(now, update), lr_at(now, max(total - 1, update))
    return (
        f"the learning rate deviates from the planned curve: the next update has {next_one:.3g} instead of "
        f"{planned:.3g}, and the last one, update {total}, {last:.3g} (train.lr, steps, schedule, warmup)"
    )
