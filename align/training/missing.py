"""Handling of missing scores: skip and report them; stop after too many rollouts in a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rewards.base import RewardError


class Missing:
    """Rollouts without any score, counted.

    A reward that scores nothing from the start is broken, and stops the run at once. One that has scored before may
    come back (a server that is being restarted), so it is waited for.

    Args:
        name: the reward's.
        limit: rollouts in a row that may go by without a score.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.limit = name, limit
        self.scored_before = False
        self.in_a_row = 0
        self.said = ""

    def count(self, scored: int, reasons: Sequence[str]) -> None:
        """Take note of one rollout with so many scores.

        Raises:
            RewardError: there is none, and never was one since the run began or was resumed.
        """
        self.in_a_row = 0 if scored else self.in_a_row + 1
        self.scored_before = self.scored_before or scored > 0
        if not self.scored_before:
            reason = next(iter(reasons), "no reason given")
            raise RewardError(f"reward '{self.name}' gave no score to any sample of this rollout: {reason}")

    @property
    def too_many(self) -> RewardError | None:
        """The reason why the run should stop, if it should."""
        if self.in_a_row <= self.limit:
            return None
        return RewardError(
            f"reward '{self.name}' gave no score to any sample of {self.in_a_row} rollouts in a row: {self.said}; "
            "nothing is lost: fix the reward, then continue with --resume"
        )

    def news(self, reasons: Sequence[str]) -> str | None:
        """Message for the user: the reasons, unless they equal the last ones."""
        now = "; ".join(tally(reasons))
        told, self.said = self.said, now
        return f"{len(reasons)} samples without a score: {now}" if now and _kinds(now) != _kinds(told) else None


def tally(reasons: Sequence[str], most: int = 3) -> list[str]:
    """``["12 x the server is away"]``, the most frequent reasons."""
    return [f"{number} x {why}" for why, number in Counter(reasons).most_common(most)]


def _kinds(text: str) -> list[str]:
    return sorted(part.partition(" x ")[2] for part in text.split("; "))
