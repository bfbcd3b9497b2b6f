"""Which charts a run gets, in which order, with one sentence each on how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from align.report.charts import Chart, Series, Value, thin
from align.report.reading import Run
from align.report.verdict import Z95, score_name, trained_on_gold

SHOWN = {
    *("event", "step", "seconds", "reward", "reward_std", "missing", "zero_variance_groups", "loss", "grad_norm", "lr"),
    *("kl_velocity", "contrast", "ratio", "diversity", "images_per_second", "network_calls", "time"),
}
"""Train rows' names with a place of their own; whatever else a recipe logs is drawn after them."""
PHASES = ("rollout", "decode", "reward", "update", "other")
CONTRAST = "Mean squared distance of the policy's velocity from the one that made the samples."
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
    """A heading with its cards."""

    title: str
    note: str
    figures: list[Figure] = field(default_factory=list)


def sections(run: Run) -> list[Section]:
    """Everything there is to draw; empty cards and sections are left out."""
    found = [
        Section(
            "Does it get better?", "Held-out prompts beside what the run trained on, by training step.", _progress(run)
        ),
        Section("Is it healthy?", "What usually goes wrong shows here first.", _health(run)),
        Section("Where does the time go?", "Seconds of each training step.", _speed(run)),
    ]
    return [section for section in found if section.figures]


def _figure(chart: Chart) -> list[Figure]:
    return [Figure(chart.title, chart.note, [thin(chart)])] if chart else []


def _series(run: Run, key: str, name: str, tone: str = "ink", spread: str | None = None) -> Series:
    x, y = run.curve(key)
    return Series(name, x, y, run.curve(spread)[1] if spread else None, tone)


def _simple(run: Run, key: str, title: str, note: str, reference: float | None = None) -> list[Figure]:
    return _figure(Chart(title, note, [_series(run, key, title.lower())], reference=reference))


def _progress(run: Run) -> list[Figure]:
    reward = Chart(
        "Training reward",
        "Mean of each batch; the band is the spread between its samples.",
        [_series(run, "reward", "reward", "reward", "reward_std")],
        band="std",
    )
    return [*_held_out(run), *_figure(reward), *_diversity(run), *_parts(run), *_other_scores(run)]


def _held_out(run: Run) -> list[Figure]:
    """Gold beside the trained reward: on one scale if they fit, else above each other."""
    names = {role: score_name(run, role) for role in ("gold", "reward")}
    if trained_on_gold(run):
        names["reward"] = None
    series = [_score(run, name, role) for role, name in names.items() if name]
    series = [one for one in series if one.last is not None]
    if not series:
        return []
    charts = [_held_out_chart(series)] if _same_scale(series) else [_held_out_chart([one]) for one in series]
    note = "The same prompts and seeds at every visit; bands are 95 % intervals of the mean."
    if len(series) == 2:
        note += " Both should rise: reward rising alone is reward hacking."
    return [Figure("Held-out scores", note, [thin(chart) for chart in charts], lead=True)]


def _held_out_chart(series: list[Series]) -> Chart:
    return Chart(" and ".join(one.name for one in series), "", series, band="95 %")


def _score(run: Run, name: str, tone: str) -> Series:
    x, y = run.held_out(name)
    stderr = run.held_out(name, "stderr")[1]
    label = {"gold": "gold", "reward": "trained reward"}.get(tone, name)
    return Series(label, x, y, _scaled(stderr), tone)


def _scaled(stderr: Sequence[Value]) -> list[Value] | None:
    return None if all(value is None for value in stderr) else [None if v is None else Z95 * v for v in stderr]


def _same_scale(series: Sequence[Series]) -> bool:
    limits = [one.limits() for one in series]
    whole = max(map(max, limits)) - min(map(min, limits))
    return len(series) == 1 or all(max(one) - min(one) >= SHARED_SCALE * whole for one in limits)


def _diversity(run: Run) -> list[Figure]:
    held_out = [(row["step"], row.get("diversity")) for row in run.evals if row.get("diversity") is not None]
    series = [_series(run, "diversity", "training")]
    if held_out:
        series.append(Series("held out", [s for s, _ in held_out], [d for _, d in held_out], tone="calm"))
    series = [one for one in series if one.last is not None]
    note = "Spread of pixels: in training inside a prompt, held out between prompts. Near zero is collapse."
    return _figure(Chart("Diversity", note, series)) if series else []


def _parts(run: Run) -> list[Figure]:
    names = sorted({key for row in run.train for key in row if key.startswith("reward/")})
    series = [_series(run, name, name.removeprefix("reward/"), f"c{i % 5}") for i, name in enumerate(names)]
    note = "The rewards that the trained one is mixed from."
    return _figure(Chart("Parts of the reward", note, series)) if len(series) > 1 else []


def _other_scores(run: Run) -> list[Figure]:
    shown = {score_name(run, "gold"), score_name(run, "reward")}
    names = [name for name in run.score_names() if name not in shown]
    figures = []
    for name in names:
        one = _score(run, name, "calm")
        figures += _figure(Chart(f"Held out: {name}", "Watched, not trained on; the band is 95 %.", [one], band="95 %"))
    return figures


def _health(run: Run) -> list[Figure]:
    return [
        *_simple(
            run, "kl_velocity", "KL in velocity", "Mean squared distance of the policy's velocity from the base's."
        ),
        *_simple(run, "contrast", "Contrast", CONTRAST),
        *_simple(run, "ratio", "Ratio", "On the first chunk of an update; exactly 1 on policy.", reference=1.0),
        *_flat_groups(run),
        *_simple(run, "loss", "Loss", "Its course matters less than the scores above."),
        *_simple(run, "grad_norm", "Gradient norm", "Before clipping; spikes call for a smaller learning rate."),
        *(
            _simple(run, "missing", "Missing scores", "Samples without a score; they had weight 0.")
            if _any(run)
            else []
        ),
        *_others(run),
    ]


def _others(run: Run) -> list[Figure]:
    names = dict.fromkeys(key for row in run.train for key in row if key not in SHOWN and not key.startswith("reward/"))
    return [card for name in names for card in _simple(run, name, name.replace("_", " "), "Logged by this recipe.")]


def _flat_groups(run: Run) -> list[Figure]:
    unit = f"Share of the {run.groups} groups" if run.groups else "Number of groups"
    note = f"{unit} whose samples all scored alike; they teach nothing."
    return _figure(Chart("Groups without contrast", note, [Series("groups without contrast", *run.flat_groups())]))


def _any(run: Run) -> bool:
    return any(run.curve("missing")[1])


def _speed(run: Run) -> list[Figure]:
    phases = [Series(phase, *run.curve("time", phase), tone=f"c{i}") for i, phase in enumerate(PHASES)]
    known = [series for series in phases if series.last is not None]
    times = Chart("Time by phase", "Seconds per training step, stacked.", known, stacked=True)
    return [
        *(_figure(times) if known else []),
        *_simple(run, "images_per_second", "Throughput", "Images per second of the whole training step."),
        *_simple(run, "lr", "Learning rate", "As the optimizer saw it."),
    ]
