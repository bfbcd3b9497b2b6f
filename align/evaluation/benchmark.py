"""Generation benchmarks: samples of a published prompt set, their scores, and a table by category."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.paths import absolute
from align.data.files import write_json, write_text
from align.data.inputs import check_needs
from align.data.media import write_media
from align.data.prompts import Prompt
from align.evaluation.against import OtherSamples, compared, comparing, table
from align.evaluation.against import lines_of as against_lines
from align.evaluation.evaluate import generate, score_rows
from align.maths.seeds import derive
from align.policy.build import build_generator, build_rewards
from align.runs import devices
from align.runs.identity import data_digest
from align.runs.lock import locked
from align.runs.metrics import append
from align.runs.trained import load_policy
from alignflow.errors import ConfigError, RunFolderError
from rewards.base import wanted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from align.config.settings import Config
    from generators.base import Generator
    from rewards.base import Reward

Row = dict[str, Any]
Found = tuple[dict[str, float], dict[str, str]]
"""Scores of a sample by reward, and reasons of missing ones."""
SAMPLES, RESULTS = "samples.jsonl", "results.json"


def benchmark(
    config: Config,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    name: str,
    count: int = 4,
    policy: Path | None = None,
    against: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Generate ``count`` samples per prompt with the evaluation sampler, score them, and write samples and results.

    ``out`` holds the samples as files, ``samples.jsonl`` with their scores, ``results.json`` and ``results.md``. A
    benchmark that was interrupted continues after its last chunk.

    Args:
        policy: a trained policy put onto the base, see :func:`align.runs.trained.load_policy`.
        against: folder of another benchmark of the same prompts, with whose samples rewards compare.

    Returns:
        the content of ``results.json``: means by category and reward, over prompts and over categories.

    Raises:
        ConfigError: the config has no rewards under ``evaluate.rewards``, or one that compares and ``against`` is None.
        RunFolderError: ``out`` holds another benchmark, or ``against`` does not hold one of these prompts.
    """
    if not config.evaluate.rewards:
        raise ConfigError("evaluate.rewards is empty: name the rewards that score the benchmark")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        device = devices.chosen(config.generator.device)
        built = build_rewards(dict(config.evaluate.rewards), device, config.memory)
        other, beside = None if against is None else OtherSamples(against), comparing(built, against)
        rows = _taken_up(out, _identity(config, prompts, name, count, policy, against))
        generator = build_generator(config.generator, config.memory, device, kinds=[config.evaluate.sampler.kind])
        if policy is not None:
            load_policy(generator, policy)
        check_needs(list(prompts), generator, built)
        asked = [(number, copy) for number in range(len(prompts)) for copy in range(count)]
        while len(rows) < len(asked):
            some = asked[len(rows) : len(rows) + config.evaluate.chunk]
            sampled = _sampled(config, generator, prompts, some, built, beside, other)
            for (number, copy), (one, scores) in zip(some, sampled, strict=True):
                rows.append(_saved(out, prompts[number], number, copy, one, scores))
            say(f"{len(rows)} of {len(asked)} samples")
        return _written(out, name, rows, count, against)


def _sampled(
    config: Config,
    generator: Generator,
    prompts: Sequence[Prompt],
    some: Sequence[tuple[int, int]],
    rewards: Mapping[str, Reward],
    beside: Mapping[str, Reward],
    other: OtherSamples | None,
) -> list[tuple[Any, list[Found]]]:
    """Media of the (prompt, copy) in ``some``, each with its scores and, with ``other``, those of the comparison.

    Args:
        rewards: all of them; ``beside`` are those that compare.
    """
    chosen = [prompts[number] for number, _ in some]
    seeds = [derive(config.evaluate.seed, "benchmark", number, copy) for number, copy in some]
    media, inputs = generate(generator, chosen, seeds, wanted(rewards), config.evaluate)
    found = [[one] for one in score_rows(media, chosen, inputs, {k: v for k, v in rewards.items() if k not in beside})]
    if other:
        others = [other.media(*key, prompts[key[0]].text) for key in some]
        both = compared(media, others, [prompt.text for prompt in chosen], inputs, beside)
        found = [[*scores, versus] for scores, versus in zip(found, both, strict=True)]
    return list(zip(media, found, strict=True))


def _identity(
    config: Config, prompts: Sequence[Prompt], name: str, count: int, policy: Path | None, against: Path | None
) -> Row:
    settings = config.model_dump(mode="json")
    told = {"generator": settings["generator"], "evaluate": settings["evaluate"]}
    told["evaluate"].pop("chunk")
    policy_of = None if policy is None else str(policy.resolve())
    other = {} if against is None else {"against": str(against.resolve())}
    return {
        **other,
        "set": name,
        "prompts": data_digest(prompts),
        "count": count,
        "policy": policy_of,
        **absolute(told),
    }


def _taken_up(out: Path, identity: Row) -> list[Row]:
    """The samples that are there already."""
    path = out / "benchmark.json"
    if not path.exists():
        if any(entry.suffix for entry in out.iterdir() if not entry.name.startswith(".")):
            raise RunFolderError(f"{out} is not empty and is not a benchmark; name a new folder")
        write_json(path, identity)
        return []
    if json.loads(path.read_text()) != json.loads(json.dumps(identity)):
        raise RunFolderError(f"{out} holds a benchmark of another model, set or settings; name a new folder")
    rows = []
    lines = (out / SAMPLES).read_text(encoding="utf-8").splitlines() if (out / SAMPLES).exists() else []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # an interrupted line ends what is known
            break
    write_text(out / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _saved(out: Path, prompt: Prompt, number: int, copy: int, media: Any, found: Sequence[Found]) -> Row:
    """The row of a sample, which is written. ``found`` are scores and reasons, then those of comparisons if any."""
    columns = [{name: value if math.isfinite(value) else None for name, value in scores.items()} for scores, _ in found]
    reasons = {name: why for _, reason in found for name, why in reason.items()}
    file = f"{number:05d}-{copy}{'.png' if media.ndim == 3 else '.webp'}"
    write_media(out / file, media.cpu())
    row = {
        "file": file,
        "prompt": prompt.text,
        "category": prompt.metadata["category"],
        "number": number,
        "scores": columns[0],
        **({"against": columns[1]} if columns[1:] else {}),
        **({"reasons": reasons} if reasons else {}),
    }
    append(out / SAMPLES, row)
    return row


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means of scored samples.

    Returns:
        per reward: ``categories`` (category -> mean, standard error over prompts, prompts, missing samples),
        ``prompts`` (the mean over all prompts and its standard error) and ``mean_of_categories``. A prompt counts once,
        by the mean of its samples.
    """
    found: dict[str, Any] = {}
    for reward in rows[0]["scores"] if rows else ():
        by_prompt: dict[int, list[float]] = {}
        category_of = {row["number"]: row["category"] for row in rows}
        for row in rows:
            if row["scores"][reward] is not None:
                by_prompt.setdefault(row["number"], []).append(row["scores"][reward])
        means = {number: sum(values) / len(values) for number, values in by_prompt.items()}
        categories = {}
        for category in dict.fromkeys(category_of.values()):
            own = [value for number, value in means.items() if category_of[number] == category]
            lost = sum(row["scores"][reward] is None for row in rows if row["category"] == category)
            categories[category] = {**_mean(own), "missing": lost}
        known = [one["mean"] for one in categories.values() if one["mean"] is not None]
        found[reward] = {
            "categories": categories,
            "prompts": _mean(list(means.values())),
            "mean_of_categories": sum(known) / len(known) if known else None,
        }
    return found


def _mean(values: Sequence[float]) -> Row:
    count = len(values)
    if not count:
        return {"mean": None, "stderr": None, "prompts": 0}
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count) if count > 1 else None
    return {"mean": mean, "stderr": spread, "prompts": count}


def _written(out: Path, name: str, rows: Sequence[Row], count: int, against: Path | None) -> dict[str, Any]:
    results = {"set": name, "samples_per_prompt": count, "rewards": summary(rows)}
    if against is not None:
        results["against"] = {"folder": str(against), "rewards": table(rows)}
    write_json(out / RESULTS, results)
    write_text(out / "results.md", "\n".join(lines_of(results)) + "\n")
    return results


def lines_of(results: dict[str, Any]) -> list[str]:
    """The results as a table in Markdown, one row per category."""
    rewards = results["rewards"]
    title = f"# {results['set']}, {results['samples_per_prompt']} samples per prompt"
    other = results.get("against", {"rewards": {}, "folder": ""})
    comparisons = against_lines(other["rewards"], other["folder"])
    if not rewards:
        return [title, *comparisons]
    categories = list(next(iter(rewards.values()))["categories"])
    lines = [
        title,
        "",
        f"| category | prompts | {' | '.join(rewards)} |",
        f"|---|---|{'---|' * len(rewards)}",
    ]
    for category in categories:
        cells = [one["categories"][category] for one in rewards.values()]
        lines.append(f"| {category} | {cells[0]['prompts']} | {' | '.join(map(_cell, cells))} |")
    every = [one["prompts"] for one in rewards.values()]
    lines.append(f"| all prompts | {every[0]['prompts']} | {' | '.join(map(_cell, every))} |")
    means = [{"mean": one["mean_of_categories"], "stderr": None} for one in rewards.values()]
    lines.append(f"| mean of categories | | {' | '.join(map(_cell, means))} |")
    return [*lines, "", "Mean and standard error over prompts.", *comparisons]


def _cell(one: Row) -> str:
    if one["mean"] is None:
        return "no score"
    return f"{one['mean']:.3f}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.3f}")
