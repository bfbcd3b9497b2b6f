"""Curves of all settings on common axes: means over the seeds, with their 95 % intervals where there are several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from align.comparison.arms import Arm
from align.comparison.entries import Entry
from align.comparison.matching import incomparable
from align.report.budget_curves import AXES, best_so_far, mean_curve
from align.report.charts import Chart, Series, Value, thin
from align.report.figures import SHOWN, Figure, Section
from align.report.intervals import mean, standard_error, t95
from align.report.reading import Curve, Run, number

BY_STEP = {
    "kl_velocity": ("KL in velocity", "Mean squared distance of the policy's velocity from the base's.", ""),
    "contrast": ("Contrast", "Mean squared distance of the policy's velocity from the old policy's.", ""),
    "diversity": ("Diversity", "Standard deviation of pixels between the samples of a prompt.", "pixel value, 0 to 1"),
    "ratio": ("Ratio", "In the first chunk of a step; 1 where the policy made the samples.", ""),
    "grad_norm": ("Gradient norm", "Before clipping, the mean over the optimizer steps.", ""),
    "missing": ("Missing scores", "Samples without a score; training left them out.", "samples"),
    "images_per_second": ("Throughput", "Samples per second of the whole step.", "samples / s"),
    "lr": ("Learning rate", "Mean over the optimizer steps of a training step.", ""),
}
"""Columns of the train rows that mean the same for every recipe: title, note, unit."""
OF_A_RECIPE = ("loss",)
"""Columns that are compared between runs of one recipe alone."""
POINTS = 48
COSTS = {"network_calls": ("training network calls", "network calls"), "seconds": ("training seconds", "seconds")}


def sections(arms: Sequence[Arm], names: Sequence[str]) -> list[Section]:
    """Everything that two settings or more have; empty cards and sections are left out.

    Args:
        names: held-out scores that can be compared, the judging one first.
    """
    seeds = any(len(arm.entries) > 1 for arm in arms)
    bands = " Lines are means over the seeds, bands their 95 % intervals." if seeds else ""
    trained = [arm for arm in arms if arm.first.run]
    searched = [arm for arm in arms if arm.first.rows]
    held_out = [card for place, name in enumerate(names) for card in _held_out(trained, name, not place)]
    by_cost = [card for axis in COSTS for name in names[:1] for card in _by_cost(trained, name, axis)]
    found = [
        Section("Held-out scores", f"Means over the held-out prompts.{bands}", [*held_out, *by_cost]),
        Section("Training", f"By training step.{bands}", _training(trained), folded=True),
        Section("Reward and budget", "Best reward so far against each cost of a prompt.", _searches(searched)),
    ]
    return [section for section in found if section.figures]


def _figure(
    title: str, note: str, series: list[Series], axis: str = "step", unit: str = "", lead: bool = False
) -> list[Figure]:
    """A card, if there are two curves or more to compare."""
    known = [one for one in series if one.last is not None]
    if len(known) < 2:
        return []
    chart = Chart(title, note, known, band="95 %", axis=axis, unit=unit)
    return [Figure(title, note, [thin(chart)], lead=lead)]


def _held_out(arms: Sequence[Arm], name: str, lead: bool) -> list[Figure]:
    same = [arm for arm in arms if not incomparable(arms[0], arm, name)] if arms else []
    series = [joined(arm, lambda one: one.held_out(name)) for arm in same]
    limits = [arm.first.run.limits(name) for arm in same if arm.first.run]
    series = [replace(one, within=within) for one, within in zip(series, limits, strict=True)]
    return _figure(f"Held out: {name}", "", series, unit="score", lead=lead)


def _by_cost(arms: Sequence[Arm], name: str, axis: str) -> list[Figure]:
    same = [arm for arm in arms if not incomparable(arms[0], arm, name)] if arms else []
    label, unit = COSTS[axis]
    series = []
    for arm in same:
        scores, spent = (joined(arm, curve) for curve in (lambda one: one.held_out(name), _spent(axis)))
        known = [(x, y) for x, y in zip(spent.y, scores.y, strict=True) if x is not None]
        series.append(Series(arm.label, [x for x, _ in known], [y for _, y in known], tone=arm.tone))
    note = f"The same scores against the {unit} of the training steps until then, without evaluations."
    return _figure(f"{name} against {unit}", note, series, axis=label, unit="score")


def _spent(axis: str) -> Callable[[Run], Curve]:
    """Cost of training until each evaluation."""

    def curve(run: Run) -> Curve:
        steps = [row["step"] for row in run.evals]
        if axis == "seconds":
            clock = {row["step"]: number(row.get("seconds")) for row in run.train}
            return steps, [0.0 if step == 0 else clock.get(step) for step in steps]
        calls = [(row["step"], number(row.get("network_calls")) or 0.0) for row in run.train]
        return steps, [sum(count for step, count in calls if step <= here) for here in steps]

    return curve


def _training(arms: Sequence[Arm]) -> list[Figure]:
    rewarded = [arm for arm in arms if arms[0].first.config.get("reward") == arm.first.config.get("reward")]
    note = "Mean of each batch." if len(rewarded) == len(arms) else "Mean of each batch, of the runs with this reward."
    found = _figure("Training reward", note, [_column(arm, "reward") for arm in rewarded], unit="score")
    found += _figure("Groups without contrast", "Groups in which no two samples scored differently, as a share.",
                     [replace(joined(arm, lambda run: run.flat_groups()), within=(0.0, 1.0)) for arm in arms],
                     unit="share")  # fmt: skip
    for key, (title, told, unit) in BY_STEP.items():
        series = [replace(_column(arm, key), within=(0.0, math.inf)) for arm in arms]  # none of them is below 0
        if key == "missing" and not any(value for one in series for value in one.y):
            continue
        found += _figure(title, told, series, unit=unit)
    same = [arm for arm in arms if arms[0].first.run and arm.first.run and _recipe(arm) == _recipe(arms[0])]
    for key in OF_A_RECIPE:
        found += _figure("Loss", "Of the runs of one recipe.", [_column(arm, key) for arm in same])
    others = dict.fromkeys(key for arm in arms for key in _columns(arm.first) if key not in SHOWN)
    for key in others:
        found += _figure(key.replace("_", " "), "Logged in training.", [_column(arm, key) for arm in arms])
    return found


def _recipe(arm: Arm) -> str:
    return arm.first.run.kind("recipe") if arm.first.run else ""


def _columns(entry: Entry) -> list[str]:
    return list(dict.fromkeys(key for row in (entry.run.train if entry.run else ()) for key in row))


def _column(arm: Arm, key: str) -> Series:
    return joined(arm, lambda run: run.curve(key))


def joined(arm: Arm, curve: Callable[[Run], Curve]) -> Series:
    """One curve of a setting: the mean over its runs at the steps that all of them have, and its 95 % interval."""
    curves = [dict(zip(*curve(one.run), strict=True)) for one in arm.entries if one.run]
    steps = [step for step in curves[0] if all(step in one for one in curves)] if curves else []
    means: list[Value] = []
    spread: list[Value] = []
    for step in steps:
        known = [value for one in curves if (value := one[step]) is not None]
        means.append(mean(known) if known else None)
        error = standard_error(known)
        spread.append(None if error is None else t95(len(known) - 1) * error)
    return Series(arm.label, steps, means, spread if len(curves) > 1 else None, arm.tone)


def _searches(arms: Sequence[Arm]) -> list[Figure]:
    found: list[Figure] = []
    for name, label in AXES.items():
        series = []
        for arm in (arm for arm in arms if arms[0].first.reward_of("reward") == arm.first.reward_of("reward")):
            curves = [best_so_far(row) for row in arm.first.rows if row["kept"]]
            x, y = mean_curve([one for one in curves if one and all(name in point for point in one)], name)
            series.append(Series(arm.label, x, y, tone=arm.tone, stepped=True))
        note = "Best reward so far, the plain sample included, mean over prompts."
        found += _figure(f"Reward against {label}", note, [one for one in series if one.x], label, "reward", not found)
    return found
