"""A run folder as plain data. Any file may be missing or incomplete, because the run may still be in progress."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from align.data.grids import SOURCE
from align.maths.seeds import derive
from align.runs.per_prompt import PromptScores, read_scores
from alignflow.errors import RunFolderError

Row = dict[str, Any]
Curve = tuple[list[float], list[float | None]]


@dataclass(frozen=True)
class Samples:
    """One visit to the fixed prompts and seeds, as ``align.data.grids.save_samples`` wrote it.

    Args:
        images: the images; of videos their middle frames.
        video: suffix of the videos beside them; empty if there are none.
        sources: the images they were made from; empty where prompts come with none.
        fps: frames per second of the videos.
    """

    step: int
    prompts: list[str]
    seeds: list[int]
    scores: dict[str, list[float | None]]
    images: list[Path]
    video: str = ""
    fps: float = 16
    sources: list[Path] = field(default_factory=list)

    @property
    def noise(self) -> list[int]:
        """Seed of each sample's initial noise, as ``torch.Generator().manual_seed`` takes it."""
        return [derive(seed, "start") for seed in self.seeds]

    def video_file(self, row: int) -> Path | None:
        """The video of a row, None if the samples are images."""
        return self.images[row].with_suffix(f".{self.video}") if self.video else None


@dataclass(frozen=True)
class Run:
    """Content of a run folder. Rows are ordered by step; a step that was run again after a resume counts once."""

    folder: Path
    config_text: str = ""
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    samples: list[Samples] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``finished``, ``interrupted``, or ``running`` where the run has not said that it ended."""
        return str(self.summary.get("status", "finished" if self.summary else "running"))

    @property
    def steps(self) -> int:
        """Training steps done."""
        return int(number(self.summary.get("steps")) or (self.train[-1]["step"] if self.train else 0))

    def kind(self, section: str) -> str:
        """Name of the recipe, generator or reward, from the summary or else from the config."""
        value = self.summary.get(section) or self.config.get(section)
        if isinstance(value, dict):
            value = value.get("name") or value.get("kind")
        return str(value) if value else ""

    def kind_of(self, section: str) -> str:
        """``kind`` of a section of the config; empty if it has none."""
        return str(self.section(section).get("kind") or "")

    def section(self, name: str) -> Row:
        """A part of the config; empty if there is none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def groups(self) -> int | None:
        """Groups of samples per training step."""
        return self.section("rollout").get("prompts")

    def flat_groups(self) -> Curve:
        """Groups whose samples all scored alike: as a share where the number of groups is known, else counted."""
        steps, counts = self.curve("zero_variance_groups")
        return steps, [None if count is None else count / (self.groups or 1) for count in counts]

    def curve(self, key: str, part: str = "") -> Curve:
        """Steps and values of one number of the train rows; ``part`` reaches inside, as in ``time``, ``rollout``."""
        values = [row.get(key) for row in self.train]
        if part:
            values = [value.get(part) if isinstance(value, dict) else None for value in values]
        return [row["step"] for row in self.train], [number(value) for value in values]

    def held_out(self, name: str, part: str = "scores") -> Curve:
        """Steps and values of one held-out score; ``part`` is ``scores``, ``stderr`` or ``missing``."""
        parts = [(row["step"], row.get(part)) for row in self.evals]
        return [step for step, _ in parts], [number(p.get(name)) if isinstance(p, dict) else None for _, p in parts]

    def limits(self, name: str) -> tuple[float, float]:
        """Lowest and highest value of a held-out score, as its reward declares them; infinite where it does not."""
        told = [row["range"][name] for row in self.evals if name in (row.get("range") or {})]
        low, high = (number(end) for end in told[-1]) if told else (None, None)
        return -math.inf if low is None else low, math.inf if high is None else high

    def by_prompt(self, step: int) -> list[PromptScores]:
        """Held-out scores of one evaluation, prompt by prompt; empty if the run kept none, or they are damaged."""
        try:
            return read_scores(self.folder, step) or []
        except RunFolderError:
            return []

    def matched(self, first: int, last: int) -> list[tuple[PromptScores, PromptScores]]:
        """Scores of two evaluations for the same prompt and noise, in the prompts' order."""
        after = {(one.prompt, one.seed): one for one in self.by_prompt(last)}
        both = [(one, after.get((one.prompt, one.seed))) for one in self.by_prompt(first)]
        return [(before, other) for before, other in both if other is not None]

    def paired(self, name: str, first: int, last: int) -> list[tuple[float, float]]:
        """One score at two evaluations, of the prompts that have it at both."""
        both = [(one.scores.get(name), other.scores.get(name)) for one, other in self.matched(first, last)]
        return [(before, after) for before, after in both if before is not None and after is not None]

    def score_names(self) -> list[str]:
        """Held-out scores in the order in which they were first written."""
        rows = [row["scores"] for row in self.evals if isinstance(row.get("scores"), dict)]
        return list(dict.fromkeys(name for scores in rows for name in scores))


def read_run(folder: Path) -> Run:
    """Read whatever of the run is there."""
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise RunFolderError(f"{folder} is not a run folder: it has no config.yaml, metrics.jsonl or summary.json")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    rows = read_rows(folder / "metrics.jsonl")
    train = _latest([row for row in rows if row.get("event") == "train"])
    return Run(
        folder,
        config_text=text,
        config=read_yaml(text),
        environment=_read_object(folder / "environment.json"),
        summary=_summary(folder / "summary.json", train),
        train=train,
        evals=_latest(_one_role([row for row in rows if row.get("event") == "eval"])),
        samples=_read_samples(folder / "samples"),
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file; lines that are not whole JSON objects with a step are passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        row = _parse_object(line)
        if number(row.get("step")) is not None:
            rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _summary(path: Path, train: list[Row]) -> Row:
    """The summary; none where it is that of an earlier part of a run that was resumed and has other rows by now."""
    summary = _read_object(path)
    steps = number(summary.get("steps"))
    return {} if train and steps is not None and steps != train[-1]["step"] else summary


def _latest(rows: list[Row]) -> list[Row]:
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _one_role(rows: list[Row]) -> list[Row]:
    """Rows of the role that was judged last; a step with only another role (the base, at 0) keeps that one."""
    role = rows[-1].get("role") if rows else None
    chosen = [row for row in rows if row.get("role") == role]
    steps = {row["step"] for row in chosen}
    return [row for row in rows if row["step"] not in steps] + chosen


def _parse_object(text: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_object(path: Path) -> Row:
    return _parse_object(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else {}


def read_yaml(text: str) -> Row:
    """The mapping that a config's text holds; empty if it holds none."""
    return copy.deepcopy(_mapping(text))


@functools.lru_cache(maxsize=32)
def _mapping(text: str) -> Row:
    """Kept, because a run reads its own config again for the page of every evaluation."""
    try:
        value = YAML(typ="safe").load(text)
    except YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def front_matter(text: str) -> str:
    """The YAML at the beginning of a model card, between two lines of dashes; empty if there is none."""
    first, *rest = text.split("\n---", 1)
    return first.removeprefix("---") if rest and text.startswith("---\n") else ""


def _read_samples(folder: Path) -> list[Samples]:
    found = []
    for path in sorted(folder.glob("step-*")):
        match = re.fullmatch(r"step-(\d+)", path.name)
        index = _read_object(path / "prompts.json")
        prompts = index.get("prompts")
        if not match or not isinstance(prompts, list):
            continue
        scores = index["scores"] if isinstance(index.get("scores"), dict) else {}
        found.append(
            Samples(
                step=int(match[1]),
                prompts=[str(prompt) for prompt in prompts],
                seeds=list(index.get("seeds") or range(len(prompts))),
                scores={name: [number(value) for value in column] for name, column in scores.items()},
                images=[path / f"{row:03d}.png" for row in range(len(prompts))],
                video=str(index.get("clips") or ""),
                fps=number(index.get("fps")) or 16,
                sources=[path / f"{row:03d}{SOURCE}" for row in range(len(prompts)) if index.get("sources")],
            )
        )
    return sorted(found, key=lambda samples: samples.step)
