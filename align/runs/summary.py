"""``summary.json``: the results of a run in one place, for people and scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.data.files import write_json
from align.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from align.config.settings import Config


def write_summary(run: RunFolder, config: Config, status: str, seconds: float, network_calls: int) -> dict[str, Any]:
    """Write and return the summary, from the rows of ``metrics.jsonl``.

    ``gold_*`` is the held-out score that ``evaluate.gold`` names, ``reward_*`` that of the trained reward; ``before``
    is the base, ``after`` the last evaluation; None if it was not measured. Of a trained reward that compares
    samples, ``reward_parts`` holds the same of its parts that do not.
    """
    rows = run.rows()
    evaluations = [row for row in rows if row["event"] == "eval"]
    before: dict[str, Any] = next((row for row in evaluations if row["step"] == 0), {})
    summary: dict[str, Any] = {}
    for label, name in (("gold", config.evaluate.gold), ("reward", "reward")):
        for when, row in (("before", before), ("after", evaluations[-1] if evaluations else {})):
            summary[f"{label}_{when}"] = row.get("scores", {}).get(name)
            summary[f"{label}_{when}_stderr"] = row.get("stderr", {}).get(name)
    after = evaluations[-1].get("scores", {}) if evaluations else {}
    parts = [name for name in after if name.startswith("reward/") and name not in config.evaluate.rewards]
    if parts:
        summary["reward_parts"] = {name.partition("/")[2]: _change(before, evaluations[-1], name) for name in parts}
    summary |= {
        "seconds": seconds,
        "network_calls": network_calls,
        "seed": config.seed,
        "name": config.name,
        "status": status,
        "recipe": config.recipe.kind,
        "generator": f"{config.generator.kind}: {config.generator.path}",
        "steps": max((row["step"] for row in rows if row["event"] == "train"), default=0),
        "held_out_prompts": evaluations[-1]["prompts"] if evaluations else 0,
    }
    write_json(run.path / "summary.json", summary)
    return summary


def _change(before: dict[str, Any], after: dict[str, Any], name: str) -> dict[str, Any]:
    rows = (("before", before), ("after", after))
    return {
        key: value
        for when, row in rows
        for key, value in (
            (when, row.get("scores", {}).get(name)),
            (f"{when}_stderr", row.get("stderr", {}).get(name)),
        )
    }
