"""Training of a judge that writes its verdict, as in ``alignflow reward reason``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.config.load import dump_config
from align.data.choice import indices_at
from align.data.files import write_json, write_text
from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.pair_table import Judged, read_judged
from align.data.prompts import PAIR
from align.maths.advantages import group_advantage
from align.maths.judging import (
    accuracy_reward,
    exploration_reward,
    gain_reward,
    listener_reward,
    rubric_reward,
    thought_reward,
    verdict_reward,
)
from align.maths.seeds import derive
from align.reasoning.reasoner import Reasoner
from align.reasoning.rounds import Case, Rounds, Trace, flat, verdicts
from align.reasoning.settings import Cold, Frames, Listener, ReasonConfig, ReasonGrpo, Rejection, Rubric, Thought
from align.reasoning.words import reply_of, thought_of
from align.rewriting.learner import Learner, trained_lora
from align.rewriting.loop import Loop, shown
from align.rewriting.table import lines
from align.runs.devices import require
from align.runs.identity import data_digest, model_digest
from align.runs.owned import REASONER
from align.runs.run_folder import RunFolder
from alignflow.errors import DataError
from rewards.judges.asking import Question
from rewards.judges.loading import load_judge
from rewards.judges.local import LocalJudge
from rewards.judges.lora import save_lora


def train_reasoner(
    config: ReasonConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train the LoRA of a config into its folder; returns what ``summary.json`` holds.

    Raises:
        AlignflowError: the message names the problem and the remedy.
        KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
    """
    run = RunFolder(config.run_dir, kind=REASONER)
    with run.held(dump_config(config), resume=resume, overwrite=overwrite):
        rows = [row for row in read_judged(config.data.train, limit=config.data.limit) if row.outcome]
        if not rows:
            raise DataError(f"{config.data.train} holds only ties; training needs pairs with a preference")
        heldout = read_judged(config.data.heldout) if config.data.heldout else []
        heldout = [row for row in heldout if row.outcome][: config.measured]
        run.check_content(data=data_digest(row.prompt for row in rows), model=model_digest(config.local.model))
        judge = load_judge(config.local, require(config.device, "device"))
        assert isinstance(judge, LocalJudge)
        training = Reasoning(config, run, Reasoner(judge), rows, heldout, say)
        run.begin()
        return training.run()


class Reasoning(Loop):
    """One run, from its checkpoint or from nothing to its summary."""

    def __init__(
        self, config: ReasonConfig, run: RunFolder, writer: Reasoner, rows: Sequence[Judged],
        heldout: Sequence[Judged], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.config, self.writer, self.rows, self.heldout = config, writer, rows, heldout
        if isinstance(config.method, Cold):
            for row in rows:
                critiques(row)
        loaded = config.local.lora is not None
        parameters = trained_lora(writer.model, config.lora, loaded, derive(config.seed, "lora"))
        learner = Learner(writer, parameters, config.method, config.reply.temperature)
        super().__init__(run, learner, config.checkpoint, say)
        self.rounds = Rounds(config.reply, config.frames, writer)
        self.signal = Signals(config, self.learner, writer) if isinstance(config.method, ReasonGrpo) else None

    def run(self) -> dict[str, Any]:
        """Steps, measurements and files."""
        config, started = self.config, time.perf_counter()
        before, after = self.loop()
        save_lora(self.writer.model, config.run_dir)
        measures = {name: found.get("held_out") for name, found in (("before", before), ("after", after))}
        summary = {
            "status": "finished", "steps": self.learner.step, "rows": len(self.rows), "heldout": len(self.heldout),
            **measures, "seconds": time.perf_counter() - started,
        }  # fmt: skip
        write_json(config.run_dir / "summary.json", summary)
        return summary

    def case(self, row: Judged, swapped: bool) -> Case:
        """The question about a pair, the better sample first or second; or about the better or the other sample.

        Raises:
            DataError: media that cannot be read or asked about, two prompts.
        """
        place = row.prompt.where
        if row.rejected_text != row.prompt.text:
            raise DataError(f"{place}: a judge compares samples of one prompt, and rejected_prompt is another")
        media = [to_tensor(pixels_of(row.prompt, side)) for side in PAIR]
        media = media[::-1] if swapped else media
        told = tuple(media[:1] if self.config.reply.shows == "one" else media)
        asked = self.rounds.question(row.prompt.text, told)
        if asked.refused:
            raise DataError(f"{place}: {asked.refused}")
        medium, names = "Image" if media[0].ndim == 3 else "Video", self.config.reply.dimensions
        return Case(row, asked, 2 if swapped else 1, medium, told, verdicts(row, names, swapped))

    def swapped(self, *what: int | str) -> bool:
        """Whether the better sample is second: a coin that follows from the seed."""
        return derive(self.config.seed, "order", *what) % 2 == 1

    # -- held-out pairs -----------------------------------------------------------------------------------------

    def measured(self, when: str) -> dict[str, Any] | None:
        """Accuracy, form and length of the likeliest replies about held-out pairs; a reply without verdict is wrong."""
        if not self.heldout:
            return None
        cases = [self.case(row, self.swapped("heldout", n)) for n, row in enumerate(self.heldout)]
        traces, reply, count = self.rounds.think(cases, [0] * len(cases), 0.0), self.config.reply, len(cases)
        means = {
            "accuracy": sum(one.case.judged(one.last)[0] for one in traces) / count,
            "form": sum(one.form for one in traces) / count,
            "first": sum(one.last.verdict == 1 for one in traces) / count,
            "characters": sum(len(one.last.thought) for one in traces) / count,
        }
        if reply.dimensions:
            means["dimensions"] = sum(one.case.judged(one.last)[1] for one in traces) / count
        if reply.rounds:
            means["rounds"] = sum(len(one.replies) for one in traces) / count
        rows = []
        for one in traces:
            texts = [self.writer.text(tokens) for tokens in one.replies]
            known = {"prompt": one.case.row.prompt.text, "right": one.case.right, "verdict": one.last.verdict}
            rows.append({**known, "reply": texts[-1], **({"earlier": texts[:-1]} if texts[1:] else {})})
        write_text(self.config.run_dir / f"held_out_{when}.jsonl", lines(rows))
        self.folder.log({"step": self.learner.step, "event": when, "held_out": means})
        self.say(f"held out {when}  " + shown({**means}))
        return {"held_out": means}

    # -- steps --------------------------------------------------------------------------------------------------

    def method_step(self) -> Callable[[int], dict[str, float]]:
        """See :class:`~align.rewriting.loop.Loop`."""
        how = self.config.method
        if isinstance(how, ReasonGrpo):
            return self._grpo
        return self._rejection(how) if isinstance(how, Rejection) else self._cold

    def _picked(self, step: int, count: int) -> list[int]:
        return indices_at(step, min(self.config.method.batch, count), count, self.config.seed)

    def _cold(self, step: int) -> dict[str, float]:
        cases, replies = [], []
        for place, number in enumerate(self._picked(step, len(self.rows))):
            case = self.case(self.rows[number], self.swapped("cold", step, place))
            said = critiques(case.row)
            said = said if case.right == 1 else said[::-1]
            one = self.config.reply.shows == "one"
            thought = said[0] if one else thought_of(*said, case.medium)
            cases.append(case.question)
            named = dict(zip(self.config.reply.dimensions, case.dimensions, strict=True))
            text = reply_of(thought, case.right, case.medium, self.config.reply.shows, named)
            replies.append(self.writer.encode(text))
        return self.learner.imitate(cases, replies)

    def _rejection(self, how: Rejection) -> Callable[[int], dict[str, float]]:
        kept = [row for row in self.collected(len(self.rows), self._sampled, "replies about") if row["kept"]]
        if not kept:
            raise DataError(
                "no reply has the form and the right verdict, so there is nothing to learn from; run method.kind=cold "
                "first, and give its folder as judge.lora"
            )
        self.say(f"{len(kept)} right replies")

        def step(number: int) -> dict[str, float]:
            rows = [kept[i] for i in self._picked(number, len(kept))]
            traces = [
                self.rounds.replayed(
                    self.case(self.rows[row["row"]], row["swapped"]), [*row.get("earlier", ()), row["tokens"]]
                )
                for row in rows
            ]
            asked, replies, _ = flat(traces)
            return self.learner.imitate(asked, replies)

        return step

    def _sampled(self, numbers: range) -> list[dict[str, Any]]:
        """Replies of the judge as it was at the start, with those of each pair that are kept."""
        how, reply = self.config.method, self.config.reply
        assert isinstance(how, Rejection)
        keys = [(number, k) for number in numbers for k in range(how.replies)]
        orders = [self.swapped("collect", *key) for key in keys]
        cases = [self.case(self.rows[number], order) for (number, _), order in zip(keys, orders, strict=True)]
        seeds = [derive(self.config.seed, "collect", *key) for key in keys]
        with self.learner.reference():
            traces = self.rounds.think(cases, seeds, reply.temperature)
        found, kept = [], dict.fromkeys(numbers, 0)
        for (number, _), order, one in zip(keys, orders, traces, strict=True):
            right = one.form and one.case.judged(one.last) == (1, 1) and kept[number] < how.best
            kept[number] += right
            earlier = {"earlier": one.replies[:-1]} if one.replies[1:] else {}
            found.append({"row": number, "swapped": order, "tokens": one.replies[-1], "kept": right, **earlier})
        return found

    def _grpo(self, step: int) -> dict[str, float]:
        how, reply = self.config.method, self.config.reply
        assert isinstance(how, ReasonGrpo)
        assert self.signal is not None
        numbers = self._picked(step, len(self.rows))
        each = [self.case(self.rows[n], self.swapped("grpo", step, place)) for place, n in enumerate(numbers)]
        keys = [(place, k) for place in range(len(each)) for k in range(how.replies)]
        cases = [each[place] for place, _ in keys]
        seeds = [derive(self.config.seed, "reply", step, *key) for key in keys]
        traces = self.rounds.think(cases, seeds, reply.temperature)
        scores = self.signal(traces)
        group = torch.tensor([place for place, _ in keys])
        advantage = group_advantage(scores, group, normalise_by=how.normalise_by)
        known, spread, count = scores.isfinite(), scores.view(-1, how.replies), len(traces)
        metrics = {
            "reward": float(scores[known].mean()), "missing": int((~known).sum()),
            "accuracy": sum(one.case.judged(one.last)[0] for one in traces) / count,
            "form": sum(one.form for one in traces) / count,
            "characters": sum(len(one.last.thought) for one in traces) / count,
            "zero_variance_groups": int((spread.amax(1) == spread.amin(1)).sum()),
        }  # fmt: skip
        if reply.rounds:
            metrics["rounds"] = sum(len(one.replies) for one in traces) / count
        asked, replies, owner = flat(traces)
        return {**metrics, **self.learner.reinforce(asked, replies, advantage[owner], known[owner])}


class Signals:
    """Rewards of replies, by the formulas of :mod:`align.maths.judging`."""

    def __init__(self, config: ReasonConfig, learner: Learner, writer: Reasoner) -> None:
        assert isinstance(config.method, ReasonGrpo)
        self.how, self.learner, self.writer = config.method.signal, learner, writer
        self.shows = config.reply.shows
        self.other: Reasoner | None = None
        if isinstance(self.how, Listener | Rubric) and self.how.listener is not None:
            judge = load_judge(self.how.listener, config.device)
            assert isinstance(judge, LocalJudge)
            self.other = Reasoner(judge)

    def __call__(self, traces: Sequence[Trace]) -> Tensor:
        """``[N]`` rewards of what was written about N cases."""
        form = torch.tensor([float(one.form) for one in traces])
        right, share = torch.tensor([one.case.judged(one.last) for one in traces]).unbind(1)
        if isinstance(self.how, Listener):
            return listener_reward(form, right, self.heard(traces), self.how.weight)
        if isinstance(self.how, Rubric):
            proxy = (self.heard(traces) > 0.5).float()
            return rubric_reward(form, right, proxy, additive=self.how.additive)
        if isinstance(self.how, Thought):
            return thought_reward(share, form, [len(one.last.thought) for one in traces])
        if isinstance(self.how, Frames):
            return form + self._frames(self.how, traces, accuracy_reward(right, share, self.how.overall))
        return verdict_reward(form, right)

    def _frames(self, how: Frames, traces: Sequence[Trace], accuracy: Tensor) -> Tensor:
        """Accuracy, gain and exploration."""
        rounds = [
            [how.overall * right + (1 - how.overall) * share for right, share in map(one.case.judged, one.written)]
            for one in traces
        ]
        places = {number: place for place, number in enumerate(dict.fromkeys(id(one.case) for one in traces))}
        group = torch.tensor([places[id(one.case)] for one in traces])
        looked = torch.tensor([float(len(one.replies) > 1) for one in traces])
        return accuracy + gain_reward(rounds, how.gain) + exploration_reward(looked, group, how.least, how.explore)

    @torch.no_grad()
    def heard(self, traces: Sequence[Trace]) -> Tensor:
        """``[N]`` a frozen judge's probability of the right verdict among the two, after it has read the thought.

        It reads the thought as the beginning of its own reply. 0 if the form is wrong.
        """
        values = torch.zeros(len(traces))
        rows = [row for row, one in enumerate(traces) if one.form]
        asked = [traces[row].questions[-1] for row in rows for _ in (1, 2)]
        said = [(traces[row].last.thought, place, traces[row].case.medium) for row in rows for place in (1, 2)]
        verdicts = [reply_of(*one, self.shows) for one in said]
        if self.other is not None:
            totals = _likelihoods(self.other, asked, verdicts)
        else:
            with self.learner.reference():
                totals = _likelihoods(self.writer, asked, verdicts)
        for row, pair in zip(rows, totals.view(-1, 2).softmax(-1), strict=True):
            values[row] = pair[traces[row].case.right - 1]
        return values


def _likelihoods(writer: Reasoner, asked: Sequence[Question], replies: Sequence[str]) -> Tensor:
    """``[n]`` log-probabilities of whole replies."""
    if not asked:
        return torch.zeros(0)
    logs, mask = writer.logps(asked, [writer.encode(reply) for reply in replies])
    return torch.where(mask, logs, 0.0).sum(1).cpu()


def critiques(row: Judged) -> tuple[str, str]:
    """Critiques of the chosen and the rejected sample in the table; DataError if they are missing."""
    found = [row.prompt.metadata.get(f"{side}_critique") for side in PAIR]
    for side, text in zip(PAIR, found, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{row.prompt.where}: method cold needs a text under "{side}_critique", given {text!r:.40}')
    return str(found[0]), str(found[1])
