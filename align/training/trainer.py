"""The training loop: roll out, score, assign credit, update, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from align.checking.remedies import explained
from align.data.inputs import remember
from align.data.media import from_bytes
from align.evaluation import alone
from align.maths import advantages
from align.report import write_report
from align.rollout.rollout import Drawn, Scored, spreads
from align.rollout.scoring import Scoring, scores_by_step
from align.rollout.servers import greet
from align.rollout.sources import OnlineSource, StoredSource
from align.runs.phases import phase_named
from align.runs.processes import Processes
from align.runs.progress import Progress, shown
from align.runs.run_folder import RunFolder
from align.runs.stopping import GracefulStop
from align.runs.summary import write_summary
from align.training import agreement, nodes, tracking, truth
from align.training.accelerating import accelerator_of
from align.training.foreseen import foresee
from align.training.held_out import HeldOut
from align.training.keeping import Keeping
from align.training.lr import due
from align.training.missing import tally
from align.training.rescue import Rescue
from align.training.state import RunState
from align.training.trial import try_rewards
from rewards.base import Scores

if TYPE_CHECKING:
    from align.config.settings import Config


OnStep = Callable[["Trainer", dict[str, Any]], None]
"""Called after every step with the trainer and the step's row of ``metrics.jsonl``, in every process."""


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Run a config from start, or from its newest checkpoint, to its end. Returns the summary.

    Raises:
        AlignflowError: the run failed; its last checkpoint is kept. The message names the problem and the remedy.
        KeyboardInterrupt: after a checkpoint, when the user stopped the run.
    """
    with entered(config, resume=resume, overwrite=overwrite) as trainer:
        return trainer.fit(on_step)


@contextmanager
def entered(config: Config, *, resume: bool = False, overwrite: bool = False) -> Iterator[Trainer]:
    """The trainer of a config, whose run folder is created or entered and belongs to the block."""
    from align.config.load import dump_config
    from align.runs.environment import environment

    if config.train.threads:
        torch.set_num_threads(config.train.threads)  # of loading; the run's own number is chosen before its first step
    accelerator = accelerator_of(config)
    run, processes = RunFolder(config.run_dir, accelerator.is_main_process), Processes(accelerator)
    resolved = dump_config(config)
    agreement.check(config, processes)
    greet(config)
    try:
        run.take(processes.settled(lambda: run.enter(resolved, resume=resume, overwrite=overwrite)))
        nodes.check(run.path, processes, Progress(0, quiet=not run.writes).say)
        with explained(config):
            with phase_named("load"):
                trainer = Trainer(config, run, accelerator)
            try_rewards(
                trainer, trainer.held_out
            )  # before there is a folder, which the next attempt would have to overwrite
            run.id = processes.settled(lambda: run.create(resolved, environment(torch_too=True)))
            yield trainer
    finally:
        run.leave()


class Trainer(RunState):
    """One run; :meth:`fit` is the loop, :meth:`step` one turn of it."""

    def __init__(self, config: Config, run: RunFolder, accelerator: Accelerator) -> None:
        super().__init__(config, run, accelerator)
        self.held_out = HeldOut(self)
        self.keeping = Keeping(self, self.held_out)
        self.rescue = Rescue(self.keeping, 0, print)  # replaced in fit; benchmarks take steps without checkpoints

    # -- the loop -----------------------------------------------------------------------------------------------

    def fit(self, on_step: OnStep | None = None) -> dict[str, Any]:
        """From the newest checkpoint, if there is one, to the last step."""
        config = self.config
        progress = Progress(config.train.steps, 0, quiet=not self.run.writes)
        self.held_out.screen(progress.say)
        done, notes = self.keeping.resume()
        if config.memory.cache_prompts != "none":
            self._cache_prompts()
        self._start_trackers()
        progress = Progress(config.train.steps, done, quiet=not self.run.writes)
        progress.say(f"run folder {self.run.path}" + (f", continuing after step {done}" if done else ""))
        for note in [*notes, *self._notes()]:
            progress.say(note)
        foresee(self, len(self.held_out.prompts), done, progress)
        clock = time.perf_counter()
        self.phases.entered, self.learning.counted = progress.doing, self.phases.counted
        self.phases.take()
        self.rescue = Rescue(self.keeping, done, progress.say)
        with GracefulStop(progress.say) as stop, self.rescue:
            self.rescue.mark(done)
            if done == 0 and config.evaluate.at_start:
                self.held_out.look(0, progress)
            for step in range(done, config.train.steps):
                if reason := self.held_out.ending.reason:
                    progress.say(reason)
                    break
                row = self.step(step)
                self.seconds, clock = self.seconds + time.perf_counter() - clock, time.perf_counter()
                self.log({"event": "train", "step": step + 1, "seconds": self.seconds, **row})
                self.rescue.mark(step + 1)
                progress.update(step + 1, shown(row, self.reward))
                if on_step is not None:
                    on_step(self, {"step": step + 1, **row})
                better = self.held_out.look(step + 1, progress)
                for news in self._news(row):
                    progress.say(f"step {step + 1}: {news}")
                stopping = self.processes.any(stop.asked or self.missing.too_many is not None)
                keep = stopping or better or self.held_out.ending.reason is not None
                if keep or due(step + 1, config.checkpoint.every, config.train.steps):
                    self.keeping.save(step + 1)
                    self.rescue.stored = step + 1
                if stopping and step + 1 < config.train.steps:
                    self._finish("interrupted")
                    raise self.missing.too_many or KeyboardInterrupt
        return self._finish("finished")

    def _notes(self) -> Iterator[str]:
        """Sentences about the run before its first step."""
        from align.policy.lora import idle_layers

        policy, generator = self.config.policy, self.generator
        idle = idle_layers(generator, policy.targets or generator.lora_targets) if policy.kind == "lora" else []
        if idle:
            left_out = f"{len(idle)} LoRA targets were left out"
            yield f"{left_out}, because the network discards their output: {', '.join(idle)}"
        if self.held_out.prompts and self.reward and (said := alone.note("reward", self.reward)):
            yield said
        if isinstance(self.source, StoredSource) and (division := self.source.division):
            yield f"buckets, {division.said(self.config.rollout.prompts)}"

    def _cache_prompts(self) -> None:
        folder = self.run.path / "prompts" if self.config.memory.cache_prompts == "disk" else None
        with self.accelerator.main_process_first():
            remember(self.generator, [*self.source.prompts, *self.held_out.prompts], folder)

    def step(self, step: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row for ``metrics.jsonl``."""
        with self.source.sized(step):
            return self._step(step)

    def _step(self, step: int) -> dict[str, Any]:
        calls = self.generator.network_calls
        self.rescue.moved = self.drawing.ahead
        drawn, scoring = self.processes.together(lambda: self.drawing.next(step))
        row: dict[str, Any] = {}
        with self.phases.phase("reward"):
            rollout = self._scored(drawn, scoring)
            if not self.samples_in_loss:
                row = self._row(rollout) | self._refresh(rollout)
        rollout, void = self.learning.filtered(rollout)
        row |= self._void(step, void) if self.learning.filter else {}
        with self.phases.phase("update"):
            if self.refreshed is not None and self.refreshed.instead:
                row |= {"loss": math.nan}
            else:
                learned, rollout = self.learning(step, rollout)
                row = (self._row(rollout) if self.samples_in_loss else row) | learned
            self.drawing.learned(step)
        time_spent = self.phases.take()
        made = {"samples": len(rollout.seeds), "calls": self.generator.network_calls - calls}
        total = self.processes.sums(made)
        counted = self.source.counted() if isinstance(self.source, OnlineSource) else {}
        return row | {
            "samples": int(total["samples"]),
            **({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}),
            "images_per_second": total["samples"] / sum(time_spent.values()),
            "network_calls": total["calls"],
            **self.processes.sums(counted),
            "time": time_spent,
        }

    def _scored(self, drawn: Drawn, scoring: Scoring | None) -> Scored:
        """The rollout with its scores; unknown ones where the loss samples and scores."""
        if isinstance(drawn, Scored):
            return drawn
        if self.samples_in_loss:
            return drawn.become(Scored, scores=Scores(torch.full((len(drawn.seeds),), math.nan)))
        assert scoring is not None
        assert self.reward is not None
        scores = self.processes.led(self.processes.together(scoring.scores))
        if "step_scores" in self.recipe.needs and drawn.seeds:
            chunk = self.config.rollout.decode_chunk  # type: ignore[union-attr]
            scores = replace(scores, steps=scores_by_step(self.generator, self.reward, drawn, chunk))
        return drawn.become(Scored, scores=scores)

    def _row(self, rollout: Scored) -> dict[str, Any]:
        """Log entries about a rollout's scores; missing scores of a reward are counted."""
        everyone = self.processes.gather(rollout.scores.values)
        known = everyone[everyone.isfinite()]
        self.reasons = self.processes.objects(list(rollout.scores.reasons.values()))
        if self.reward is not None:
            self.missing.count(len(known), self.reasons)
        parts = {f"reward/{name}": value for name, value in self.processes.means(rollout.scores.parts).items()}
        spread = self.processes.gather(spreads(rollout.media, rollout.group))
        return {
            "reward": float(known.mean()),
            "reward_std": float(known.std(correction=0)) if len(known) else math.nan,
            "missing": len(everyone) - len(known),
            **({"reasons": tally(self.reasons)} if self.reasons else {}),
            "zero_variance_groups": advantages.zero_variance(everyone, self.processes.gather(rollout.group)),
            "diversity": float(spread.mean()) if len(spread) else 0.0,
            **parts,
        }

    def _news(self, row: dict[str, Any]) -> list[str]:
        """Sentences about a step: log-probabilities that disagree, scores that are missing."""
        found = truth.warning(self.config, row), self.missing.news(self.reasons)
        return [one for one in found if one]

    def _refresh(self, rollout: Scored) -> dict[str, float]:
        """The reward's step on everyone's samples, the same in every process."""
        if self.refreshed is None:
            return {}
        self.rescue.moved = True
        media = from_bytes(self.processes.gather(rollout.media))
        found = self.refreshed.fit(media, self.processes.objects(rollout.prompts))
        return {f"refresh/{name}": value for name, value in found.items()}

    def _void(self, step: int, groups: list[int]) -> dict[str, int]:
        """Count void groups and, where the config says so, ban their prompts from later rollouts."""
        assert isinstance(self.source, OnlineSource)
        if groups and self.learning.filter.ban:  # type: ignore[union-attr]
            self.rescue.moved = True
            self.source.ban(step, groups)
        return {"void_groups": len(groups), "banned_prompts": len(self.source.banned)}

    def _finish(self, status: str) -> dict[str, Any]:
        self.drawing.close()
        self.accelerator.wait_for_everyone()
        summary: dict[str, Any] = {}
        calls = self.calls()
        if self.run.writes:
            full = self.config.policy.kind == "full"
            self.export(self.run.path if full else self.run.path / "lora")
        elif self.processes.sharded:
            self.export(None)
        if self.run.writes:
            summary = write_summary(self.run, self.config, status, self.seconds, calls)
            write_report(self.run.path)
        del self.network  # before its process group goes: freed after it, a process sometimes waits for gloo for ever
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return summary

    def _start_trackers(self) -> None:
        if self.config.trackers:
            self.accelerator.init_trackers(self.config.name, config=tracking.sent_config(self.config))
