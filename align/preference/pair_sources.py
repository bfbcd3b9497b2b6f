"""Sources of samples for ``alignflow pairs``: a generator, a finished search, or images, videos and tables.

A source has units, which are sampled and scored together and written at once. Which samples a unit has follows from the
settings alone, so that an interrupted command continues to the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.data.grids import LOSSLESS
from align.data.media import encode, to_pixels
from align.data.prompts import Prompt
from align.data.tables import Cell
from align.evaluation.evaluate import sample_media
from align.evaluation.score_items import Item
from align.maths.seeds import derive
from align.policy.build import build_generator
from align.policy.users import choose
from align.preference.pair_store import MEDIA, Store
from align.runs import devices
from align.runs.identity import data_digest, model_digest
from align.runs.trained import load_policy
from align.search.run import read_rows
from alignflow.errors import DataError
from rewards.base import Scope

if TYPE_CHECKING:
    from align.config.settings import Config
    from generators.base import Generator


@dataclass(frozen=True)
class Sample:
    """A sample to score.

    Args:
        item: its file and prompt.
        group: number of its prompt.
        file: how the table names the file; "" = as :meth:`~align.preference.pair_store.Store.keep` does.
        score: that it has already.
    """

    item: Item
    group: int
    file: str = ""
    score: float | None = None


class Source(Protocol):
    """Samples in units."""

    @property
    def about(self) -> dict[str, Any]:
        """Everything that the samples depend on, as JSON."""
        ...

    def units(self, scope: Scope, chunk: int) -> list[Any]:
        """Units of work; ``scope`` decides which samples have to be in one unit."""
        ...

    def samples(self, unit: Any, store: Store) -> list[Sample]:
        """The samples of a unit; a generator generates them now."""
        ...


@dataclass
class Files:
    """Images and videos with their prompts; those of one prompt, and of one source image, are a group."""

    items: Sequence[Item]

    @property
    def about(self) -> dict[str, Any]:
        """Names and prompts of the samples."""
        names = hashlib.sha256("\n".join(f"{item.name}\0{item.prompt.text}" for item in self.items).encode())
        return {"kind": "files", "samples": len(self.items), "digest": names.hexdigest()}

    def units(self, scope: Scope, chunk: int) -> list[list[Sample]]:
        """Whole prompts where their samples are compared, else ``chunk`` samples at a time."""
        numbers: dict[Any, int] = {}
        groups: dict[int, list[Sample]] = {}
        for item in self.items:
            number = numbers.setdefault(_asked(item.prompt), len(numbers))
            groups.setdefault(number, []).append(Sample(item, number))
        if scope == "group":
            return list(groups.values())
        ordered = [sample for group in groups.values() for sample in group]
        size = len(ordered) if scope == "batch" else chunk
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def samples(self, unit: list[Sample], store: Store) -> list[Sample]:
        """As they are."""
        return unit


def _asked(prompt: Prompt) -> tuple[Any, ...]:
    """Request of a sample: the text, and the files that came with it."""
    return prompt.text, *((name, _content(file)) for name, file in sorted(prompt.media.items()))


def _content(file: Path | Cell) -> str:
    content = file.content() if isinstance(file, Cell) else file
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(content)


@dataclass
class Generated:
    """``count`` samples of every prompt by a config's generator, with a policy on it if there is one."""

    config: Config
    prompts: Sequence[Prompt]
    count: int
    seed: int
    policy: Path | None = None

    @property
    def about(self) -> dict[str, Any]:
        """Settings, model and prompts."""
        config = self.config
        trained = None if self.policy is None else [str(self.policy.resolve()), model_digest(str(self.policy))]
        return {
            "kind": "generated",
            "generator": {**config.generator.model_dump(mode="json"), "path": model_digest(config.generator.path)},
            "sampler": config.evaluate.sampler.model_dump(mode="json"),
            "policy": trained,
            "prompts": data_digest(self.prompts),
            "count": self.count,
            "seed": self.seed,
        }

    def units(self, scope: Scope, chunk: int) -> list[range]:
        """Some prompts each, about ``chunk`` samples."""
        size = len(self.prompts) if scope == "batch" else max(1, chunk // self.count)
        return [range(i, min(i + size, len(self.prompts))) for i in range(0, len(self.prompts), size)]

    @cached_property
    def generator(self) -> Generator:
        """Built when the first sample is asked for."""
        config = self.config
        device = devices.chosen(config.generator.device)
        generator = build_generator(config.generator, config.memory, device, kinds=[config.evaluate.sampler.kind])
        if self.policy is not None:
            load_policy(generator, self.policy)
            choose(generator, config.policy)
        return generator

    def samples(self, unit: range, store: Store) -> list[Sample]:
        """Generate them and write their files."""
        asked = [(number, k) for number in unit for k in range(self.count)]
        seeds = [derive(self.seed, "pairs", number, k) for number, k in asked]
        prompts = [self.prompts[number] for number, _ in asked]
        media = sample_media(
            self.generator, prompts, seeds, self.config.evaluate.sampler, self.config.evaluate.chunk
        )  # fmt: skip
        found = []
        for (number, k), prompt, pixels in zip(asked, prompts, to_pixels(media), strict=True):
            how = self.config.samples
            suffix = f".{how.video}" if pixels.ndim == 4 else ".png"
            quality = None if pixels.ndim == 3 or max(pixels.shape[1:3]) <= LOSSLESS else 90
            file = f"{MEDIA}/{number:06d}-{k:03d}{suffix}"
            store.write(file, encode(pixels, suffix, how.fps, quality=quality))
            found.append(Sample(Item(file, store.folder / file, prompt), number, file))
        return found


@dataclass
class Searched:
    """The candidates that a finished search kept, with the scores that it gave them."""

    run_dir: Path

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row of each prompt; DataError if there is none."""
        rows = read_rows(self.run_dir)
        if not rows:
            raise DataError(f"{self.run_dir} holds no result yet; let the search finish, or continue it with --resume")
        return rows

    @property
    def about(self) -> dict[str, Any]:
        """Candidates and scores."""
        text = repr([(row["number"], row["prompt"], row["kept"]) for row in self.rows])
        return {"kind": "search", "digest": hashlib.sha256(text.encode()).hexdigest()}

    def units(self, scope: Scope, chunk: int) -> list[list[Sample]]:
        """One prompt each, or all of them where a reward compares all samples."""
        found = [list(self._of(row)) for row in self.rows]
        return [list(chain.from_iterable(found))] if scope == "batch" else found

    def _of(self, row: dict[str, Any]) -> Iterator[Sample]:
        folder = self.run_dir / "candidates" / f"{row['number']:04d}"
        media = {name: folder / file for name, file in row["media"].items()}
        prompt = Prompt(row["prompt"], media, place=str(folder))
        for kept in row["kept"]:
            file = folder / kept["file"]
            yield Sample(Item(str(file), file, prompt), row["number"], score=kept["reward"])

    def samples(self, unit: list[Sample], store: Store) -> list[Sample]:
        """As they are."""
        return unit
