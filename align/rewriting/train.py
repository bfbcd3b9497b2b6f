"""Training of a rewriter: supervised, on preferences, or by policy gradient; the generator is frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.config.load import dump_config
from align.data.choice import indices_at
from align.data.files import write_json, write_text
from align.data.prompts import Prompt, read_prompts
from align.maths.advantages import group_advantage
from align.maths.pairs import threshold_gap
from align.maths.seeds import derive
from align.rewriting.environment import Environment, Rewrite
from align.rewriting.learner import Learner, trained_lora
from align.rewriting.loop import Loop, shown
from align.rewriting.settings import Dpo, Grpo, Sft
from align.rewriting.table import Scored, lines, mean_scores, read_rewrites, row_of
from align.rewriting.words import instruction
from align.rewriting.writer import LocalLM, build_writer
from align.runs.identity import data_digest, model_digest
from align.runs.owned import REWRITER
from align.runs.run_folder import RunFolder
from alignflow.errors import DataError
from alignflow.words import count
from rewards.judges.lora import save_lora

if TYPE_CHECKING:
    from align.rewriting.settings import RewriterConfig


def train_rewriter(
    config: RewriterConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train the LoRA of a config into its folder; returns what ``summary.json`` holds.

    Raises:
        AlignflowError: the message names the problem and the remedy.
        KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
    """
    run = RunFolder(config.run_dir, kind=REWRITER)
    with run.held(dump_config(config), resume=resume, overwrite=overwrite):
        prompts = read_prompts(config.prompts.train, config.prompts.limit, config.seed)
        heldout = (
            read_prompts(config.prompts.heldout, config.prompts.measured, config.seed) if config.prompts.heldout else []
        )
        run.check_content(data=data_digest(prompts), model=model_digest(config.generator.path))
        judges = Environment.build(config)
        judges.check([*prompts, *heldout])
        writer = build_writer(config.writer, judges.generator.device)
        assert isinstance(writer, LocalLM)
        run.begin()
        return Training(config, run, judges, writer, prompts, heldout, say).run()


class Training(Loop):
    """One run, from its checkpoint or from nothing to its summary."""

    def __init__(
        self, config: RewriterConfig, run: RunFolder, judges: Environment, writer: LocalLM,
        prompts: Sequence[Prompt], heldout: Sequence[Prompt], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.judges, self.writer = config, judges, writer
        self.prompts, self.heldout = prompts, heldout
        super().__init__(run, new_learner(config, writer), config.checkpoint, say)
        self.asked = [writer.tokens(instruction(config.reply.template, prompt.text)) for prompt in prompts]

    def run(self) -> dict[str, Any]:
        """Steps, measurements and files."""
        config, started = self.config, time.perf_counter()
        before, after = self.loop()
        save_lora(self.writer.model, config.run_dir)
        summary = {
            "status": "finished", "steps": self.learner.step,
            "prompts": len(self.prompts), "heldout": len(self.heldout),
            **{name: before.get(name) for name in ("plain", "before")},
            "after": after.get("after"), "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write_json(config.run_dir / "summary.json", summary)
        return summary

    # -- held-out prompts ---------------------------------------------------------------------------------------

    def measured(self, when: str) -> dict[str, Any] | None:
        """Mean scores of the likeliest rewrites of held-out prompts; ``before`` also of the prompts as they are."""
        if not self.heldout:
            return None
        reply = self.config.reply.model_copy(update={"temperature": 0.0})
        asked = [instruction(reply.template, prompt.text) for prompt in self.heldout]
        texts = {when: self.writer.write(asked, [0] * len(asked), reply)}
        if when == "before":
            texts["plain"] = [prompt.text for prompt in self.heldout]
        found: dict[str, Any] = {}
        for name, some in texts.items():
            rewrites = [
                Rewrite(prompt, n, text) for n, (prompt, text) in enumerate(zip(self.heldout, some, strict=True))
            ]
            judged = self.judges.judge(rewrites, ("heldout",), gold=True)
            found[name] = mean_scores(judged)
            rows = [
                row_of(one.prompt, one.text, it, scores=it.scores) for one, it in zip(rewrites, judged, strict=True)
            ]
            write_text(self.config.run_dir / f"held_out_{name}.jsonl", lines(rows))
        self.folder.log({"step": self.learner.step, "event": when, **found})
        self.say("held out  " + ", ".join(f"{name} {shown(values)}" for name, values in found.items()))
        return found

    # -- steps --------------------------------------------------------------------------------------------------

    def method_step(self) -> Callable[[int], dict[str, float]]:
        """The step of the method, a function of its number and the learner alone."""
        if isinstance(self.config.method, Grpo):
            return self._grpo
        groups = self._groups()
        return self._sft(groups) if isinstance(self.config.method, Sft) else self._dpo(groups)

    def _grpo(self, step: int) -> dict[str, float]:
        config, how = self.config, self.config.method
        assert isinstance(how, Grpo)
        numbers = indices_at(step, how.batch, len(self.prompts), config.seed)
        rows = [(place, number, k) for place, number in enumerate(numbers) for k in range(how.rewrites)]
        asked = [self.asked[number] for _, number, _ in rows]
        seeds = [derive(config.seed, "rewrite", step, place, k) for place, _, k in rows]
        replies = self.writer.sample(asked, seeds, config.reply)
        texts = [self.writer.text(reply) for reply in replies]
        rewrites = [Rewrite(self.prompts[n], n, text) for (_, n, _), text in zip(rows, texts, strict=True)]
        judged = self.judges.judge(rewrites, ("train", step))
        invalid = math.nan if how.invalid is None else how.invalid
        scores = torch.tensor([invalid if one.invalid else one.score for one in judged])
        group = torch.tensor([place for place, _, _ in rows])
        advantage = group_advantage(scores, group, normalise_by=how.normalise_by)
        known = scores.isfinite()
        found = self.learner.reinforce(asked, replies, advantage, known)
        reward = float(scores[known].mean()) if bool(known.any()) else math.nan
        return {"reward": reward, "missing": int((~known).sum()), "distinct": len(set(texts)) / len(texts), **found}

    def _sft(self, groups: list[list[Scored]]) -> Callable[[int], dict[str, float]]:
        how = self.config.method
        assert isinstance(how, Sft)
        best = [sorted(some, key=lambda row: -row.score)[: how.best] for some in groups]
        rows = [self._lesson(row) for some in best for row in some]

        def step(number: int) -> dict[str, float]:
            pick = indices_at(number, min(how.batch, len(rows)), len(rows), self.config.seed)
            return self.learner.imitate([rows[i][0] for i in pick], [rows[i][1] for i in pick])

        return step

    def _dpo(self, groups: list[list[Scored]]) -> Callable[[int], dict[str, float]]:
        how = self.config.method
        assert isinstance(how, Dpo)
        rows = [row for some in groups for row in some]
        group = torch.tensor([number for number, some in enumerate(groups) for _ in some])
        passes = torch.tensor([all(row.parts.get(k, -math.inf) > v for k, v in how.above.items()) for row in rows])
        pairs = threshold_gap(torch.tensor([row.score for row in rows]), passes, group, how.gap, how.ranks)
        chosen = [
            (w, v)
            for w, v, ok in zip(pairs.winner.tolist(), pairs.loser.tolist(), pairs.valid.tolist(), strict=True)
            if ok
        ]
        if not chosen:
            raise DataError(
                f"none of {len(pairs)} pairs of rewrites has a gap above {how.gap:g} and a chosen one above the "
                "thresholds; set a smaller method.gap"
            )
        self.say(f"{count(len(chosen), 'pair')} of rewrites")
        lessons = [self._lesson(row) for row in rows]

        def step(number: int) -> dict[str, float]:
            pick = [chosen[i] for i in indices_at(number, min(how.batch, len(chosen)), len(chosen), self.config.seed)]
            better, worse = ([lessons[pair[side]][1] for pair in pick] for side in (0, 1))
            return self.learner.prefer([lessons[w][0] for w, _ in pick], better, worse, how.beta)

        return step

    def _lesson(self, row: Scored) -> tuple[list[int], list[int]]:
        """Tokens of the instruction, and of the rewrite with its end."""
        asked = self.writer.tokens(instruction(self.config.reply.template, row.prompt))
        return asked, [*self.writer.encode(row.rewrite), self.writer.end]

    # -- rewrites to learn from ---------------------------------------------------------------------------------

    def _groups(self) -> list[list[Scored]]:
        """Scored rewrites by prompt: those of the table, or of the rewriter as it was at the start."""
        given = self.config.prompts.rewrites
        file = self.config.run_dir / "rewrites.jsonl" if given is None else Path(given)
        if given is None and not file.is_file():
            write_text(file, lines(self.collected(len(self.prompts), self._written, "rewrites of")))
        rows = [row for row in read_rewrites(str(file)) if math.isfinite(row.score)]
        if not rows:
            raise DataError(f"{file}: no rewrite has a score")
        rows.sort(key=lambda row: row.prompt)
        return [list(some) for _, some in groupby(rows, key=lambda row: row.prompt)]

    def _written(self, numbers: range) -> list[dict[str, Any]]:
        config = self.config
        pairs = [(number, k) for number in numbers for k in range(config.candidates)]
        seeds = [derive(config.seed, "collect", number, k) for number, k in pairs]
        with self.learner.reference():
            replies = self.writer.sample([self.asked[number] for number, _ in pairs], seeds, config.reply)
        new = dict.fromkeys(
            (number, self.writer.text(reply)) for (number, _), reply in zip(pairs, replies, strict=True)
        )
        rewrites = [Rewrite(self.prompts[number], number, text) for number, text in new if text]
        judged = self.judges.judge(rewrites, ("collect",))
        return [row_of(one.prompt, one.text, it) for one, it in zip(rewrites, judged, strict=True)]


def new_learner(config: RewriterConfig, writer: LocalLM) -> Learner:
    """The trained LoRA: the one that the writer was loaded with, or a new one."""
    loaded = config.writer.kind == "local" and config.writer.lora is not None
    parameters = trained_lora(writer.model, config.lora, loaded, derive(config.seed, "lora"), inside="")
    return Learner(writer, parameters, config.method, config.reply.temperature)
