"""Verdict on a run and its caveats in words. Every sentence is computed from the run's own files."""

from __future__ import annotations

from dataclasses import dataclass

from align.report.changes import Change, change, change_of, comparable, members, relation, trained_on_gold
from align.report.reading import Run, number
from align.report.warnings import warnings


@dataclass(frozen=True)
class Verdict:
    """``tone`` is ``good``, ``bad`` or ``calm``."""

    tone: str
    sentence: str
    detail: str
    warnings: list[tuple[str, str]]


def changes(run: Run) -> list[Change]:
    """Scores that the head of the page compares: gold and the trained reward, or its parts if it cannot be compared."""
    gold, reward = change(run, "gold"), change(run, "reward") if comparable(run) else None
    if trained_on_gold(run):
        reward = None
    found = [one for one in (gold, reward) if one]
    if not comparable(run):
        shown = {one.name for one in found}
        found += [one for name in members(run) if name not in shown and (one := change_of(run, name))]
    return found


def judge(run: Run) -> Verdict:
    """The verdict on a run."""
    compared = changes(run)
    gold = next((one for one in compared if one.role == "gold"), None)
    reward = change(run, "reward") if comparable(run) else None
    judged = gold or reward or (compared[0] if compared else None)
    told = warnings(run, gold, reward)
    if judged is None:
        return Verdict("calm", _unjudged(run), _progress(run), told)
    tone = {"up": "good", "down": "bad"}.get(judged.direction, "calm")
    ends = f"{judged.value(judged.before)} to {judged.value(judged.after)}"
    sentence = f"{_subject(judged)} {_verb(judged)} {ends}."
    if judged.direction == "same":
        sentence = f"{_subject(judged)} did not change: {judged.value(judged.after)}."
    if gold and reward and not trained_on_gold(run) and gold.direction != "up" and reward.direction == "up":
        tone = "bad"
        sentence = f"The trained reward rose, but {sentence[0].lower()}{sentence[1:]}"
    detail = [_certainty(judged), _ends(judged), _watch(run, gold), _progress(run)]
    return Verdict(tone, sentence, " ".join(part for part in detail if part), told)


def _unjudged(run: Run) -> str:
    if len(run.evals) == 1:
        return f"Evaluated on held-out prompts once, at step {run.evals[0]['step']}: there is nothing to compare yet."
    if run.evals:
        return "No held-out score can be compared from one evaluation to the next."
    return "No held-out score yet." if run.status == "running" else "This run was not judged on held-out prompts."


def _subject(judged: Change) -> str:
    return {"gold": "Gold", "reward": "The trained reward"}.get(judged.role, judged.name)


def _verb(judged: Change) -> str:
    if judged.direction == "unsure" and judged.interval is None:
        return "went, with unknown certainty, from"
    return {"up": "rose from", "down": "fell from"}.get(judged.direction, "shows no clear change:")


def _certainty(judged: Change) -> str:
    amount = judged.value(judged.delta, signed=True)
    if judged.interval is None:
        if judged.error == 0:
            return (
                "Every prompt changed by the same amount, so there is no interval."
                if judged.pairs
                else "All prompts of an evaluation scored alike, so there is no interval."
            )
        if judged.pairs == 1:
            return "One prompt alone has no interval."
        return "The certainty of the change is unknown, because standard errors are missing."
    low, high = (judged.value(end, signed=True) for end in judged.interval)
    zero = "the interval includes zero" if judged.direction == "unsure" else "the interval excludes zero"
    how = (
        f"from the differences of {judged.pairs:,} prompts, each with the same noise before and after"
        if judged.pairs
        else "from the two means alone, since no scores by prompt were kept"
    )
    return f"It changed by {amount}, with a 95 % interval of {low} to {high} ({zero}), {how}."


def _ends(judged: Change) -> str:
    """Note if the comparison does not begin before training."""
    if judged.steps is None or judged.steps[0] == 0:
        return ""
    first, last = (f"{step:,.0f}" for step in judged.steps)
    return f"It compares step {first} with step {last}; nothing was evaluated before training."


def _watch(run: Run, gold: Change | None) -> str:
    if gold is None:
        named = run.section("evaluate").get("gold")
        return "" if named else "No gold score was named, so reward hacking would not show."
    related = relation(run, gold.name)
    if related == "trained":
        return "The run trained on gold itself, so gold cannot show reward hacking."
    if related == "part":
        return "Gold is a part of the trained reward, so it cannot show reward hacking."
    return ""


def _progress(run: Run) -> str:
    if run.status == "running":
        planned = number(run.section("train").get("steps"))
        done = f"{run.steps:,} of {planned:,} steps" if planned else f"{run.steps:,} steps"
        return f"The run had not ended when this page was written: {done}."
    return f"The run was interrupted after {run.steps:,} steps." if run.status == "interrupted" else ""


def headline(run: Run) -> str:
    """The verdict in one line, for a terminal."""
    sentence = judge(run).sentence
    shown = next(iter(changes(run)), None)
    if shown is None or shown.interval is None:
        return sentence
    low, high = (shown.value(end, signed=True) for end in shown.interval)
    return f"{sentence} 95 % interval of the change: {low} to {high}."
