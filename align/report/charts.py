"""Line and area charts as inline SVG: fixed drawing units, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup, escape

MAX_POINTS = 240
TOP, BOTTOM, LEFT, RIGHT = 22, 38, 46, 12
Value = float | None
MINUS, GAP = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        spread: half-height of the band around it.
        tone: its colour in the style sheet.
        within: lowest and highest value there can be, where the band ends.
        stepped: every value holds until the next one, as a best value so far does.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Value]
    spread: Sequence[Value] | None = None
    tone: str = "ink"
    within: tuple[float, float] = (-math.inf, math.inf)
    stepped: bool = False

    @property
    def last(self) -> Value:
        """The latest value."""
        return next((value for value in reversed(self.y) if value is not None), None)

    def limits(self) -> list[float]:
        """Every height the curve and its band reach."""
        spread = self.spread or [None] * len(self.y)
        known = [(y, s or 0.0) for y, s in zip(self.y, spread, strict=True) if y is not None]
        return [edge for y, s in known for edge in self.band(y, s)]

    def band(self, y: float, spread: float) -> tuple[float, float]:
        """Lower and upper edge of the band at a height; never beyond what the values can be."""
        low, high = self.within
        return min(max(y - spread, low), y), max(min(y + spread, high), y)


@dataclass(frozen=True)
class Chart:
    """Curves that share both axes.

    Args:
        title: what is shown.
        note: how to read it, one sentence.
        series: at least one.
        band: what the bands are, for legend and table.
        stacked: draw areas upon each other instead of lines.
        reference: a height worth a dashed line, part of the range.
        axis: what is counted along x.
        unit: what is measured along y.
    """

    title: str
    note: str
    series: list[Series]
    band: str = ""
    stacked: bool = False
    reference: float | None = None
    pooled: int = 1
    axis: str = "step"
    unit: str = ""

    def __bool__(self) -> bool:
        return any(series.last is not None for series in self.series)


def thin(chart: Chart, limit: int = MAX_POINTS) -> Chart:
    """At most ``limit`` points per curve, each the mean of equally many neighbours, so that long runs stay small."""
    sizes = [math.ceil(len(series.x) / limit) for series in chart.series]
    pooled = [_pool(series, size) for series, size in zip(chart.series, sizes, strict=True)]
    return replace(chart, series=pooled, pooled=max(sizes))


def draw(chart: Chart, width: int = 360, height: int = 190) -> Markup:
    """The chart as ``<svg>``; its numbers belong into a table beside it (:func:`table`)."""
    xs = [x for series in chart.series for x in series.x]
    x_min, x_max = min(xs), max(xs)
    heights = _tops(chart) if chart.stacked else [h for series in chart.series for h in series.limits()]
    y_ticks = ticks(*_domain([*heights, *([] if chart.reference is None else [chart.reference])]))
    frame = Frame(width, height, x_min, x_max if x_max > x_min else x_min + 1, y_ticks[0], y_ticks[-1])
    body = [_axes(frame, y_ticks, x_max > x_min, not chart.axis.endswith("seconds")), _names(frame, chart)]
    if chart.reference is not None:
        y = frame.y(chart.reference)
        body.append(f'<line class="reference" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
    if chart.stacked:
        body.extend(_areas(chart, frame))
    else:
        body.extend(_band(series, frame) for series in chart.series)
        body.extend(_line(series, frame) for series in chart.series)
    body.append(f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}"/>')
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(describe(chart))}" '
        f'data-left="{LEFT}" data-right="{width - RIGHT}" data-min="{frame.x_min:g}" data-max="{frame.x_max:g}">'
        f"{''.join(body)}</svg>"
    )


def table(chart: Chart) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the numbers behind a chart."""
    header = [chart.axis]
    columns: list[dict[float, Value]] = []
    for series in chart.series:
        header.append(series.name)
        columns.append(dict(zip(series.x, series.y, strict=True)))
        if series.spread is not None:
            header.append(f"{series.name} ± {chart.band}" if len(chart.series) > 1 else f"± {chart.band}")
            columns.append(dict(zip(series.x, series.spread, strict=True)))
    steps = sorted({x for series in chart.series for x in series.x})
    return header, [[short(step), *(short(column.get(step)) for column in columns)] for step in steps]


def describe(chart: Chart) -> str:
    """The chart in one sentence, for those who do not see it."""
    parts = []
    for series in chart.series:
        known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            where = [f"{short(x)} {chart.axis}" if chart.axis != "step" else f"step {short(x)}" for x in (x0, x1)]
            parts.append(f"{series.name} from {short(y0)} at {where[0]} to {short(y1)} at {where[1]}")
    return f"{chart.title}: {'; '.join(parts)}."


def short(value: Value, digits: int = 3) -> str:
    """A number as people write it: three digits, thousands grouped, a true minus."""
    if value is None:
        return GAP
    if value and abs(value) < 1e-3:
        text = f"{value:.{digits - 1}e}"
        mantissa, exponent = text.split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(decimals, 5)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover ``low .. high`` in about ``count`` intervals."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """Data coordinates -> drawing coordinates."""

    width: int
    height: int
    x_min: float
    x_max: float
    y_min: float
    y_max: float

    def x(self, value: float) -> float:
        share = (value - self.x_min) / (self.x_max - self.x_min)
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_min) / (self.y_max - self.y_min)
        return round(self.height - BOTTOM - share * (self.height - TOP - BOTTOM), 1)


def _domain(heights: Sequence[float]) -> tuple[float, float]:
    low, high = min(heights), max(heights)
    if max(abs(high), abs(low)) < 1e-9:  # ticks are rounded to 12 decimals
        return 0.0, 1.0
    if high - low < 1e-4 * max(abs(high), abs(low)) or high == low:
        room = abs(high) * 0.1
        return low - room, high + room
    return (0.0 if 0 <= low < 0.3 * high else low), high


def _axes(frame: Frame, y_ticks: Sequence[float], moving: bool, counted: bool) -> str:
    right, floor = frame.width - RIGHT, frame.height - BOTTOM
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    steps = [frame.x_min]
    if moving:
        steps = [s for s in ticks(frame.x_min, frame.x_max, frame.width // 80) if frame.x_min <= s <= frame.x_max]
        steps = [s for s in steps if not counted or float(s).is_integer()]
    for value in steps:
        x, text = frame.x(value), f"{value:,.0f}" if float(value).is_integer() else short(value)
        parts.append(f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def _names(frame: Frame, chart: Chart) -> str:
    """Labels of both axes."""
    axis = "training step" if chart.axis == "step" else chart.axis
    below = (
        f'<text class="axis" x="{frame.width - RIGHT}" y="{frame.height - 5}" text-anchor="end">{escape(axis)}</text>'
    )
    return below + (f'<text class="axis" x="2" y="12">{escape(chart.unit)}</text>' if chart.unit else "")


def _runs(points: Sequence[tuple[float, Value, Value]]) -> list[list[tuple[float, float, float]]]:
    """Stretches without gaps."""
    stretches: list[list[tuple[float, float, float]]] = [[]]
    for x, a, b in points:
        if a is None or b is None:
            stretches.append([])
        else:
            stretches[-1].append((x, a, b))
    return [stretch for stretch in stretches if stretch]


def _line(series: Series, frame: Frame) -> str:
    parts = []
    for stretch in _runs([(x, y, y) for x, y in zip(series.x, series.y, strict=True)]):
        path = [(x, y) for x, y, _ in stretch]
        if series.stepped:
            held = [((x, y), (x, after)) for (_, y), (x, after) in pairwise(path)]
            path = [path[0], *(corner for corners in held for corner in corners)]
        points = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in path)
        parts.append(f'<polyline class="line {series.tone}" points="{points}"/>')
        if len(stretch) == 1 or (len(series.x) <= 16 and not series.stepped):
            parts.extend(
                f'<circle class="dot {series.tone}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="2.6"/>'
                for x, y, _ in stretch
            )
    return "".join(parts)


def _band(series: Series, frame: Frame) -> str:
    if series.spread is None:
        return ""
    edges: list[tuple[float, Value, Value]] = [
        (x, *((None, None) if y is None or s is None else series.band(y, s)))
        for x, y, s in zip(series.x, series.y, series.spread, strict=True)
    ]
    return "".join(_area(stretch, frame, f"band {series.tone}") for stretch in _runs(edges))


def _area(stretch: Sequence[tuple[float, float, float]], frame: Frame, css: str) -> str:
    upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in stretch]
    lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(stretch)]
    return f'<polygon class="{css}" points="{" ".join(upper + lower)}"/>'


def _layers(chart: Chart) -> list[list[float]]:
    """Cumulative heights, from the floor up; gaps count as nothing."""
    layers = [[0.0] * len(chart.series[0].x)]
    for series in chart.series:
        layers.append([below + (y or 0.0) for below, y in zip(layers[-1], series.y, strict=True)])
    return layers


def _tops(chart: Chart) -> list[float]:
    return [0.0, *_layers(chart)[-1]]


def _areas(chart: Chart, frame: Frame) -> list[str]:
    layers = _layers(chart)
    xs = chart.series[0].x
    return [
        _area(list(zip(xs, low, high, strict=True)), frame, f"area {series.tone}")
        for series, (low, high) in zip(chart.series, pairwise(layers), strict=True)
    ]


def _pool(series: Series, size: int) -> Series:
    starts = range(0, len(series.x), size)
    spread = None if series.spread is None else [_mean(series.spread[i : i + size]) for i in starts]
    last_x = [series.x[min(i + size, len(series.x)) - 1] for i in starts]
    return replace(series, x=last_x, y=[_mean(series.y[i : i + size]) for i in starts], spread=spread)


def _mean(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
