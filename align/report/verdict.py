"""What a run achieved, in numbers and in words, and what to distrust about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from align.report.charts import MINUS, short
from align.report.reading import Run, number

Z95 = 1.96
MANY_FLAT_GROUPS = 0.3
"""Share of groups without differences in reward above which a run is told that it learns little."""
RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Change:
    """A held-out score before and after training, with the 95 % interval of the difference where errors are known.

    Both ends are judged on the same prompts and seeds; the interval does not use that and is on the wide side.
    """

    role: str
    name: str
    before: float
    after: float
    error: float | None

    @property
    def delta(self) -> float:
        return self.after - self.before

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.error is None:
            return None
        return self.delta - Z95 * self.error, self.delta + Z95 * self.error

    @property
    def direction(self) -> str:
        """``up`` or ``down`` where the interval excludes zero (or no error is known), else ``unsure``."""
        low, high = self.interval or (self.delta, self.delta)
        return "up" if low > 0 else "down" if high < 0 else "unsure"

    def value(self, number: float, signed: bool = False) -> str:
        """Both ends and the difference with equally many decimals."""
        top = max(abs(self.before), abs(self.after))
        decimals = min(4, max(0, 2 - math.floor(math.log10(top)))) if top else 3
        return f"{number:{'+' if signed else ''},.{decimals}f}".replace("-", MINUS)


@dataclass(frozen=True)
class Verdict:
    """``tone`` is ``good``, ``bad`` or ``calm``."""

    tone: str
    sentence: str
    detail: str
    warnings: list[tuple[str, str]]


def score_name(run: Run, role: str) -> str | None:
    """The held-out score that plays a role: what ``evaluate.gold`` names, or ``reward``, what was trained on."""
    name = (run.section("evaluate").get("gold") or "gold") if role == "gold" else "reward"
    return name if name in run.score_names() else None


def trained_on_gold(run: Run) -> bool:
    """Whether the trained reward is the gold score itself: the two are equal at every evaluation."""
    gold, reward = score_name(run, "gold"), score_name(run, "reward")
    return gold is not None and reward is not None and run.held_out(gold) == run.held_out(reward)


def change(run: Run, role: str) -> Change | None:
    """Gold or reward before and after, from the summary or else from the evaluations so far."""
    name = score_name(run, role)
    values = [v for v in (run.held_out(name)[1] if name else []) if v is not None]
    errors = run.held_out(name, "stderr")[1] if name else []
    ends, spread = [], []
    for end, index in (("before", 0), ("after", -1)):
        told = number(run.summary.get(f"{role}_{end}"))
        ends.append(told if told is not None else values[index] if values else None)
        stderr = number(run.summary.get(f"{role}_{end}_stderr"))
        spread.append(stderr if stderr is not None else errors[index] if errors else None)
    if ends[0] is None or ends[1] is None:
        return None
    error = None if spread[0] is None or spread[1] is None else math.hypot(spread[0], spread[1])
    return Change(role, name or role, ends[0], ends[1], error)


def judge(run: Run) -> Verdict:
    """The verdict on a run."""
    gold, reward = change(run, "gold"), change(run, "reward")
    warnings = [w for w in (_hacking(gold, reward), _past_best(run, gold), *_training(run)) if w]
    judged = gold or reward
    if judged is None:
        words = "No held-out score yet." if run.status == "running" else "This run was not judged on held-out prompts."
        return Verdict("calm", words, _progress(run), warnings)
    subject = "Gold" if gold else "The trained reward"
    tone = {"up": "good", "down": "bad", "unsure": "calm"}[judged.direction]
    ends = f"{judged.value(judged.before)} to {judged.value(judged.after)}"
    verb = {"up": "rose from", "down": "fell from", "unsure": "shows no clear change:"}[judged.direction]
    if gold and reward and gold.direction != "up" and reward.delta > 0 and reward.direction == "up":
        tone = "bad"
        sentence = f"The trained reward rose, but gold {verb} {ends}."
    else:
        sentence = f"{subject} {verb} {ends}."
    detail = [_certainty(judged), _watch(run, gold), _progress(run)]
    return Verdict(tone, sentence, " ".join(part for part in detail if part), warnings)


def _watch(run: Run, gold: Change | None) -> str:
    if gold is None:
        return "No gold score watched over it."
    return "The run trained on gold itself, so gold cannot show reward hacking." if trained_on_gold(run) else ""


def _certainty(judged: Change) -> str:
    if judged.interval is None:
        return "How certain the change is cannot be said: standard errors are missing."
    low, high = (judged.value(end, signed=True) for end in judged.interval)
    chance = "which includes no change at all" if judged.direction == "unsure" else "more than chance explains"
    subject = "Gold" if judged.role == "gold" else "It"
    amount = judged.value(judged.delta, signed=True)
    return f"{subject} changed by {amount}, between {low} and {high} with 95 % confidence: {chance}."


def _progress(run: Run) -> str:
    if run.status == "running":
        planned = number(run.section("train").get("steps"))
        return f"The run is still going: {run.steps:,} {f'of {planned:,} ' if planned else ''}steps so far."
    return f"The run was interrupted after {run.steps:,} steps." if run.status == "interrupted" else ""


def _hacking(gold: Change | None, reward: Change | None) -> tuple[str, str] | None:
    if gold is None or reward is None or reward.delta <= 0 or gold.delta >= 0:
        return None
    sure = gold.direction == "down" and reward.direction == "up"
    title = "Reward hacking" if sure else "Possible reward hacking"
    return title, (
        f"The trained reward went up ({reward.value(reward.delta, True)}) while gold went down "
        f"({gold.value(gold.delta, True)}{'' if sure else ', within noise'}). The policy found what the reward likes, "
        "not what was wanted. Stop earlier, pull harder to the base (kl), or mix in a second reward."
    )


def _past_best(run: Run, gold: Change | None) -> tuple[str, str] | None:
    if gold is None or gold.name not in run.score_names():
        return None
    steps, values = run.held_out(gold.name)
    known = [(value, step) for step, value in zip(steps, values, strict=True) if value is not None]
    best, step = max(known)
    noise = (gold.error or 0.0) * Z95
    if step == known[-1][1] or step == known[0][1] or best - gold.after <= max(noise, 1e-9):
        return None
    return "Past its best", (
        f"Gold was best at step {step:,.0f} ({gold.value(best)}) and is lower now ({gold.value(gold.after)}). "
        "A shorter run would have kept the better policy."
    )


def _training(run: Run) -> list[tuple[str, str]]:
    warnings = []
    flat = [value for value in run.flat_groups()[1] if value is not None]
    share = sum(flat) / len(flat) if flat else 0.0
    if run.groups and share > MANY_FLAT_GROUPS:
        warnings.append(
            (
                "Many groups without contrast",
                f"In {share:.0%} of the groups all samples scored alike, so they taught nothing. "
                "Use more samples per group, more varied prompts or a finer reward.",
            )
        )
    ratio = next((value for value in run.curve("ratio")[1] if value is not None), None)
    if ratio is not None and abs(ratio - 1) > RATIO_TOLERANCE:
        warnings.append(
            (
                "Off policy from the start",
                f"The first ratio is {short(ratio, 5)} where it must be 1: the log-probabilities of the rollout and "
                "of the update disagree. Look for a different precision, guidance or dropout between the two.",
            )
        )
    return [*warnings, *_missing(run)]


def _missing(run: Run) -> list[tuple[str, str]]:
    steps, missing = run.curve("missing")
    lost = [value for value in missing if value]
    held_out = {name: [v for v in run.held_out(name, "missing")[1] if v] for name in run.score_names()}
    words = []
    if lost:
        words.append(f"in {len(lost):,} of {len(steps):,} training steps ({short(sum(lost))} in all)")
    words += [f"for {name} in {len(v)} of {len(run.evals)} evaluations" for name, v in held_out.items() if v]
    if not words:
        return []
    return [("Scores were missing", f"{' and '.join(words).capitalize()}. Their samples had weight 0.")]
