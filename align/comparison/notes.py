"""The text of a comparison: the result in a sentence, and reasons why values could not be compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from align.comparison.arms import Arm
from align.comparison.entries import Entry, Notes
from align.comparison.matching import Difference, difference, incomparable, same_noise, sampler_of
from align.report.charts import short
from align.report.reading import number
from align.report.warnings import hacked
from alignflow.words import listing

ALIKE = 1e-6
"""Largest difference of the base model's scores on equal noise that rounding explains."""


def ranked(arms: Sequence[Arm], name: str) -> list[Arm]:
    """The settings that have a score, the highest first."""
    ends = {arm.label: result_mean(arm, name) for arm in arms}
    known = [arm for arm in arms if ends[arm.label] is not None]
    return sorted(known, key=lambda arm: -(ends[arm.label] or 0.0))


def result_mean(arm: Arm, name: str) -> float | None:
    """The final mean of a score over all runs of a setting."""
    found = [one.mean(name) for one in arm.entries]
    values = [one.value for one in found if one is not None]
    return sum(values) / len(values) if values else None


def called(name: str) -> str:
    """A score at the beginning of a sentence."""
    return {"gold": "Gold", "reward": "The reward"}.get(name, name)


def verdict(arms: Sequence[Arm], name: str | None) -> tuple[str, str, str]:
    """Tone, sentence and detail: the setting with the highest score against the one that follows it."""
    if name is None:
        return "calm", "No held-out score can be compared.", "The curves below are all that these runs have in common."
    order = ranked(arms, name)
    found = next((one for arm in order[1:] if not isinstance(one := difference(arm, order[0], name), str)), None)
    if found is None:
        return "calm", f"{called(name)} can be compared between some settings, but not for the highest one.", ""
    change, best, next_best = found.main, found.second.label, found.first.label
    ends = change.value(change.after), change.value(change.before)
    if change.direction == "up":
        verb = "is higher" if len(arms) == 2 else "is highest"
        sentence = f"{called(name)} {verb} with {best}: {ends[0]} against {ends[1]} with {next_best}."
    elif change.direction == "same":
        sentence = f"{called(name)} is the same with {best} and {next_best}: {ends[0]}."
    else:
        sentence = f"{called(name)} shows no clear difference between {best} ({ends[0]}) and {next_best} ({ends[1]})."
    return ("good" if change.direction == "up" else "calm"), sentence, _certainty(found)


def _certainty(found: Difference) -> str:
    change = found.main
    amount = change.value(change.delta, signed=True)
    if change.direction == "same":
        return ""
    if change.interval is None:
        return f"The difference is {amount}; it has no interval."
    low, high = (change.value(end, signed=True) for end in change.interval)
    if found.seeds is None:
        over = f"over {found.prompts.pairs:,} prompts ({found.how})" if found.prompts.pairs else f"from {found.how}"
        note = " There is one run of each, so the interval does not include the variation between seeds."
        note = note if len(found.first.entries) == len(found.second.entries) == 1 else ""
    else:
        over = f"over {len(found.first.entries)} seeds" if found.paired_seeds else "over the seeds of both"
        note = ""
    return f"The difference is {amount}, with a 95 % interval of {low} to {high} {over}.{note}"


def notes_of(arms: Sequence[Arm], entries: Sequence[Entry]) -> Notes:
    """Title and text of everything that limits the comparison, each once."""
    found = [*_unfinished(arms, entries), *_unevaluated(entries), *_other_rewards(arms), *_other_samplers(arms)]
    found += [*_noise(arms), *_bases(arms), *_hacked(entries)]
    return list(dict.fromkeys(found))


def _unfinished(arms: Sequence[Arm], entries: Sequence[Entry]) -> Notes:
    left = {id(one) for arm in arms for one in arm.left_out}
    notes = Notes()
    for one in entries:
        if one.status == "finished":
            continue
        how = "was interrupted" if one.status == "interrupted" else "is not finished"
        planned = number(one.section("train").get("steps"))
        done = f" ({one.run.steps:,} of {planned:,} steps)" if one.run and planned else ""
        effect = "it is left out of the means over the seeds" if id(one) in left else "its last evaluation counts"
        effect = "its results so far count" if one.kind != "training run" else effect
        notes.append(("Not finished", f"{one.name} {how}{done}; {effect}."))
    return notes


def _unevaluated(entries: Sequence[Entry]) -> Notes:
    notes = Notes()
    for one in entries:
        if not one.names():
            notes.append(
                ("Not evaluated", f"{one.name} has no held-out scores; only its curves and costs are compared.")
            )
        elif not one.after and one.run and len(one.run.evals) == 1 and one.run.evals[0]["step"] == 0:
            notes.append(
                ("Not evaluated", f"{one.name} was evaluated only before training, so its score is that of the base.")
            )
        elif not one.after:
            text = f"{one.name} kept no scores by prompt, so its intervals come from the means alone."
            notes.append(("No scores by prompt", text))
    return notes


def _other_rewards(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    """For every score, reasons why later settings cannot be compared with the first setting that has it."""
    for name in dict.fromkeys(name for arm in arms for name in arm.first.names()):
        having = [arm for arm in arms if arm.first.mean(name) is not None]
        lacking = [arm.label for arm in arms if arm not in having and arm.first.names()]
        if lacking:
            yield "Missing score", f"{listing(lacking)}: no held-out score called {name}."
        for arm in having[1:]:
            reason = incomparable(having[0], arm, name)
            found = reason or difference(having[0], arm, name)
            if isinstance(found, str):
                yield "Not comparable", f"{found[0].upper()}{found[1:]}."


def _other_samplers(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    first = arms[0].first
    for arm in arms[1:]:
        if arm.first.kind == first.kind and sampler_of(arm.first) != sampler_of(first):
            text = (
                f"{arm.label} and {arms[0].label} were evaluated with different samplers; a part of every difference "
            )
            yield "Other sampler", f"{text}between them comes from the samplers."


def _noise(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    first = arms[0]
    for arm in arms[1:]:
        told = f"{first.label} and {arm.label}"
        if not same_noise(first.first, arm.first):
            yield "Other generator", f"{told} have different generators or sizes, so equal seeds are not equal noise."
        elif first.first.after and arm.first.after and not (first.first.after.keys() & arm.first.after.keys()):
            why = "other evaluation seeds, other prompts or another kind of run"
            yield "Other noise", f"{told}: no prompt has the same noise in both ({why})."


def _bases(arms: Sequence[Arm]) -> Iterator[tuple[str, str]]:
    """Scores of the base must agree where generator, sampler, prompts and noise do."""
    first = arms[0].first
    for arm in arms[1:]:
        one = arm.first
        if not same_noise(first, one) or sampler_of(first) != sampler_of(one):
            continue
        for name in first.names():
            a, b = first.known(name, "before"), one.known(name, "before")
            apart = [abs(a[key] - b[key]) for key in a if key in b]
            if apart and max(apart) > ALIKE and first.reward_of(name) == one.reward_of(name):
                share = sum(value > ALIKE for value in apart) / len(apart)
                text = (
                    f"{arms[0].label} and {arm.label} begin with different {name} scores of the base for {share:.0%} "
                )
                text += f"of the prompts (by up to {short(max(apart))}): other weights, software or devices."
                yield "Other base", text
                break


def _hacked(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    for one in entries:
        if one.run and (told := hacked(one.run)):
            yield "Reward hacking", f"{one.name}: {told}"
