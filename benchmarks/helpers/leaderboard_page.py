"""``docs/leaderboard.md`` and its charts, from the records of :mod:`benchmarks.leaderboard`."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from align.data.files import write_text

Record = dict[str, Any]
HEAD = """# Leaderboard

Written by `python -m benchmarks.leaderboard` from `docs/leaderboard.json`, which holds every run. All recipes of a
table had the same budget of training network calls (one row of a batch = one call) or of seconds, and ran on held-out
prompts with the same noise before and after. *Gold* is the verifier's dense score. The interval (95 %) covers the
choice of prompts, paired before and after, not the choice of seeds; the values of the seeds stand beside it.
*Optimised* is the reward that was trained, where it is not gold. *Diversity* is the pixel spread within the groups of
the last rollouts, relative to the first. *Drift* is the mean squared difference of the velocities of policy and base
in the last update, where the run measures it. The settings are those of the shipped configs, most of which were tuned
for longer runs. A rank on this world does not predict a rank on a large model.
"""


@dataclass(frozen=True)
class Line:
    """One recipe over its seeds: mean gold before and after, and half the width of the interval of the change."""

    recipe: str
    runs: list[Record]
    score: str = "gold"

    def mean(self, when: str, score: str | None = None) -> float:
        """Mean of a score over the seeds, ``before`` or ``after``."""
        return statistics.mean(one["scores"][score or self.score][when] for one in self.runs)

    @property
    def rise(self) -> float:
        """Mean change of gold."""
        return self.mean("after") - self.mean("before")

    @property
    def reach(self) -> float:
        """Half the width of the 95 % interval of the change, from the prompts."""
        errors = [one["scores"][self.score]["error"] or 0.0 for one in self.runs]
        return 1.96 * math.sqrt(sum(error**2 for error in errors)) / len(errors)


def lines_of(records: list[Record]) -> list[Line]:
    """One line per recipe, the largest change first."""
    by_recipe = groupby(sorted(records, key=lambda one: one["recipe"]), key=lambda one: one["recipe"])
    return sorted((Line(name, list(runs)) for name, runs in by_recipe), key=lambda line: -line.rise)


def write_page(records: list[Record], path: Path) -> None:
    """The page, and one chart per table in ``images/`` beside it."""
    text = [HEAD]
    ordered = sorted(records, key=_budget)
    for (world, calls, seconds), some in groupby(ordered, key=_budget):
        lines = lines_of(list(some))
        budget, unit = (calls, "calls") if calls else (seconds, "seconds")
        seeds = sorted({one["seed"] for line in lines for one in line.runs})
        chart = path.parent / "images" / f"leaderboard-{world}-{budget:g}-{unit}.svg"
        command = f"python -m benchmarks.leaderboard --world {world} --{unit} {budget:g} --recipes"
        names = " ".join(sorted(line.recipe for line in lines))
        text += [
            f"## {world}, {budget:,.0f} {unit if unit == 'seconds' else 'network calls'}",
            "",
            f"![Change of held-out gold by recipe](images/{chart.name})",
            "",
            *_table(lines),
            "",
            f"`{command} {names} --seeds {' '.join(map(str, seeds))}`",
            "",
        ]
        chart.parent.mkdir(exist_ok=True)
        write_text(chart, _chart(lines))
    write_text(path, "\n".join(text))


def _budget(record: Record) -> tuple[str, float, float]:
    """World, calls, seconds; 0 for the budget that was not set."""
    return record["world"], record["calls"] or 0, record["seconds"] or 0


def _table(lines: list[Line]) -> list[str]:
    rows = [
        "| recipe | rollouts | gold by seed | change | optimised | diversity | drift | calls | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        each = ", ".join(f"{_score(one, 'before')} to {_score(one, 'after')}" for one in line.runs)
        spread = statistics.mean(one["diversity"][1] / (one["diversity"][0] or 1) for one in line.runs)
        drifts = [one["drift"] for one in line.runs if one["drift"] is not None]
        cells = [
            f"`{line.recipe}`",
            str(line.runs[0]["steps"]),
            each,
            f"{line.rise:+.3f} ± {line.reach:.3f}",
            _optimised(line),
            f"{spread:.2f}",
            f"{statistics.mean(drifts):.3f}" if drifts else "",
            f"{statistics.mean(one['spent_calls'] for one in line.runs):,.0f}",
            f"{statistics.mean(one['spent_seconds'] for one in line.runs):,.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _score(record: Record, when: str) -> str:
    return f"{record['scores']['gold'][when]:.3f}"


def _optimised(line: Line) -> str:
    scores = [one["scores"] for one in line.runs]
    if any("reward" not in one or one["reward"] == one["gold"] for one in scores):
        return ""
    return f"{line.mean('before', 'reward'):.3f} to {line.mean('after', 'reward'):.3f}"


def _chart(lines: list[Line]) -> str:
    """Bars of the changes with their intervals."""
    left, width, row = 130, 480, 22
    edges = [0.0, *(line.rise + sign * line.reach for line in lines for sign in (-1, 1))]
    low, high = min(edges), max(edges)

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low or 1) * width, 1)

    parts = []
    for number, line in enumerate(lines):
        y = 12 + number * row
        start, end = sorted((x(0), x(line.rise)))
        tone = "#2f7d5b" if line.rise - line.reach > 0 else "#b5483a" if line.rise + line.reach < 0 else "#8a8f98"
        parts += [
            f'<text x="{left - 10}" y="{y + 11}" text-anchor="end">{line.recipe}</text>',
            f'<rect x="{start}" y="{y}" width="{max(end - start, 0.5):.1f}" height="14" fill="{tone}"/>',
            f'<line x1="{x(line.rise - line.reach)}" x2="{x(line.rise + line.reach)}" y1="{y + 7}" y2="{y + 7}"/>',
            f'<text x="{max(x(line.rise + line.reach), x(0)) + 6}" y="{y + 11}">{line.rise:+.3f}</text>',
        ]
    height = 24 + row * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" '
        f'width="{left + width + 70}" height="{height}">'
        "<style>text{font:12px system-ui,sans-serif;fill:#6b7280}line{stroke:#6b7280;stroke-width:1.5}</style>"
        f'<line x1="{x(0)}" x2="{x(0)}" y1="4" y2="{height - 4}"/>{"".join(parts)}</svg>\n'
    )
