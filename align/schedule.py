"""When something is due, and how high the learning rate is: functions of the counters alone, so nothing to save."""

from __future__ import annotations

import math


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
    progress = (update - warmup) / max(total - warmup, 1)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
