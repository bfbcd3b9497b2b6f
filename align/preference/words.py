"""Text summary of a benchmark report."""

from __future__ import annotations

from align.preference.agreement import Interval, Report
from alignflow.words import count

SOURCES = {
    "zero": "not tuned",
    "given": "as given",
    "validation": "tuned on the validation pairs",
    "test": "TUNED ON THE TEST PAIRS: an upper bound, not a measurement",
}


def lines(report: Report) -> list[str]:
    """The most important lines of a report."""
    order = report.order
    found = [
        f"pairs         {report.pairs}: {report.ties} ties, {report.missing} without a score, "
        f"{report.equal_scores} with equal scores",
        f"without ties  {_share(report.without_ties)}",
        f"with ties     {_share(report.with_ties)}, gaps up to {report.threshold.value:.4g} are ties, "
        f"{SOURCES[report.threshold.source]}",
    ]
    if order.pairs:
        found.append(
            f"order         {count(order.pairs, 'pair')} both ways: {order.consistency:.1%} the same verdict, "
            f"position bias {order.position_bias:+.3f}, gaps change by up to {order.largest_change:.2g}"
        )
    return found


def _share(interval: Interval) -> str:
    if interval.value is None:
        return "nothing to measure"
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2%} ({interval.count} pairs of one prompt: no interval)"
    return f"{interval.value:.2%} (95 % interval {interval.low:.2%} .. {interval.high:.2%}, {interval.count} pairs)"
