"""Selection and order of a run's charts, with one sentence each on how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from align.report.changes import PARTS, comparable, members, relation, score_name, trained_on_gold
from align.report.charts import Chart, Series, Value, thin
from align.report.intervals import t95
from align.report.reading import Run, number

SHOWN = {
    *("event", "step", "seconds", "reward", "reward_std", "missing", "zero_variance_groups", "loss", "grad_norm", "lr"),
    *("kl_velocity", "contrast", "ratio", "diversity", "images_per_second", "network_calls", "time", "samples"),
    "memory_gb",
}
"""Train rows' names with their own place; whatever else a recipe logs is drawn after them."""
PHASES = ("rollout", "decode", "reward", "update", "other")
SHARED_SCALE = 0.25
"""Two scores share an axis if each of them fills at least this part of it."""


@dataclass(frozen=True)
class Figure:
    """A card of the page: one chart, or several above each other that share their steps."""

    title: str
    note: str
    charts: list[Chart]
    lead: bool = False

    @property
    def numbers(self) -> Chart:
        """All curves of the card, for its table."""
        return replace(self.charts[0], series=[series for chart in self.charts for series in chart.series])


@dataclass(frozen=True)
class Section:
    """A heading with its cards; ``folded`` on a phone, until it is opened."""

    title: str
    note: str
    figures: list[Figure] = field(default_factory=list)
    folded: bool = False


def sections(run: Run) -> list[Section]:
    """Everything there is to draw; empty cards and sections are left out."""
    held_out, trained = bool(run.score_names()), bool(run.train)
    shown = (
        "Held-out prompts and training, "
        if held_out and trained
        else "Held-out prompts, "
        if held_out
        else "Training, "
    )
    found = [
        Section("Does it get better?", f"{shown}by training step.", _progress(run)),
        Section("Is it healthy?", "What to look at when the scores do not rise.", _health(run), folded=True),
        Section("Where does the time go?", "By training step.", _speed(run), folded=True),
    ]
    return [section for section in found if section.figures]


def _figure(chart: Chart) -> list[Figure]:
    return [Figure(chart.title, chart.note, [thin(chart)])] if chart else []


def _series(run: Run, key: str, name: str, tone: str = "ink", spread: str | None = None) -> Series:
    x, y = run.curve(key)
    return Series(name, x, y, run.curve(spread)[1] if spread else None, tone)


def _simple(run: Run, key: str, title: str, note: str, reference: float | None = None, unit: str = "") -> list[Figure]:
    return _figure(Chart(title, note, [_series(run, key, title.lower())], reference=reference, unit=unit))


def _progress(run: Run) -> list[Figure]:
    reward = Chart(
        "Training reward",
        _reward_note(run),
        [replace(_series(run, "reward", "reward", "reward", "reward_std"), within=run.limits("reward"))],
        band="std",
        unit="score",
    )
    return [*_held_out(run), *_figure(reward), *_diversity(run), *_parts(run), *_other_scores(run)]


def _reward_note(run: Run) -> str:
    note = "Mean of each batch; the band is the standard deviation of its samples."
    return note if comparable(run) else f"{note} It is normalised within groups or batches, so its mean cannot rise."


def _held_out(run: Run) -> list[Figure]:
    """Gold beside the trained reward, or beside its parts: on one scale if they fit, else above each other."""
    gold, reward = score_name(run, "gold"), score_name(run, "reward")
    named: dict[str, tuple[str, str]] = {gold: ("gold", "gold")} if gold else {}
    if reward and comparable(run) and not trained_on_gold(run):
        named[reward] = ("trained reward", "reward")
    if not comparable(run):
        found = [name for name in members(run) if name not in named]
        named |= {name: (_weighted(run, name.removeprefix(PARTS)), f"c{i % 5}") for i, name in enumerate(found)}
    series = [_score(run, name, tone, label) for name, (label, tone) in named.items()]
    series = [one for one in series if one.last is not None]
    if not series:
        return []
    charts = [_held_out_chart(series)] if _same_scale(series) else [_held_out_chart([one]) for one in series]
    return [Figure("Held-out scores", _held_out_note(run, named), [thin(chart) for chart in charts], lead=True)]


def _held_out_note(run: Run, named: Iterable[str]) -> str:
    counts = {number(row.get("prompts")) for row in run.evals}
    words = (
        ["Means over the same prompts, with the same noise each time."] if len(counts) == 1 else ["Means over prompts."]
    )
    if any(value for name in named for value in run.held_out(name, "stderr")[1]):
        words.append("Bands are 95 % intervals of each mean.")
    gold = score_name(run, "gold")
    if gold and "reward" in named and relation(run, gold) in ("other", "unknown"):
        words.append("If the reward rises and gold does not, that is reward hacking.")
    return " ".join(words)


def _held_out_chart(series: list[Series]) -> Chart:
    return Chart(" and ".join(one.name for one in series), "", series, band="95 %", unit="score")


def _score(run: Run, name: str, tone: str, label: str | None = None) -> Series:
    x, y = run.held_out(name)
    stderr = run.held_out(name, "stderr")[1]
    counts = [number(row.get("prompts")) for row in run.evals]
    reach = [t95(None if count is None else count - 1) for count in counts]
    spread = None if all(value is None for value in stderr) else _scaled(stderr, reach)
    return Series(label or name, x, y, spread, tone, run.limits(name))


def _scaled(stderr: Sequence[Value], reach: Sequence[float]) -> list[Value]:
    return [None if error is None else times * error for error, times in zip(stderr, reach, strict=True)]


def _same_scale(series: Sequence[Series]) -> bool:
    limits = [one.limits() for one in series]
    whole = max(map(max, limits)) - min(map(min, limits))
    return len(series) == 1 or all(max(one) - min(one) >= SHARED_SCALE * whole for one in limits)


def _diversity(run: Run) -> list[Figure]:
    held_out = [(row["step"], row.get("diversity")) for row in run.evals if row.get("diversity") is not None]
    training = _series(run, "diversity", "training")
    series, where = [], []
    if training.last is not None:
        series.append(training)
        where.append("in training between the samples of a prompt")
    if held_out:
        series.append(Series("held out", [s for s, _ in held_out], [d for _, d in held_out], tone="calm"))
        where.append("held out between prompts")
    note = f"Standard deviation of pixels, {', '.join(where)}. If it falls to near zero, the policy has collapsed."
    return _figure(Chart("Diversity", note, series, unit="pixel value, 0 to 1")) if series else []


def _parts(run: Run) -> list[Figure]:
    names = sorted({key for row in run.train for key in row if key.startswith("reward/")})
    series = [
        _series(run, name, _weighted(run, name.removeprefix("reward/")), f"c{i % 5}") for i, name in enumerate(names)
    ]
    note = "Other values that the reward reports for each sample, as means."
    if run.kind_of("reward") == "mixture":
        note = "Means of the mixture's members and of their parts, before normalisation and weighting."
    return _figure(Chart("Parts of the reward", note, series, unit="score")) if len(series) > 1 else []


def _weighted(run: Run, name: str) -> str:
    """A part's name, with its weight where it is a member of a mixture."""
    parts = run.section("reward").get("parts")
    member = parts.get(name) if isinstance(parts, dict) else None
    if not isinstance(member, dict):
        return name
    gate = number(member.get("gate"))
    return f"{name} (weight {number(member.get('weight')) or 0:g})" if gate is None else f"{name} (gate at {gate:g})"


RELATIONS = {
    "trained": "The trained reward itself.",
    "part": "A part of the trained reward.",
    "other": "Not trained on.",
    "unknown": "Held out.",
}


def _other_scores(run: Run) -> list[Figure]:
    """Held-out scores without a place in the large chart, each with its relation to the training."""
    shown = {score_name(run, "gold"), "reward", *(members(run) if not comparable(run) else ())}
    figures = []
    for name in (name for name in run.score_names() if name not in shown):
        one = _score(run, name, "calm")
        band = " The band is the 95 % interval of the mean." if any(one.spread or ()) else ""
        note = RELATIONS[relation(run, name)] + band
        figures += _figure(Chart(f"Held out: {name}", note, [one], band="95 %", unit="score"))
    return figures


def _health(run: Run) -> list[Figure]:
    return [
        *_simple(
            run, "kl_velocity", "KL in velocity", "Mean squared distance of the policy's velocity from the base's."
        ),
        *_simple(run, "contrast", "Contrast", _contrast_note(run)),
        *_simple(
            run, "ratio", "Ratio", "In the first chunk of a step; 1 where the policy made the samples.", reference=1.0
        ),
        *_flat_groups(run),
        *_simple(run, "loss", "Loss", "A lower loss does not mean better samples."),
        *_simple(run, "grad_norm", "Gradient norm", "Before clipping, the mean over the optimizer steps."),
        *(
            _simple(
                run, "missing", "Missing scores", "Samples without a score; training left them out.", unit="samples"
            )
            if _any(run)
            else []
        ),
        *_others(run),
    ]


def _contrast_note(run: Run) -> str:
    """The velocity that the policy's is compared with: it depends on the recipe."""
    online = run.section("rollout").get("kind", "online") == "online"
    if run.kind("recipe") == "flow_dpo":
        other = "the reference's"
    elif online and run.kind("recipe") in ("nft", "grpo", "flow_rwr"):
        other = "that of the policy that made the samples"
    else:
        other = "the old policy's"
    return f"Mean squared distance of the policy's velocity from {other}."


def _others(run: Run) -> list[Figure]:
    names = dict.fromkeys(key for row in run.train for key in row if key not in SHOWN and not key.startswith("reward/"))
    return [card for name in names for card in _simple(run, name, name.replace("_", " "), _logged_by(name))]


def _logged_by(name: str) -> str:
    return "Logged by the training of the reward." if name.startswith("refresh/") else "Logged in training."


def _flat_groups(run: Run) -> list[Figure]:
    whole = f"Share of the {run.groups} groups" if run.groups else "Number of groups"
    note = f"{whole} in which no two samples scored differently."
    unit = "share" if run.groups else "groups"
    series = Series("groups without contrast", *run.flat_groups(), within=(0.0, math.inf))
    return _figure(Chart("Groups without contrast", note, [series], unit=unit))


def _any(run: Run) -> bool:
    return any(run.curve("missing")[1])


def _speed(run: Run) -> list[Figure]:
    phases = [Series(phase, *run.curve("time", phase), tone=f"c{i}") for i, phase in enumerate(PHASES)]
    known = [series for series in phases if series.last is not None]
    times = Chart("Time by phase", "Seconds of each training step, stacked.", known, stacked=True, unit="seconds")
    return [
        *(_figure(times) if known else []),
        *_simple(run, "images_per_second", "Throughput", "Samples per second of the whole step.", unit="samples / s"),
        *_simple(run, "lr", "Learning rate", "Mean over the optimizer steps of a training step."),
    ]
