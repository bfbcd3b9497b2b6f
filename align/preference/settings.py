"""The settings tree of training a reward, read from YAML as that of a training run is. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from align.checking.check import generator_problems, one_line, table_problems
from align.config import registry
from align.config.load import Files, load_settings
from align.config.memory import Memory
from align.config.sampling import Sampler
from align.config.settings import REWARD, GeneratorConfig
from align.data.prompts import read_prompts
from align.preference.table import read_judged
from align.runs import devices
from alignflow.devices import NAMES, malformed
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import OneOf, listing, problems_at
from alignflow.settings import RunSettings, Settings
from rewards.base import RewardSettings
from rewards.judges.settings import JudgeRewardSettings, Local
from rewards.training.objectives import OBJECTIVES, Objective
from rewards.training.settings import HEADS, Backbone, HeadSettings, VariationalSettings

HEAD = OneOf("head", lambda: HEADS, default="mlp")
OBJECTIVE = OneOf("loss", lambda: OBJECTIVES, default="bt")


class Data(Settings):
    """Tables with prompt, chosen, rejected and, if they matter, tie and user; of regression: prompt, image, score."""

    train: str = Field(description="rows to learn from: .jsonl, .csv, .parquet or hub:owner/name[:split]")
    heldout: str | None = Field(None, description="rows never learnt from, for the accuracy that is reported")
    limit: int | None = Field(None, ge=1, description="use only the first so many rows to learn from")


class Steps(Settings):
    """The optimisation."""

    steps: int = Field(500, ge=1, description="steps of AdamW")
    batch: int = Field(64, ge=1, description="pairs per step")
    lr: float = Field(1e-3, gt=0, description="of the head, or of the LoRA")
    weight_decay: float = Field(0.01, ge=0, description="of all that is trained")
    log_every: int = Field(50, ge=1, description="steps between rows of metrics.jsonl")


def _device(name: str) -> str:
    if wrong := malformed(name):
        raise problems_at([("", wrong)], name)
    return name


Device = Annotated[str, AfterValidator(_device)]
"""The name of a device, well formed."""


class Fit(Steps):
    """The optimisation of a head, and of what is trained in the backbone."""

    backbone_lr: float = Field(1e-5, gt=0, description="of what is trained in the backbone")


class RewardTrainConfig(RunSettings):
    """One reward to train; its run folder is the reward."""

    command = "reward train"

    device: Device = Field("cpu", description=NAMES)
    data: Data = Field(description="preferences")
    backbone: Backbone = Field(Backbone(), description="whose features the head reads")
    head: Annotated[HeadSettings, HEAD] = Field(HEADS["mlp"](kind="mlp"), description="features -> score")
    loss: Annotated[Objective, OBJECTIVE] = Field(OBJECTIVES["bt"](kind="bt"), description="what it is trained for")
    fit: Fit = Field(Fit(), description="how")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems, head, loss = [], self.head, self.loss
        if loss.heads and head.kind not in loss.heads:
            problems.append(("loss", f"{loss.kind} is made for head {', '.join(loss.heads)}, not {head.kind}"))
        if isinstance(head, VariationalSettings):
            if loss.single:
                problems.append(("loss", "a latent user is inferred from pairs; regression has none"))
            if self.fit.batch < 2 * head.per_user:  # steps of one user each would undo one another
                problems.append(("fit.batch", f"should hold two users, {2 * head.per_user} pairs with this head"))
        if problems:
            raise problems_at(problems)
        return self


def load_reward_training(path: Files, overrides: Sequence[str] = ()) -> RewardTrainConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, RewardTrainConfig)


class LatentPrompts(Settings):
    """What is drawn to learn from, in any form that training reads."""

    train: str = Field(description="shapes:train, .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]")
    limit: int = Field(256, ge=1, description="the first so many")
    heldout: str | None = Field(None, description="prompts never learnt from, for the ranking that is reported")
    measured: int = Field(32, ge=1, description="the first so many of those")


class LatentTrainConfig(RunSettings):
    """One latent reward to train on samples of a generator and their scores; its run folder is the reward."""

    command = "reward latent"

    generator: GeneratorConfig = Field(description="whose latents are judged")
    memory: Memory = Field(Memory(), description="what fits a card, as in training; presets are for training alone")
    prompts: LatentPrompts = Field(description="what is drawn")
    sampler: Sampler = Field(Sampler(), description="how it is drawn, by steps without noise")
    samples: int = Field(4, ge=2, description="of each prompt; they are ranked among each other")
    chunk: int = Field(64, ge=1, description="samples drawn at once")
    reward: Annotated[RewardSettings, REWARD] = Field(description="whose scores are learnt")
    text: Backbone = Field(Backbone(), description="the CLIP that reads the prompts")
    width: int = Field(64, ge=8, multiple_of=8, description="of the convolutions")
    blocks: int = Field(3, ge=1, description="halvings of the latent's size")
    ranking: float = Field(1.0, ge=0, description="weight of Bradley-Terry between a prompt's samples")
    fit: Fit = Field(Fit(), description="how; a batch counts samples")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.text.tune != "none":
            raise problems_at([("text.tune", "prompts are read by the CLIP as it is")])
        return self


class JudgeLora(Settings):
    """The part of a judge that learns."""

    rank: int = Field(16, ge=1, description="of the LoRA")
    alpha: float = Field(32.0, gt=0, description="of the LoRA")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="ends of the names of the language layers that get one",
    )


class JudgeTrainConfig(RunSettings):
    """One judge to teach by preferences; its run folder is the LoRA for ``judge: {model: ..., lora: ...}``."""

    command = "reward judge"

    device: Device = Field("cpu", description=NAMES)
    data: Data = Field(description="preferences: prompt, chosen, rejected, maybe reason, said behind the verdict")
    reward: Annotated[RewardSettings, REWARD] = Field(
        description="what asks the judge: yes_probability, reward_dance or pairwise, with a local judge"
    )
    lora: JudgeLora = Field(JudgeLora(), description="what is trained")
    verdict: float = Field(
        0.1, gt=0, le=1, description="weight of a reply's first token against the rest of it, where there is a reason"
    )
    fit: Steps = Field(Steps(steps=200, batch=8, lr=1e-4), description="how")

    @model_validator(mode="after")
    def _teachable(self) -> Self:
        if not (isinstance(self.reward, JudgeRewardSettings) and self.reward.taught):
            kinds = [name for name, kind in registry.rewards().items() if getattr(kind, "taught", False)]
            kind = getattr(self.reward, "kind", "")
            raise problems_at([("reward.kind", f"no judge is taught by pairs for {kind}; for {listing(kinds)}")])
        if not isinstance(self.reward.judge, Local):
            raise problems_at([("reward.judge", "a judge behind a server is not trained from here; name a local one")])
        if self.reward.wants:
            raise problems_at(
                [("reward", f"shows {listing(self.reward.wants)} of the prompt; pairs are taught without")]
            )
        return self

    @property
    def asking(self) -> JudgeRewardSettings:
        """The reward, known to ask a judge."""
        assert isinstance(self.reward, JudgeRewardSettings)
        return self.reward


def load_judge_training(path: Files, overrides: Sequence[str] = ()) -> JudgeTrainConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, JudgeTrainConfig)


def load_latent_training(path: Files, overrides: Sequence[str] = ()) -> LatentTrainConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, LatentTrainConfig)


def essentials(config: RunSettings) -> list[tuple[str, str]]:
    """(name, what the config resolves to) for the lines of ``check``; parts that are all default are left out."""
    lines = [("run", f"{config.name}, seed {config.seed}, into {config.run_dir}")]
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            kind = {"kind": value.kind} if hasattr(value, "kind") else {}
            value = one_line({**kind, **value.model_dump(mode="json", exclude_defaults=True)})
        if name not in RunSettings.model_fields and value:
            lines.append((name, str(value)))
    return lines


def check_files(config: RunSettings) -> None:
    """Raise ConfigError for tables, prompts or a generator that are not there; the hub is not asked."""
    read: Callable[[str], object]
    problems: list[Problem] = []
    if isinstance(config, LatentTrainConfig):
        problems += generator_problems(config.generator)
        part, read = "prompts", partial(read_prompts, count=1)
    else:
        problems += devices.problems("device", getattr(config, "device", "cpu"))
        part, read = "data", partial(read_judged, single=isinstance(config, RewardTrainConfig) and config.loss.single)
    for name in ("train", "heldout"):
        if (source := getattr(getattr(config, part), name)) is not None:
            problems += table_problems(f"{part}.{name}", source, read)
    if problems:
        raise ConfigError(problems, config.name)
