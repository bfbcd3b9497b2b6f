"""Settings of a search, read from YAML like those of a training run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from align.checking.check import generator_problems
from align.checking.folder_check import lora_problems
from align.config import registry
from align.config.load import Files, load_settings
from align.config.memory import conflicts, missing
from align.config.model import GeneratorConfig
from align.config.sampling import sampler_line
from align.config.sections import REWARD, Samples, derived
from align.data.prompts import read_prompts
from align.data.tables import table_problems
from align.runs import devices
from align.search.base import Method
from align.search.budget import Budget
from alignflow.errors import ConfigError
from alignflow.kinds import OneOf, problems_at
from alignflow.settings import RunSettings, Settings
from alignflow.strict import Named
from alignflow.words import one_line, reward_lines
from generators.settings import Memory
from rewards.base import RewardSettings
from rewards.scopes import without_gradient

REMEDY = "take one that scores each sample alone"
METHOD = OneOf("search method", registry.searches, outside=derived(Method))


class SearchOnly(Settings):
    """A search method and its budget, for use from Python."""

    search: Annotated[Method, METHOD] = Field(description="search method")
    budget: Budget = Field(description="budget per prompt")


class SearchPrompts(Settings):
    """Prompts to search, in any form that training accepts."""

    source: str = Field(description="prompts: shapes:heldout, .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]")
    limit: int | None = Field(8, ge=1, description="maximum number of prompts, counted from the first; null = all")
    seed: int = Field(0, ge=0, lt=2**32, description="random seed that selects prompts of the embedded world")
    bad: Literal["stop", "skip"] = Field(
        "stop",
        description="handling of unusable rows (prompts too long, images missing or damaged): stop = raise an "
        "error | skip = leave them out",
    )


class SearchConfig(RunSettings):
    """Settings of one search."""

    command = "search"

    generator: GeneratorConfig = Field(description="pipeline to search samples of")
    memory: Memory = Field(
        Memory(), description="memory settings, as for training; presets are available for training only"
    )
    lora: str | None = Field(
        None, description="LoRA to load into the generator: a file, a folder or a training run; null = none"
    )
    prompts: SearchPrompts = Field(description="prompts to search")
    reward: Annotated[RewardSettings, REWARD] = Field(description="reward to optimise")
    latent_reward: str | None = Field(
        None,
        description="reward of unfinished, undecoded samples: a folder written by alignflow reward train, or "
        "package.module:name with signature (x_t [n, ...], t [n], prompts) -> [n]; null = none",
    )
    search: Annotated[Method, METHOD] = Field(description="search method")
    budget: Budget = Field(description="budget per prompt")
    baseline: Literal["best_of_n"] | None = Field(
        None,
        description="result to compare the search with: best_of_n = independent samples of the same prompts, with as "
        "many network calls as the search spent, which doubles the cost | null = none",
    )
    gold: Annotated[dict[str, Annotated[RewardSettings, REWARD]], Named] = Field(
        {}, description="rewards by name that are reported for the plain and the best sample, but not optimised"
    )
    batch: int = Field(
        8,
        ge=1,
        description="prompts searched together; an interrupt loses those in progress; hyper_noise trains on a batch",
    )
    chunk: int = Field(64, ge=1, description="samples per network call")
    decode_chunk: int = Field(16, ge=1, description="samples per decode, reward call and gradient")
    keep: int = Field(4, ge=1, description="best candidates saved per prompt, in addition to the worst")
    samples: Samples = Field(Samples(), description="file formats of saved images and videos")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        parts = getattr(self.reward, "parts", {})
        problems = [
            (f"reward.parts.{name}.normalise", f"{part.normalise} compares samples scored together; take none or range")
            for name, part in parts.items()
            if part.normalise in ("group", "batch")
        ]
        judges = {f"gold.{name}": reward for name, reward in self.gold.items()}
        judges |= {} if problems else {"reward": self.reward}
        problems += [
            (place, f"compares samples of a {scope} with one another, and a search scores them apart; {REMEDY}")
            for place, reward in judges.items()
            if (scope := reward.compares()) not in (None, "sample")
        ]
        if self.search.gradients and self.reward.gradient() is False:
            at_fault = without_gradient(self.reward)
            problems += [(place, self.search.without_gradient(reward)) for place, reward in at_fault.items()]
        if self.baseline == self.search.kind:
            problems.append(("baseline", f"the search is {self.baseline} itself; set it to null"))
        if wrong := self.search.wrong_latent(self.latent_reward is not None):
            problems.append(("latent_reward", wrong))
        if self.latent_reward is not None and ":" not in self.latent_reward and not Path(self.latent_reward).is_dir():
            problems.append(("latent_reward", f"no folder {self.latent_reward}, and not package.module:name"))
        if "reward" in self.gold:
            problems.append(("gold.reward", "is the name of the optimised reward; choose another"))
        problems += conflicts(self.generator, self.memory)
        if problems:
            raise problems_at(problems)
        return self


def load_search(path: Files, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a search's config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, SearchConfig)


def essentials(config: SearchConfig) -> list[tuple[str, str]]:
    """(name, what the config resolves to) for the lines of ``check``."""
    generator, method = config.generator, config.search
    return [
        ("run", f"{config.name}, seed {config.seed}, into {config.run_dir}"),
        ("generator", f"{generator.kind} {generator.path}, {generator.dtype}, device {devices.said(generator.device)}"),
        ("prompts", f"{config.prompts.source}, {config.prompts.limit or 'all'}"),
        *reward_lines(config.reward.model_dump(mode="json", exclude_none=True)),
        ("search", one_line(method.model_dump(mode="json", exclude_none=True, exclude={"sampler"}))),
        ("sampler", sampler_line(method.sampler)),
        ("budget", f"{config.budget} per prompt"),
        *([("baseline", f"{config.baseline}, with the network calls of the search")] if config.baseline else []),
        ("gold", ", ".join(config.gold) or "none"),
    ]


def check_files(config: SearchConfig) -> None:
    """Raise ConfigError for a generator, prompts or a LoRA that are not there; the hub is not asked."""
    skipped: dict[str, str] | None = {} if config.prompts.bad == "skip" else None
    problems = [
        *generator_problems(config.generator),
        *table_problems("prompts.source", config.prompts.source, partial(read_prompts, count=1, skipped=skipped)),
    ]
    problems += missing(config.memory, training=False, device=config.generator.device)
    if config.lora is not None:
        problems += lora_problems(config.lora, "lora", policy=True)
    if problems:
        raise ConfigError(problems, config.name)
