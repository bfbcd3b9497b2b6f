"""Validated settings of prompts and of the samples of a step: generated during training, or stored in a file."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.engines import ENGINES, PoolEngine, SglangEngine, VllmOmniEngine
from align.config.sampling import Sampler
from align.maths.schedules import Points, unordered, value_at
from alignflow.kinds import OneOf, problems_at
from alignflow.settings import Settings


class Source(Settings):
    """One of several sources of training prompts."""

    file: str = Field(description="source of prompts, as prompts.train")
    weight: Annotated[float, Field(ge=0)] | Points = Field(
        1.0,
        description="share of the prompts of a rollout, relative to the other sources; or [[rollout, weight], ...], "
        "linear between the points, constant outside them",
    )

    @property
    def points(self) -> list[tuple[int, float]]:
        """The weight by rollout."""
        return self.weight if isinstance(self.weight, list) else [(0, self.weight)]


class Prompts(Settings):
    """Source of prompts: ``shapes:train`` or another embedded world, a .txt file (one prompt per line), a .jsonl, .csv
    or .parquet file, or ``hub:owner/name[:split]``. Columns prompt, image and mask are read; all other columns are
    metadata for rewards."""

    train: str | Annotated[list[Source], Field(min_length=1)] = Field(
        description="training prompts: a source, or a list of sources with weights, [{file: ..., weight: ...}, ...]"
    )
    heldout: str | None = Field(None, description="held-out prompts, for evaluation and sample grids; null = none")
    limit: int | None = Field(
        None, ge=1, description="maximum number of training prompts of a source, counted from the first; null = all"
    )
    bad: Literal["stop", "skip"] = Field(
        "stop",
        description="handling of unusable rows (prompts too long, images missing or damaged): stop = raise an "
        "error | skip = leave them out",
    )

    @property
    def sources(self) -> list[Source]:
        """The sources of training prompts."""
        return [Source(file=self.train)] if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        points = [source.points for source in self.sources]
        for number, one in enumerate(points):
            if problem := unordered(one):
                raise problems_at([(f"train.{number}.weight", problem)])
        turns = sorted({rollout for one in points for rollout, _ in one})
        empty = [n for n in turns if not sum(value_at(one, n) for one in points)]
        if empty:
            raise problems_at([("train", f"no source has a weight at rollout {empty[0]}")])
        return self


class GroupFilter(Settings):
    """Filter of solved groups, whose samples all have high, similar scores (Edit-R1). They are not trained on."""

    mean_above: float = Field(0.9, description="mean reward of the group above which it may be left out")
    std_below: float = Field(
        0.05, gt=0, description="standard deviation of the group's rewards below which it may be left out"
    )
    ban: bool = Field(True, description="never sample the prompt of such a group again in this run")


class OnlineRollout(Settings):
    """Train on samples of the policy itself."""

    kind: Literal["online"] = Field("online", description="samples generated during training")
    prompts: int = Field(16, ge=1, description="prompts per rollout, over all processes")
    group: int = Field(12, ge=1, description="samples per prompt")
    sampler: Sampler = Field(Sampler(), description="sampler of the rollouts")
    same_noise: bool = Field(
        False, description="share one initial noise within a group (DanceGRPO); requires stochastic steps"
    )
    chunk: int = Field(256, ge=1, description="samples per network call during sampling")
    decode_chunk: int = Field(64, ge=1, description="samples decoded at a time")
    recompute: bool = Field(
        False,
        description="compute the log-probabilities of the rollout again, with the batches and the graph of the update; "
        "costs one more forward pass",
    )
    filter: GroupFilter | None = Field(None, description="groups left out of training; null = none")
    keep: int | None = Field(
        None,
        ge=2,
        description="number of samples per group to train on, chosen for the largest variance of their rewards (PODS); "
        "advantages are computed over the whole group; null = all",
    )
    overlap: Literal["none", "chunks", "next"] = Field(
        "none",
        description="when samples are scored: none = after all samples are generated | chunks = while the next "
        "chunk is sampled, with the same result | next = also while the next rollout is sampled, "
        "which therefore uses the policy of the previous step",
    )

    engine: Annotated[PoolEngine | SglangEngine | VllmOmniEngine, OneOf("engine", lambda: ENGINES)] | None = Field(
        None,
        description="where the samples are generated: {kind: pool}, {kind: sglang} or {kind: vllm_omni}; null = in "
        "this process",
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.same_noise and not self.sampler.stochastic:
            message = f"all samples of a group would be equal: {self.sampler.kind} adds no noise"
            raise problems_at([("same_noise", message)])
        if self.recompute and self.overlap == "next":
            message = "the policy has changed since the next rollout was sampled: use overlap none or chunks"
            raise problems_at([("recompute", message)])
        if self.filter is not None and self.filter.ban and self.overlap == "next":
            message = "the next rollout is sampled before this one's groups are filtered: set ban: false, or overlap"
            raise problems_at([("filter.ban", message)])
        return self


class Buckets(Settings):
    """Sizes for stored media of different shapes (aspect buckets, SDXL, arXiv 2307.01952): each step uses one size."""

    step: int = Field(
        64,
        ge=8,
        le=1024,
        multiple_of=8,
        description="height and width of a bucket are multiples of this many pixels, and of what the model needs",
    )
    ratio: float = Field(2.0, ge=1, le=16, description="maximum ratio of the longer to the shorter side")
    beyond: Literal["crop", "stop"] = Field(
        "crop",
        description="a row with a larger ratio: crop = cropped to the last bucket | stop = an error, or left out with "
        "prompts.bad: skip",
    )


class StoredRollout(Settings):
    """Train on a table with a column ``prompt`` and :attr:`columns`; file names are relative to the table."""

    columns: ClassVar[tuple[str, ...]]
    """Columns with the images or videos of a row, which are its group."""

    kind: str
    file: str = Field(description=".jsonl, .csv or .parquet file, or hub:owner/name[:split]")
    prompts: int = Field(16, ge=1, description="rows per step, over all processes")
    buckets: Buckets | None = Field(
        None,
        description="give each row the size nearest to its aspect ratio, among sizes with about as many pixels as "
        "generator.size: {step: 64, ratio: 2}; null = every row is cropped to generator.size",
    )

    @property
    def group(self) -> int:
        """Samples per row."""
        return len(self.columns)


class PairsRollout(StoredRollout):
    """Train on stored preferences: columns prompt, chosen, rejected, and optionally their scores."""

    columns: ClassVar = ("chosen", "rejected")
    kind: Literal["pairs"] = Field("pairs", description="preference pairs from a file")
    dimension: str | None = Field(
        None,
        min_length=1,
        description="decide which sample is better by the columns chosen_score.NAME and rejected_score.NAME of this "
        "NAME, such as VQ; rows with equal scores need prompts.bad: skip; null = as in the file",
    )


class SamplesRollout(StoredRollout):
    """Train on stored samples: columns prompt and sample, and reward if samples are weighted by it."""

    columns: ClassVar = ("sample",)
    kind: Literal["samples"] = Field("samples", description="samples from a file")
    by_reward: bool = Field(
        False,
        description="weight the samples of a step by the column reward, compared across prompts; false = all "
        "samples count equally",
    )


ROLLOUTS = {"online": OnlineRollout, "pairs": PairsRollout, "samples": SamplesRollout}
