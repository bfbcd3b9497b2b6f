"""Differences between two settings, on the same prompts and noise if shared, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from align.comparison.arms import Arm
from align.comparison.entries import Entry
from align.report.changes import Change
from align.report.intervals import difference as independent
from align.runs.identity import changes
from alignflow.words import brief

Pairing = Literal["noise", "prompt", "none"]
PAIRED = {
    "noise": "the same prompts and noise",
    "prompt": "the same prompts, other noise",
    "none": "the two means alone, since no prompts could be paired",
}


@dataclass(frozen=True)
class Difference:
    """One score of two settings.

    Args:
        prompts: the second minus the first over the prompts, each the mean over the seeds.
        pairing: what the two have in common prompt by prompt.
        seeds: the same over the seeds; None with a single run on one side.
        paired_seeds: whether ``seeds`` compares equal seeds with each other.
    """

    first: Arm
    second: Arm
    prompts: Change
    pairing: Pairing
    seeds: Change | None = None
    paired_seeds: bool = False

    @property
    def main(self) -> Change:
        """The change that the comparison judges by: over the seeds where both settings have several."""
        return self.seeds or self.prompts

    @property
    def how(self) -> str:
        """How the prompts were compared, in words."""
        return PAIRED[self.pairing]


def difference(first: Arm, second: Arm, name: str) -> Difference | str:
    """A score of two settings at the end of their runs; or a sentence on why it cannot be compared."""
    if reason := incomparable(first, second, name):
        return reason
    found = _over_prompts(first, second, name)
    if isinstance(found, str):
        return found
    change, pairing = found
    seeds, paired = _over_seeds(first, second, name)
    return Difference(first, second, change, pairing, seeds, paired)


def incomparable(first: Arm, second: Arm, name: str) -> str:
    """The reason why a score of two settings is not the same measurement on any prompt; empty if it is."""
    for arm in (first, second):
        if not arm.first.names():
            return f"{arm.label} was not evaluated on held-out prompts"
        if arm.first.mean(name) is None:
            return f"{arm.label} has no held-out score called {name}"
    a, b = first.first.reward_of(name), second.first.reward_of(name)
    if a is None or b is None:
        without = first if a is None else second
        return f"the config of {without.label} does not define the reward {name}"
    if a != b:
        return f"{name} is another reward in {second.label} than in {first.label} ({_first_change(a, b)})"
    return ""


def _first_change(a: dict[str, Any], b: dict[str, Any]) -> str:
    key, (then, now) = next(iter(changes(a, b).items()))
    return f"{key}: {brief(now)}, not {brief(then)}"


def _over_prompts(first: Arm, second: Arm, name: str) -> tuple[Change, Pairing] | str:
    a, b = first.known(name), second.known(name)
    role = "gold" if name == first.first.judged else "other"
    limits = first.first.run.limits(name) if first.first.run else (-float("inf"), float("inf"))
    shared = [key for key in a if key in b]
    if shared and same_noise(first.first, second.first):
        return Change.of_pairs(role, name, [(a[key], b[key]) for key in shared], limits=limits), "noise"
    texts = _by_text(a), _by_text(b)
    if common := [text for text in texts[0] if text in texts[1]]:
        pairs = [(texts[0][text], texts[1][text]) for text in common]
        return Change.of_pairs(role, name, pairs, limits=limits), "prompt"
    if prompts_of(first.first) != prompts_of(second.first):
        return f"{first.label} and {second.label} have no held-out prompt in common"
    return _from_means(role, name, first, second, limits), "none"


def _from_means(role: str, name: str, first: Arm, second: Arm, limits: tuple[float, float]) -> Change:
    a, b = list(first.known(name).values()), list(second.known(name).values())
    if a and b:
        error, freedom = independent(a, b)
        return Change(role, name, fmean(a), fmean(b), error, None, limits=limits, freedom=freedom)
    means = [arm.first.mean(name) for arm in (first, second)]
    one, two = means
    assert one is not None
    assert two is not None
    known = one.error is not None and two.error is not None
    error = (one.error**2 + two.error**2) ** 0.5 if known else None  # type: ignore[operator]
    return Change(role, name, one.value, two.value, error, None, limits=limits)


def _by_text(values: dict[tuple[str, str], float]) -> dict[str, float]:
    """A prompt counts once, by the mean of its samples."""
    found: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        found.setdefault(prompt, []).append(value)
    return {prompt: fmean(several) for prompt, several in found.items()}


def _over_seeds(first: Arm, second: Arm, name: str) -> tuple[Change | None, bool]:
    """By seed where both have the same seeds, else as independent runs; None with one run on a side."""
    ends = [seed_means(arm, name) for arm in (first, second)]
    a, b = ends
    if min(len(a), len(b)) < 2:
        return None, False
    if a.keys() == b.keys():
        return Change.of_pairs("gold", name, [(a[seed], b[seed]) for seed in a]), True
    error, freedom = independent(list(a.values()), list(b.values()))
    return Change("gold", name, fmean(a.values()), fmean(b.values()), error, None, freedom=freedom), False


def seed_means(arm: Arm, name: str) -> dict[int | None, float]:
    """The final mean of a score with each seed."""
    found = {one.seed: one.mean(name) for one in arm.entries}
    return {seed: value.value for seed, value in found.items() if value is not None}


def result(arm: Arm, name: str) -> Change | None:
    """A score of one setting before and after: over the seeds where it has several, else over the prompts."""
    ends = [(one.mean(name, "before"), one.mean(name)) for one in arm.entries]
    known = [(before.value, after.value) for before, after in ends if before is not None and after is not None]
    role = "gold" if name == arm.first.judged else "other"
    if len(arm.entries) > 1 and len(known) == len(arm.entries):
        return Change.of_pairs(role, name, known)
    before, after = arm.first.known(name, "before"), arm.first.known(name)
    if pairs := [(before[key], after[key]) for key in before if key in after]:
        return Change.of_pairs(role, name, pairs)
    return Change(role, name, *known[0], None) if known else None


def same_noise(first: Entry, second: Entry) -> bool:
    """Whether equal seeds are equal noise: the same generator at the same size."""
    return _drawn_by(first) == _drawn_by(second)


def _drawn_by(entry: Entry) -> tuple[Any, ...]:
    generator = entry.section("generator")
    size = entry.section("evaluate").get("size") or generator.get("size")
    return generator.get("kind"), generator.get("path"), str(size)


def prompts_of(entry: Entry) -> Any:
    """Source of the prompts of the result."""
    if entry.kind == "benchmark":
        return entry.config.get("set")
    prompts = entry.section("prompts")
    return prompts.get("source") if entry.kind == "search" else prompts.get("heldout")


def sampler_of(entry: Entry) -> Any:
    """The sampler of the result."""
    return entry.section("search" if entry.kind == "search" else "evaluate").get("sampler")


def shared_scores(arms: Sequence[Arm]) -> list[str]:
    """Scores that two settings or more can be compared by, the judging one first; of equal numbers the first."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.first.names()))
    judged = next((arm.first.judged for arm in arms if arm.first.judged), None)
    names.sort(key=lambda name: name != judged)
    pairs = [(a, b) for place, a in enumerate(arms) for b in arms[place + 1 :]]
    found = [name for name in names if any(not isinstance(difference(a, b, name), str) for a, b in pairs)]
    numbers = [[(arm.known(name), arm.first.mean(name)) for arm in arms] for name in found]
    return [name for place, name in enumerate(found) if numbers[place] not in numbers[:place]]
