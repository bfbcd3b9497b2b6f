"""Preference pairs from any source and any reward, as in ``alignflow pairs``: sample, score, pair, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.tables import Cell
from align.evaluation.files import build, score_items
from align.preference.pair_sources import Sample, Source
from align.preference.pair_store import Row, Store, needs_parquet
from align.preference.pairing import Formed, Pairing, form
from align.runs.lock import locked
from align.runs.progress import Progress
from alignflow.errors import DataError
from alignflow.secrets import shown
from rewards.base import widest_known
from rewards.digest import digest, identity

if TYPE_CHECKING:
    from rewards.base import Reward, RewardSettings


def build_pairs(
    source: Source,
    rewards: Mapping[str, RewardSettings],
    how: Pairing,
    out: Path,
    *,
    device: str = "cpu",
    chunk: int = 16,
    copy: bool = False,
    origin: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write ``out/pairs.parquet``; returns counts.

    Samples and scores are written as they come, to ``media/`` and ``scored.jsonl``. The same call continues
    with the stored samples; another ``how`` costs no sample and no score.

    Args:
        rewards: name -> what scores; empty = the scores that a search stored.
        chunk: samples scored at a time, and about the number generated at a time.
        copy: copy media from elsewhere into ``out``.
        origin: text of the column source.

    Raises:
        ConfigError: the policy needs other scores.
        DataError: nothing can be paired; the message gives the reason.
        RunFolderError: ``out`` holds something else.
    """
    how.check()
    needs_parquet()
    ready = build(rewards, device)
    digests = {name: identity(rewards[name], reward) for name, reward in ready.items()}
    about = {"source": source.about, "rewards": digests, "chunk": chunk}
    with locked(out):
        store = Store(out, about)
        _score(source, ready, store, device, chunk, say)
        rows = store.rows
        formed = form(rows, how)
        if not formed.winner:
            why = "; ".join(f"{count} prompts: {said}" for said, count in formed.unpaired.items()) or "no sample passed"
            raise DataError(f"no pairs by policy {how.policy}: {why}{_first_reason(rows)}")
        columns = {
            "policy": how.policy,
            "reward": digest(digests) if digests else source.about["digest"],
            "seed": source.about.get("seed", how.seed),
            "source": origin,
        }
        store.write_pairs(formed, columns, copy=copy)
    return _counts(rows, formed)


def _counts(rows: Sequence[Row], formed: Formed) -> dict[str, Any]:
    return {
        "prompts": len({row["group"] for row in rows}),
        "samples": len(rows),
        "unread": sum(bool(row["unread"]) for row in rows),
        "scored": sum(row["score"] is not None for row in rows),
        "pairs": len(formed.winner),
        "ties": sum(formed.tie),
        "unpaired": formed.unpaired,
    }


def _score(
    source: Source, rewards: Mapping[str, Reward], store: Store, device: str, chunk: int, say: Callable[[str], None]
) -> None:
    """Sample and score the units that are not written yet."""
    units = source.units(widest_known([reward.scope for reward in rewards.values()]) or "batch", chunk)
    progress = Progress(len(units), len(store.units), unit="unit")
    if store.units and len(store.units) < len(units):
        say(f"{store.folder}: {store.count} samples are there already")
    for unit in units[len(store.units) :]:
        samples = source.samples(unit, store)
        rows = _rows(samples, rewards, store, device, chunk)
        for row in rows:
            for line in [row["unread"]] if row["unread"] else [f"no {k} score: {v}" for k, v in row["reasons"].items()]:
                say(f"{row['name']}: {line}")
        store.add(rows)
        if len(units) > 1:
            progress.update(len(store.units), {"samples": str(store.count)})


def _rows(samples: list[Sample], rewards: Mapping[str, Reward], store: Store, device: str, chunk: int) -> list[Row]:
    first = store.count
    if rewards:
        scored = list(score_items([one.item for one in samples], rewards, device, chunk))
    else:
        scored = [{"scores": {"": one.score}, "parts": {}, "reasons": {}, "unread": ""} for one in samples]
    return [
        {
            **_named(sample, row, store, first + number),
            **_flat(row, list(rewards)),
            "reasons": row["reasons"],
            "unread": row["unread"],
        }
        for number, (sample, row) in enumerate(zip(samples, scored, strict=True))
    ]


def _named(sample: Sample, scored: Mapping[str, Any], store: Store, number: int) -> Row:
    """The columns that name a sample; a file that could not be read is in no pair, so it is not kept."""
    item, file, media = sample.item, sample.file, dict[str, str]()
    if not scored["unread"]:
        source = item.source
        content = source.content() if isinstance(source, Cell) else source
        file = file or store.keep(f"{number:06d}", content)
        media = store.keep_inputs(sample.group, item.prompt.media)  # once for all samples of the prompt
    named = {"name": shown(item.name), "file": file, "prompt": item.prompt.text, "media": media}
    return {**named, "group": sample.group}


def _flat(row: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The first reward's score, and as parts: those of a single reward, or several rewards and theirs by name."""
    scores, parts = row["scores"], row["parts"]
    if len(names) < 2:
        return {"score": next(iter(scores.values())), "parts": dict(parts.get(names[0], {})) if names else {}}
    flat: dict[str, Any] = {}
    for name in names:
        flat |= {name: scores[name], **{f"{name}/{part}": value for part, value in parts.get(name, {}).items()}}
    return {"score": scores[names[0]], "parts": flat}


def _first_reason(rows: list[Row]) -> str:
    """The reason why the first sample without a score has none."""
    for row in rows:
        for why in [row["unread"], *row["reasons"].values()]:
            if why:
                return f" ({row['name']}: {why})"
    return ""
