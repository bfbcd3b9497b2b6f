"""Training of a judge that writes its verdict, as in ``alignflow reward reason``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.config.load import dump_config
from align.data.choice import indices_at
from align.data.files import write_json, write_text
from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.prompts import PAIR
from align.maths.advantages import group_advantage
from align.maths.judging import listener_reward, rubric_reward, thought_reward, verdict_reward
from align.maths.seeds import derive
from align.preference.table import Judged, read_judged
from align.reasoning.reasoner import Reasoner
from align.reasoning.settings import Cold, Listener, ReasonConfig, ReasonGrpo, Rejection, Rubric, Thought
from align.reasoning.words import Written, read_written, reply_of, thought_of
from align.rewriting.learner import Learner, trained_lora
from align.rewriting.loop import Loop, shown
from align.rewriting.table import lines
from align.runs.devices import require
from align.runs.environment import environment
from align.runs.identity import data_digest, model_digest
from align.runs.owned import REASONER
from align.runs.run_folder import RunFolder
from alignflow.errors import DataError
from rewards.judges.asking import Question, question, two
from rewards.judges.asking import shown as shown_frames
from rewards.judges.local import LocalJudge
from rewards.judges.lora import save_lora


@dataclass(frozen=True)
class Case:
    """A question about a pair, with the right verdict: the place of the better sample, or 1 = yes and 2 = no.

    Args:
        medium: Image or Video.
    """

    row: Judged
    question: Question
    right: int
    medium: str


def train_reasoner(
    config: ReasonConfig, *, resume: bool = False, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train the LoRA of a config into its folder; returns what ``summary.json`` holds.

    Raises:
        AlignflowError: says what was wrong and what to do.
        KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
    """
    run, resolved = RunFolder(config.run_dir, kind=REASONER), dump_config(config)
    try:
        run.enter(resolved, resume=resume, overwrite=overwrite)
        rows = [row for row in read_judged(config.data.train, limit=config.data.limit) if row.outcome]
        if not rows:
            raise DataError(f"{config.data.train} holds ties alone, from which no verdict is learned")
        heldout = read_judged(config.data.heldout) if config.data.heldout else []
        heldout = [row for row in heldout if row.outcome][: config.measured]
        data, model = data_digest(row.prompt for row in rows), model_digest(config.local.model)
        run.check_content(data=data, model=model)
        judge = config.local.load(require(config.device, "device"))
        assert isinstance(judge, LocalJudge)
        training = Reasoning(config, run, Reasoner(judge), rows, heldout, say)
        run.create(resolved, environment(torch_too=True), data=data, model=model)
        return training.run()
    finally:
        run.leave()


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
        reply, frames = self.config.reply, self.config.frames
        if reply.shows == "one":
            medium = "image" if media[0].ndim == 3 else "video"
            asked = question(reply.question, row.prompt.text, *shown_frames(media[0], frames), medium=medium)
        else:
            asked = two(reply.question, media[0], media[1], row.prompt.text, frames)
        if asked.refused:
            raise DataError(f"{place}: {asked.refused}")
        return Case(row, asked, 2 if swapped else 1, "Image" if media[0].ndim == 3 else "Video")

    def swapped(self, *what: int | str) -> bool:
        """Whether the better sample is second: a coin that follows from the seed."""
        return derive(self.config.seed, "order", *what) % 2 == 1

    # -- held-out pairs -----------------------------------------------------------------------------------------

    def measured(self, when: str) -> dict[str, Any] | None:
        """Accuracy, form and length of the likeliest replies about held-out pairs; a reply without verdict is wrong."""
        if not self.heldout:
            return None
        cases = [self.case(row, self.swapped("heldout", n)) for n, row in enumerate(self.heldout)]
        replies = self.writer.sample([one.question for one in cases], [0] * len(cases), 0.0, self.config.reply.longest)
        texts = [self.writer.text(reply) for reply in replies]
        found = [read_written(text, self.config.reply.shows) for text in texts]
        count = len(cases)
        means = {
            "accuracy": sum(one.verdict == case.right for one, case in zip(found, cases, strict=True)) / count,
            "form": sum(one.form for one in found) / count,
            "first": sum(one.verdict == 1 for one in found) / count,
            "characters": sum(len(one.thought) for one in found) / count,
        }
        rows = [
            {"prompt": case.row.prompt.text, "right": case.right, "verdict": one.verdict, "reply": text}
            for case, one, text in zip(cases, found, texts, strict=True)
        ]
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
            replies.append(self.writer.encode(reply_of(thought, case.right, case.medium, self.config.reply.shows)))
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
            cases = [self.case(self.rows[row["row"]], row["swapped"]) for row in rows]
            return self.learner.imitate([one.question for one in cases], [row["tokens"] for row in rows])

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
            replies = self.writer.sample([one.question for one in cases], seeds, reply.temperature, reply.longest)
        found, kept = [], dict.fromkeys(numbers, 0)
        for (number, _), order, case, tokens in zip(keys, orders, cases, replies, strict=True):
            written = read_written(self.writer.text(tokens), reply.shows)
            right = written.form and written.verdict == case.right and kept[number] < how.best
            kept[number] += right
            found.append({"row": number, "swapped": order, "tokens": tokens, "kept": right})
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
        asked = [one.question for one in cases]
        replies = self.writer.sample(asked, seeds, reply.temperature, reply.longest)
        found = [read_written(self.writer.text(tokens), reply.shows) for tokens in replies]
        scores = self.signal(cases, found)
        group = torch.tensor([place for place, _ in keys])
        advantage = group_advantage(scores, group, normalise_by=how.normalise_by)
        known, spread = scores.isfinite(), scores.view(-1, how.replies)
        right = [one.verdict == case.right for one, case in zip(found, cases, strict=True)]
        metrics = {
            "reward": float(scores[known].mean()), "missing": int((~known).sum()), "accuracy": sum(right) / len(right),
            "form": sum(one.form for one in found) / len(found),
            "characters": sum(len(one.thought) for one in found) / len(found),
            "zero_variance_groups": int((spread.amax(1) == spread.amin(1)).sum()),
        }  # fmt: skip
        return {**metrics, **self.learner.reinforce(asked, replies, advantage, known)}


class Signals:
    """Rewards of replies, by the formulas of :mod:`align.maths.judging`."""

    def __init__(self, config: ReasonConfig, learner: Learner, writer: Reasoner) -> None:
        assert isinstance(config.method, ReasonGrpo)
        self.how, self.learner, self.writer = config.method.signal, learner, writer
        self.shows = config.reply.shows
        self.other: Reasoner | None = None
        if isinstance(self.how, Listener | Rubric) and self.how.listener is not None:
            judge = self.how.listener.load(config.device)
            assert isinstance(judge, LocalJudge)
            self.other = Reasoner(judge)

    def __call__(self, cases: Sequence[Case], found: Sequence[Written]) -> Tensor:
        """``[N]`` rewards of the replies to the cases."""
        form = torch.tensor([float(one.form) for one in found])
        right = torch.tensor([float(one.verdict == case.right) for one, case in zip(found, cases, strict=True)])
        if isinstance(self.how, Listener):
            return listener_reward(form, right, self.heard(cases, found), self.how.weight)
        if isinstance(self.how, Rubric):
            proxy = (self.heard(cases, found) > 0.5).float()
            return rubric_reward(form, right, proxy, additive=self.how.additive)
        if isinstance(self.how, Thought):
            return thought_reward(right, form, [len(one.thought) for one in found])
        return verdict_reward(form, right)

    @torch.no_grad()
    def heard(self, cases: Sequence[Case], found: Sequence[Written]) -> Tensor:
        """``[N]`` a frozen judge's probability of the right verdict among the two, after it has read the thought.

        It reads the thought as the beginning of its own reply. 0 where the form is wrong.
        """
        values = torch.zeros(len(cases))
        rows = [row for row, one in enumerate(found) if one.form]
        asked = [cases[row].question for row in rows for _ in (1, 2)]
        said = [(found[row].thought, place, cases[row].medium) for row in rows for place in (1, 2)]
        verdicts = [reply_of(*one, self.shows) for one in said]
        if self.other is not None:
            totals = _likelihoods(self.other, asked, verdicts)
        else:
            with self.learner.reference():
                totals = _likelihoods(self.writer, asked, verdicts)
        for row, pair in zip(rows, totals.view(-1, 2).softmax(-1), strict=True):
            values[row] = pair[cases[row].right - 1]
        return values


def _likelihoods(writer: Reasoner, asked: Sequence[Question], replies: Sequence[str]) -> Tensor:
    """``[n]`` log-probabilities of whole replies."""
    if not asked:
        return torch.zeros(0)
    logs, mask = writer.logps(asked, [writer.encode(reply) for reply in replies])
    return torch.where(mask, logs, 0.0).sum(1).cpu()


def critiques(row: Judged) -> tuple[str, str]:
    """What the table says about the chosen and the rejected sample; DataError where it says nothing."""
    found = [row.prompt.metadata.get(f"{side}_critique") for side in PAIR]
    for side, text in zip(PAIR, found, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{row.prompt.where}: method cold needs a text under "{side}_critique", given {text!r:.40}')
    return str(found[0]), str(found[1])
