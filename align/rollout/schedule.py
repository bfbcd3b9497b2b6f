"""Schedule of rollouts: sampled by the policy that is about to train on them, or one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from align.rollout.bench import Bench
from align.rollout.rollout import Drawn, Scored
from align.rollout.scoring import Scoring
from align.rollout.sources import Acting, OnlineSource, StoredSource
from align.runs.processes import Processes
from align.runs.timing import Phases
from rewards.base import Reward

if TYPE_CHECKING:
    from align.config.settings import Config

Draw = tuple[Drawn | Scored, Scoring | None]


class Drawing:
    """Rollouts in order, each with its scoring under way.

    Args:
        config: ``rollout.overlap`` decides when: ``next`` samples a rollout while the one before it is scored, so that
            it comes from the policy of one update ago, which the role ``ahead`` holds.
        source: generates the samples.
        reward: scores them; None if rollouts come with their rewards.
        bench: generator, roles and precision.
        processes: those that share a rollout.
    """

    def __init__(
        self,
        config: Config,
        source: OnlineSource | StoredSource,
        reward: Reward | None,
        bench: Bench,
        phases: Phases,
        processes: Processes | None = None,
    ) -> None:
        overlap = getattr(config.rollout, "overlap", "none")
        self.recipe, self.steps = config.recipe, config.train.steps
        self.source, self.reward, self.bench, self.phases = source, reward, bench, phases
        self.processes = processes
        self.thread = None if overlap == "none" else ThreadPoolExecutor(1, "scoring")
        self.ahead = overlap == "next"
        self.in_hand: Draw | None = None
        self.counted = False
        """Whether the checkpoint's network calls include those of a rollout in progress."""

    def next(self, step: int) -> Draw:
        """This step's rollout. With ``next``, the next one is then sampled while this one is scored.

        ``ahead`` moves before it draws and not after, so that a checkpoint holds what drew the rollout in hand, which a
        resumed run draws again.
        """
        if not self.ahead:
            return self._draw(step, self.recipe.behaviour)
        generator, roles = self.bench.generator, self.bench.roles
        calls = generator.network_calls
        now = self.in_hand or self._draw(step, "ahead")
        if self.in_hand is None and self.counted:
            generator.network_calls = calls
        self.in_hand, self.counted = None, False
        roles.follow("ahead", self.recipe.decay("behaviour", step) if self.recipe.behaviour == "behaviour" else 0.0)
        if step + 1 < self.steps:
            self.in_hand = self._draw(step + 1, "ahead")
        return now

    def learned(self, step: int) -> None:
        """After the updates of a rollout: move the roles that follow the policy."""
        roles = self.bench.roles
        if "behaviour" in roles and self.ahead:
            roles.assign("behaviour", "ahead")
        elif "behaviour" in roles:
            roles.follow("behaviour", self.recipe.decay("behaviour", step + 1))
        if "anchor" in roles:
            roles.follow("anchor", self.recipe.decay("anchor", step + 1))

    def wait(self) -> None:
        """Wait until nothing is being scored: a reward gets one call at a time."""
        if self.in_hand is not None and self.in_hand[1] is not None:
            self.in_hand[1].wait()

    def close(self) -> None:
        """Score nothing more."""
        if self.thread is not None:
            self.thread.shutdown(wait=False, cancel_futures=True)

    def _draw(self, step: int, role: str) -> Draw:
        device = self.bench.generator.device
        scores = self.reward is not None and "reward_gradient" not in self.recipe.needs
        counted = self.phases.counted
        scoring = Scoring(self.reward, self.thread, self.processes, device, counted) if scores and self.reward else None
        acting = self._acting(role)
        with self.processes.uneven(acting) if self.processes else nullcontext():
            return self.source(step, acting, self.phases, scoring.add if scoring else None), scoring

    def _acting(self, role: str) -> Acting:
        @contextmanager
        def acting() -> Iterator[None]:
            with torch.no_grad(), self.bench.roles.use(role), self.bench.autocast():
                yield

        return acting
