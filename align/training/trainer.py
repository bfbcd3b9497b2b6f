"""The training loop: roll out, score, assign credit, update, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from align.checking.remedies import explained
from align.data.files import new_folder
from align.data.inputs import remember
from align.data.prompts import Prompt
from align.data.screening import Needs, recorded, usable
from align.evaluation import alone
from align.evaluation.evaluate import Evaluation, evaluate, held_out, save_grid, wanted
from align.evaluation.per_prompt import write_scores
from align.maths import advantages
from align.policy.build import build_generator, build_optimizer, build_rewards, build_roles, sampling_kinds
from align.policy.roles import ema_decay
from align.policy.velocities import Networks
from align.report import write_report
from align.rollout.rollout import Rollout, spreads
from align.rollout.schedule import Drawing
from align.rollout.scoring import Scoring
from align.rollout.sources import OnlineSource, StoredSource
from align.runs import checkpoint
from align.runs.best import Best
from align.runs.phases import phase_named
from align.runs.progress import Progress, said, shown
from align.runs.run_folder import RunFolder, flatten
from align.runs.stopping import GracefulStop
from align.runs.summary import write_summary
from align.training import keeping
from align.training.accelerating import accelerator_of
from align.training.lr import due
from align.training.missing import Missing, tally
from align.training.processes import Processes
from align.training.rescue import Rescue
from align.training.stepping import Stepper
from align.training.timing import Phases
from alignflow.errors import TrainingError
from generators.memory import compile_networks
from rewards.base import Reward

if TYPE_CHECKING:
    from align.config.settings import Config
    from align.recipes.base import Terms


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Run a config from start, or from its newest checkpoint, to its end. Returns the summary.

    Raises:
        AlignflowError: says what was wrong and what to do; a run folder keeps its last checkpoint.
        KeyboardInterrupt: after a checkpoint, when the user stopped the run.
    """
    from align.config.load import dump_config
    from align.runs.environment import environment

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    accelerator = accelerator_of(config)
    run, processes = RunFolder(config.run_dir, accelerator.is_main_process), Processes(accelerator)
    resolved = dump_config(config)
    try:
        run.take(processes.settled(lambda: run.enter(resolved, resume=resume, overwrite=overwrite)))
        with explained(config):
            with phase_named("load"):
                trainer = Trainer(config, run, accelerator)
            run.id = processes.settled(lambda: run.create(resolved, environment(torch_too=True)))
            return trainer.fit()
    finally:
        run.leave()


class Trainer:
    """State of one run; :meth:`fit` is the loop, :meth:`step` one turn of it."""

    def __init__(self, config: Config, run: RunFolder, accelerator: Accelerator) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.recipe = config.recipe
        set_seed(config.seed)
        self.generator = build_generator(
            config.generator, config.memory, accelerator.device,
            training=True, optimizer=config.train.optimizer, kinds=sampling_kinds(config),
        )  # fmt: skip
        self.roles = build_roles(config, self.generator)
        self.parameters = [parameter for _, parameter in self.roles.parameters]
        options = config.train
        optimizer = build_optimizer(config.train, self.parameters)
        if options.gradient_checkpointing:
            for network in self.generator.backbones().values():
                network.enable_gradient_checkpointing()  # type: ignore[operator]
        compile_networks(self.generator.backbones().values(), config.memory.compile)
        # not wrapped for several processes: their gradients are added up by hand, once an update
        self.network = accelerator.prepare_model(self.generator.backbone, evaluation_mode=True)
        self.generator.network = self.network
        self.processes = Processes(accelerator)
        self.share = self.processes.share
        prepared = accelerator.prepare_optimizer(optimizer)
        self.stepper = Stepper(options, self.parameters, prepared, accelerator.scaler, self.processes)
        self.net = Networks(self.generator, self.roles, accelerator.autocast)
        self.reward = build_rewards({"reward": config.reward}, accelerator.device, learning="reward").get("reward")
        self.refreshed = self.reward.refresh if self.reward else None
        if self.refreshed is not None and "ahead" in self.roles:
            raise TrainingError(
                "rollout.overlap: 'next' scores a rollout while the reward learns from the one before it; use 'chunks'"
            )
        self.held_out_skipped: dict[str, str] = {}
        self.held_out, self.eval_rewards = self._evaluation()
        source = OnlineSource if config.rollout.kind == "online" else StoredSource
        wants = wanted({"reward": self.reward} if self.reward else {})
        self.source = source(config, self.generator, self.share, self.recipe.keeps_trajectory, wants)
        self.missing = Missing(self.reward.name if self.reward else "", options.unscored)
        self.phases = Phases()
        self.drawing = Drawing(config, self.source, self.reward, self.net, self.phases, self.processes)
        self.seconds, self.calls_before = 0.0, 0
        self.best = Best(config.checkpoint.best)

    def _evaluation(self) -> tuple[list[Prompt], dict[str, Reward]]:
        settings = self.config.evaluate
        if self.config.prompts.heldout is None:
            return [], {}
        other = {name: reward for name, reward in settings.rewards.items() if reward != self.config.reward}
        built = build_rewards(other, self.accelerator.device)
        rewards = {name: built.get(name, self.reward) for name in settings.rewards}
        trained = {"reward": self.reward} if self.reward else {}
        known = {**trained, **{name: reward for name, reward in rewards.items() if reward}}
        known = alone.scored_alone(known, settings)
        return held_out(self.config.prompts, settings, self.generator, known, self.held_out_skipped), known

    # -- the loop -----------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """From the newest checkpoint, if there is one, to the last step."""
        config = self.config
        progress = Progress(config.train.steps, 0, quiet=not self.run.writes)
        self._screen(progress.say)
        self.identity = keeping.identity_of(self)
        done, notes = keeping.resume(self)
        if config.memory.cache_prompts != "none":
            on_disk = config.memory.cache_prompts == "disk"
            folder = self.run.path / "prompts" if on_disk else None
            with self.accelerator.main_process_first():
                remember(self.generator, [*self.source.prompts, *self.held_out], folder)
        self._start_trackers()
        progress = Progress(config.train.steps, done, quiet=not self.run.writes)
        progress.say(f"run folder {self.run.path}" + (f", going on after step {done}" if done else ""))
        for note in notes:
            progress.say(note)
        if idle := self._idle_targets():
            progress.say(f"{len(idle)} LoRA targets left out, the network drops their result: {', '.join(idle)}")
        if self.held_out and self.reward and (said := alone.note("reward", self.reward)):
            progress.say(said)
        clock = time.perf_counter()
        self.phases.entered = progress.doing
        self.phases.take()
        self.rescue = Rescue(self, done, progress.say)
        with GracefulStop(progress.say) as stop, self.rescue:
            self.rescue.mark(done)
            if done == 0 and config.evaluate.at_start:
                self._look(0, progress)
            for step in range(done, config.train.steps):
                row = self.step(step)
                self.seconds, clock = self.seconds + time.perf_counter() - clock, time.perf_counter()
                self._log({"event": "train", "step": step + 1, "seconds": self.seconds, **row})
                self.rescue.mark(step + 1)
                progress.update(step + 1, shown(row, self.reward))
                better = self._look(step + 1, progress)
                if news := self.missing.news(self.reasons):
                    progress.say(f"step {step + 1}: {news}")
                stopping = self.processes.any(stop.asked or self.missing.too_many is not None)
                if stopping or better or due(step + 1, config.checkpoint.every, config.train.steps):
                    keeping.save(self, step + 1)
                    self.rescue.stored = step + 1
                if stopping and step + 1 < config.train.steps:
                    self._finish("interrupted")
                    raise self.missing.too_many or KeyboardInterrupt
        return self._finish("finished")

    def _idle_targets(self) -> list[str]:
        from align.policy.lora import idle_layers

        policy = self.config.policy
        if policy.kind != "lora":
            return []
        return idle_layers(self.generator, policy.targets or self.generator.lora_targets)

    def step(self, step: int) -> dict[str, Any]:
        """One rollout and its updates; returns the row for ``metrics.jsonl``."""
        calls = self.generator.network_calls
        self.rescue.moved = self.drawing.ahead
        rollout, scoring = self.processes.together(lambda: self.drawing.next(step))
        with self.phases.phase("reward"):
            row = self._score(rollout, scoring)
            row |= self._refresh(rollout)
        with self.phases.phase("update"):
            waits = self.refreshed is not None and self.refreshed.instead
            row |= {"loss": math.nan} if waits else self._learn(rollout)
            self.drawing.learnt(step)
        time_spent = self.phases.take()
        made = {"samples": len(rollout.seeds), "calls": self.generator.network_calls - calls}
        total = self.processes.sums(made)
        return row | {
            "samples": int(total["samples"]),
            **({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if torch.cuda.is_available() else {}),
            "images_per_second": total["samples"] / sum(time_spent.values()),
            "network_calls": total["calls"],
            "time": time_spent,
        }

    def _score(self, rollout: Rollout, scoring: Scoring | None) -> dict[str, Any]:
        parts: dict[str, float] = {}
        self.reasons: list[str] = []
        if rollout.rewards is None:
            assert scoring is not None
            scores = self.processes.together(scoring.scores)
            rollout.rewards = scores.values
            self.reasons = self.processes.objects(list(scores.reasons.values()))
            self.missing.count(int(self.processes.gather(scores.values).isfinite().sum()), self.reasons)
            parts = {f"reward/{name}": value for name, value in self.processes.means(scores.parts).items()}
        everyone = self.processes.gather(rollout.rewards)
        known = everyone[everyone.isfinite()]
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

    def _refresh(self, rollout: Rollout) -> dict[str, float]:
        """The reward's step on everyone's samples, the same in every process."""
        if self.refreshed is None:
            return {}
        self.rescue.moved = True
        found = self.refreshed.fit(self.processes.gather(rollout.media), self.processes.objects(rollout.prompts))
        return {f"refresh/{name}": value for name, value in found.items()}

    def _learn(self, rollout: Rollout) -> dict[str, Any]:
        assert rollout.rewards is not None
        gather = self.processes.gather
        everyone = self.recipe.credit(gather(rollout.rewards), gather(rollout.group))
        before = sum(self.processes.objects([len(rollout.seeds)])[: self.share.rank])
        mine = everyone[before : before + len(rollout.seeds)]
        terms = self.recipe.terms(rollout, mine) if rollout.seeds else None
        rows: list[dict[str, float]] = []
        for part in range(self.config.train.updates):
            if terms is None:
                rows.append(self._update(None, rollout))
                continue
            chosen = (terms.slot + terms.sample) % self.config.train.updates == part
            rows.append(self._update(terms[chosen.nonzero().flatten()], rollout))
        first = rows[0]
        averaged = {name: sum(row.get(name, math.nan) for row in rows) / len(rows) for name in first}
        return averaged | {name: first[name] for name in ("ratio",) if name in first}

    def _update(self, terms: Terms | None, rollout: Rollout) -> dict[str, float]:
        """One optimizer step on this process's terms, None or empty where it has none."""
        weights = torch.zeros(0) if terms is None else terms.weight
        total = self.processes.sums({"weight": float(weights.sum())})["weight"]
        if total == 0:
            return {"loss": math.nan}
        sums: dict[str, Tensor] = {}
        drift: dict[str, float] = {}
        first = 0
        for weight in weights.split(self.config.train.micro_batch) if len(weights) else []:
            assert terms is not None
            loss = self.recipe.loss(terms[first : first + len(weight)], rollout, self.net)
            scale = weight.to(loss.value.device) / total
            self.accelerator.backward((loss.value * scale).sum())
            for name, values in {"loss": loss.value.detach(), **loss.metrics}.items():
                part = (values.detach() * scale).sum()
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
            if first == 0:
                drift = self.net.drifts()
                drift |= {"ratio": float(ratio.mean())} if (ratio := loss.metrics.get("ratio")) is not None else {}
            first += len(weight)
        metrics = self.processes.sums({name: float(value) for name, value in sums.items()})
        metrics |= {"ratio": drift.pop("ratio")} if "ratio" in drift else {}
        row, moved = self.stepper.step()
        if moved:
            self.roles.policy_changed()
        if self.config.train.ema:
            self.roles.follow("ema", ema_decay(self.stepper.updates, self.config.train.ema))
        return {**drift, **metrics, **row}

    # -- looking ------------------------------------------------------------------------------------------------

    def _look(self, step: int, progress: Progress) -> bool:
        """Evaluate and show where it is time to; whether the policy is better than at any evaluation before."""
        config, steps = self.config, self.config.train.steps
        full = due(step, config.evaluate.every, steps) and bool(self.held_out)
        drawn = bool(self.held_out and config.samples.count) and due(step, config.samples.every, steps)
        if not full and not drawn:
            return False
        better = False
        self.drawing.wait()
        began = time.perf_counter()
        with self.phases.phase("evaluate"):
            result = self._evaluate(self.held_out if full else self.held_out[: config.samples.count])
        if full:
            if self.run.writes:
                write_scores(self.run.path, step, self._eval_role, result.by_prompt())
            row = {"event": "eval", "step": step, "role": self._eval_role, **result.row()}
            row["range"] = {name: list(reward.range) for name, reward in self.eval_rewards.items()}
            self._log(row)
            better = self.best.see(step, row["scores"])
            scores = "  ".join(f"{name} {said(value)}" for name, value in row["scores"].items())
            progress.say(f"held-out, step {step}: {scores}  ({time.perf_counter() - began:.0f} s)")
        if self.run.writes and config.samples.count:
            save_grid(self.run.path / "samples" / f"step-{step:06d}", result, config.samples)
        if self.run.writes:
            write_report(self.run.path)
        self.phases.take()
        return better

    @property
    def _eval_role(self) -> str:
        return "policy" if not self.config.train.ema else self.config.evaluate.role

    def _evaluate(self, prompts: list[Prompt]) -> Evaluation:
        with self.roles.use(self._eval_role), torch.no_grad():
            return evaluate(
                self.generator, prompts, self.eval_rewards, self.config.evaluate,
                show=self.config.samples.count, processes=self.processes,
            )  # fmt: skip

    def _screen(self, say: Callable[[str], None]) -> None:
        """Read what prompts come with, once for all processes, and leave out what cannot be used."""
        skip = self.config.prompts.bad == "skip"
        needs = Needs(tuple(dict.fromkeys((*self.generator.inputs, *wanted(self.eval_rewards)))))
        source = self.source

        def found() -> dict[str, dict[str, str]]:
            bad = {
                "train": usable(source.prompts, source.skipped, self.generator, source.needs, skip, say),
                "heldout": usable(self.held_out, self.held_out_skipped, self.generator, needs, skip, say),
            }
            on = checkpoint.latest(self.run.checkpoints) is not None
            return {name: recorded(self.run.path, name, one, on) for name, one in bad.items()} if skip else bad

        bad = self.processes.settled(found)
        self.source.leave_out(bad["train"])
        self.held_out = [prompt for prompt in self.held_out if prompt.place not in bad["heldout"]]

    # -- keeping ------------------------------------------------------------------------------------------------

    def calls(self) -> int:
        """Network calls of all processes since the run began."""
        return self.calls_before + round(self.processes.sums({"calls": self.generator.network_calls})["calls"])

    def export(self, folder: Path) -> None:
        """What others load: the evaluated role's LoRA, or its whole networks."""
        from align.policy.lora import save_lora

        with self.roles.use(self._eval_role):
            if self.config.policy.kind == "lora":
                save_lora(self.generator, folder)
            else:
                for name, network in self.generator.backbones().items():
                    with new_folder(folder / name, replaces=True) as staging:
                        network.save_pretrained(staging)  # type: ignore[operator]

    def _finish(self, status: str) -> dict[str, Any]:
        self.drawing.close()
        self.accelerator.wait_for_everyone()
        summary: dict[str, Any] = {}
        calls = self.calls()
        if self.run.writes:
            lora = self.config.policy.kind == "lora"
            self.export(self.run.path / "lora" if lora else self.run.path)
            summary = write_summary(self.run, self.config, status, self.seconds, calls)
            write_report(self.run.path)
        del self.network  # before its process group goes: freed after it, a process sometimes waits for gloo for ever
        self.accelerator.free_memory()
        self.accelerator.end_training()
        return summary

    def _start_trackers(self) -> None:
        if self.config.trackers:
            self.accelerator.init_trackers(self.config.name)

    def _log(self, row: dict[str, Any]) -> None:
        self.run.log(row)
        if self.config.trackers:
            numbers = {key: value for key, value in flatten(row).items() if isinstance(value, int | float)}
            self.accelerator.log({f"{row['event']}/{key}": value for key, value in numbers.items()}, step=row["step"])
