"""``summary.json``: what a run came to, in one place for people and scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.files import write_json
from align.run_folder import RunFolder

if TYPE_CHECKING:
    from align.settings import Config


def write_summary(run: RunFolder, config: Config, status: str, seconds: float, network_calls: int) -> dict[str, Any]:
    """Write and return the summary, from the rows of ``metrics.jsonl``.

    ``gold_*`` is the held-out score that ``evaluate.gold`` names, ``reward_*`` the held-out score of the trained
    reward; ``before`` is the base, ``after`` the last evaluation; None where it was not measured.
    """
    rows = run.rows()
    evaluations = [row for row in rows if row["event"] == "eval"]
    before: dict[str, Any] = next((row for row in evaluations if row["step"] == 0), {})
    summary: dict[str, Any] = {}
    for label, name in (("gold", config.evaluate.gold), ("reward", "reward")):
        for when, row in (("before", before), ("after", evaluations[-1] if evaluations else {})):
            summary[f"{label}_{when}"] = row.get("scores", {}).get(name)
            summary[f"{label}_{when}_stderr"] = row.get("stderr", {}).get(name)
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
