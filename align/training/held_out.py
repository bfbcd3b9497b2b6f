"""Evaluation on held-out prompts and sample grids during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from align.data.prompts import Prompt
from align.data.screening import Needs, recorded, usable
from align.evaluation import alone
from align.evaluation.evaluate import Evaluation, evaluate, held_out, save_grid, scored
from align.policy.build import build_rewards
from align.report import warnings, write_report
from align.report.reading import read_run
from align.runs import checkpoint
from align.runs.best import Best
from align.runs.ending import EarlyEnd
from align.runs.per_prompt import write_scores
from align.runs.progress import Progress
from align.training.lr import due
from align.training.tracking import log_samples
from rewards.base import Reward, wanted

if TYPE_CHECKING:
    from align.training.state import RunState


class HeldOut:
    """The held-out prompts of a run, their rewards, and the best score so far.

    Args:
        state: of the run; the reward that is optimised is not built twice.
    """

    def __init__(self, state: RunState) -> None:
        self.state, self.config = state, state.config
        self.skipped: dict[str, str] = {}
        self.prompts: list[Prompt] = []
        self.rewards: dict[str, Reward] = {}
        self.best = Best(self.config.checkpoint.best)
        self.ending = EarlyEnd(self.config.evaluate)
        if self.config.prompts.heldout is not None:
            with state.generator.sized(self.config.evaluate.size):  # fails now, not at the first evaluation
                pass
            self.rewards = alone.scored_alone(self._rewards(), self.config.evaluate)
            self.prompts = held_out(
                self.config.prompts, self.config.evaluate, state.generator, self.rewards, self.skipped
            )

    def _rewards(self) -> dict[str, Reward]:
        settings, reward = self.config.evaluate, self.state.reward
        other = {name: one for name, one in settings.rewards.items() if one != self.config.reward}
        built = build_rewards(other, self.state.accelerator.device, self.config.memory)
        rewards = {name: built.get(name, reward) for name in settings.rewards}
        trained = {"reward": reward} if reward else {}
        return {**trained, **{name: one for name, one in rewards.items() if one}}

    def screen(self, say: Callable[[str], None]) -> None:
        """Read the media of all prompts, once for all processes, and leave out those that cannot be used."""
        skip, state = self.config.prompts.bad == "skip", self.state
        source, generator, folder = state.source, state.generator, state.run.path
        needs = Needs(tuple(dict.fromkeys((*generator.inputs, *wanted(self.rewards)))))

        def found() -> dict[str, dict[str, str]]:
            bad = {
                "train": usable(source.prompts, source.skipped, generator, source.needs, skip, say),
                "heldout": usable(self.prompts, self.skipped, generator, needs, skip, say),
            }
            on = checkpoint.latest(state.run.checkpoints) is not None
            return {name: recorded(folder, name, one, on) for name, one in bad.items()} if skip else bad

        bad = state.processes.settled(found)
        source.leave_out(bad["train"])
        self.prompts = [prompt for prompt in self.prompts if prompt.place not in bad["heldout"]]

    def look(self, step: int, progress: Progress) -> bool:
        """Evaluate and save samples when they are due; whether the policy is better than at every evaluation before."""
        config, steps, state = self.config, self.config.train.steps, self.state
        full = due(step, config.evaluate.every, steps) and bool(self.prompts)
        drawn = bool(self.prompts and config.samples.count) and due(step, config.samples.every, steps)
        if not full and not drawn:
            return False
        better, run = False, state.run
        state.drawing.wait()
        began = time.perf_counter()
        with state.phases.phase("evaluate"):
            result = self._evaluate(self.prompts if full else self.prompts[: config.samples.count])
        if full:
            if run.writes:
                write_scores(run.path, step, self.state.role, result.by_prompt())
            row = {"event": "eval", "step": step, "role": self.state.role, **result.row()}
            row["range"] = {name: list(reward.range) for name, reward in self.rewards.items()}
            state.log(row)
            hacked = state.processes.settled(lambda: warnings.hacked(read_run(run.path)))
            better = self.best.see(step, row["scores"], hacked=hacked is not None)
            scores = "  ".join(f"{name} {scored(result, name)}" for name in result.scores)
            progress.say(f"held-out, step {step}: {scores}  ({time.perf_counter() - began:.0f} s)")
            if hacked is not None:
                progress.say(f"reward hacking at step {step}: {hacked}")
            self.ending.see(step, better, hacked)
        if run.writes and config.samples.count:
            folder = run.path / "samples" / f"step-{step:06d}"
            save_grid(folder, result, config.samples)
            for failed in log_samples(state.accelerator.trackers if config.trackers else (), folder, step):
                progress.say(failed)
        if run.writes:
            write_report(run.path)
        state.phases.take()
        progress.finished("evaluate", step)
        return better

    def _evaluate(self, prompts: list[Prompt]) -> Evaluation:
        state = self.state
        with state.bench.roles.use(self.state.role), torch.no_grad():
            return evaluate(
                state.generator, prompts, self.rewards, self.config.evaluate,
                show=self.config.samples.count, processes=state.processes,
            )  # fmt: skip
