"""Settings for training a reward, read from YAML like those of a training run. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from align.checking.check import generator_problems
from align.config import registry
from align.config.load import Files, load_settings
from align.config.memory import conflicts, missing
from align.config.model import GeneratorConfig
from align.config.sampling import Sampler
from align.config.sections import REWARD
from align.data.pair_table import read_judged
from align.data.prompts import read_prompts
from align.data.tables import table_problems
from align.runs import devices
from alignflow.devices import NAMES, malformed
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import OneOf, listing, problems_at
from alignflow.settings import RunSettings, Settings
from alignflow.words import one_line
from generators.settings import Memory
from rewards.base import RewardSettings
from rewards.judges.models import Local
from rewards.judges.settings import JudgeRewardSettings
from rewards.training.objectives import OBJECTIVES, Objective
from rewards.training.settings import BACKBONES, HEADS, AnyBackbone, Backbone, HeadSettings, VariationalSettings

BACKBONE = OneOf("backbone", lambda: BACKBONES, default="clip")
HEAD = OneOf("head", lambda: HEADS, default="mlp")
OBJECTIVE = OneOf("loss", lambda: OBJECTIVES, default="bt")


class Data(Settings):
    """Tables with columns prompt, chosen, rejected, optionally tie and user; for regression: prompt, image, score.

    Losses on several scores read columns chosen_score.NAME and rejected_score.NAME.
    """

    train: str = Field(description="training rows: .jsonl, .csv, .parquet or hub:owner/name[:split]")
    heldout: str | None = Field(None, description="held-out rows, for the reported accuracy; null = none")
    limit: int | None = Field(
        None, ge=1, description="maximum number of training rows, counted from the first; null = all"
    )


class Steps(Settings):
    """Settings of the optimizer."""

    steps: int = Field(500, ge=1, description="AdamW steps")
    batch: int = Field(64, ge=1, description="pairs per step")
    lr: float = Field(1e-3, gt=0, description="learning rate of the head or the LoRA")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of all trained weights")
    log_every: int = Field(50, ge=1, description="steps between rows of metrics.jsonl")


def _device(name: str) -> str:
    if wrong := malformed(name):
        raise problems_at([("", wrong)], name)
    return name


Device = Annotated[str, AfterValidator(_device)]
"""The name of a device, well formed."""


class Fit(Steps):
    """Optimizer settings for a head and the trained part of its backbone."""

    lr: float = Field(1e-3, ge=0, description="learning rate of the head; 0 = no learning (a control run)")
    backbone_lr: float = Field(1e-5, ge=0, description="learning rate of the trained part of the backbone")
    checkpoint: int = Field(100, ge=1, description="steps between checkpoints; an interrupt leaves one too")


class RewardTrainConfig(RunSettings):
    """Settings for training one reward; the run folder is the reward."""

    command = "reward train"
    trains = "a reward"

    device: Device = Field("cpu", description=NAMES)
    data: Data = Field(description="preference tables")
    backbone: Annotated[AnyBackbone, BACKBONE] = Field(
        Backbone(), description="backbone that provides the head's features: clip or vlm"
    )
    head: Annotated[HeadSettings, HEAD] = Field(HEADS["mlp"](kind="mlp"), description="head: features to score")
    loss: Annotated[Objective, OBJECTIVE] = Field(OBJECTIVES["bt"](kind="bt"), description="training objective")
    fit: Fit = Field(Fit(), description="optimizer settings")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems, head, loss = [], self.head, self.loss
        if loss.heads and head.kind not in loss.heads:
            problems.append(("loss", f"{loss.kind} is made for head {', '.join(loss.heads)}, not {head.kind}"))
        if loss.labelled and not head.labels:
            problems.append(("head", f"loss {loss.kind} needs names; give head.aspects: {{aspect: [criterion, ...]}}"))
        if head.compares and not self.backbone.apart:
            problems.append(("head", f"{head.kind} compares image and prompt, which a vlm backbone encodes together"))
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
    """Prompts to sample from, in any form that training accepts."""

    train: str = Field(
        description="training prompts: shapes:train, .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]"
    )
    limit: int = Field(256, ge=1, description="maximum number of training prompts, counted from the first")
    heldout: str | None = Field(None, description="held-out prompts, for the reported ranking accuracy; null = none")
    measured: int = Field(32, ge=1, description="maximum number of held-out prompts, counted from the first")


class LatentTrainConfig(RunSettings):
    """Settings for training one latent reward on scored samples of a generator; the run folder is the reward."""

    command = "reward train"
    trains = "a latent reward"

    generator: GeneratorConfig = Field(description="generator whose latents the reward judges")
    memory: Memory = Field(
        Memory(), description="memory settings, as for training; presets are available for training only"
    )
    prompts: LatentPrompts = Field(description="prompts to sample from")
    sampler: Sampler = Field(Sampler(), description="sampler of the training samples; must be deterministic")
    samples: int = Field(4, ge=2, description="samples per prompt, which are ranked")
    chunk: int = Field(64, ge=1, description="samples generated at a time")
    reward: Annotated[RewardSettings, REWARD] = Field(description="reward whose scores are learned")
    text: Backbone = Field(Backbone(), description="CLIP that encodes the prompts")
    width: int = Field(64, ge=8, multiple_of=8, description="width of the convolutions")
    blocks: int = Field(3, ge=1, description="downsampling blocks, each of which halves the latent's size")
    ranking: float = Field(1.0, ge=0, description="weight of the Bradley-Terry loss between samples of a prompt")
    fit: Fit = Field(Fit(), description="optimizer settings; batch counts samples")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = conflicts(self.generator, self.memory)
        if self.text.tune != "none":
            problems.append(("text.tune", "prompts are encoded by the frozen CLIP: use none"))
        if problems:
            raise problems_at(problems)
        return self


class JudgeLora(Settings):
    """The trained part of a judge."""

    rank: int = Field(16, ge=1, description="LoRA rank")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="language-model layers to adapt, by the end of their names",
    )


class JudgeTrainConfig(RunSettings):
    """Settings for training one judge on preferences; the run folder is a LoRA for ``judge: {lora: ...}``."""

    command = "reward train"
    trains = "a judge"

    device: Device = Field("cpu", description=NAMES)
    data: Data = Field(
        description="preference tables: prompt, chosen, rejected, and optionally reason, which follows the "
        "verdict in the training replies"
    )
    reward: Annotated[RewardSettings, REWARD] = Field(
        description="reward that queries the judge: yes_probability, reward_dance, pairwise or paco, with a local judge"
    )
    lora: JudgeLora = Field(JudgeLora(), description="LoRA to train")
    verdict: float = Field(
        0.1,
        gt=0,
        le=1,
        description="loss weight of a reply's first token (the verdict) relative to the rest; applies to rows "
        "with a reason",
    )
    fit: Steps = Field(Steps(steps=200, batch=8, lr=1e-4), description="optimizer settings")

    @model_validator(mode="after")
    def _teachable(self) -> Self:
        if not (isinstance(self.reward, JudgeRewardSettings) and self.reward.taught):
            kinds = [name for name, kind in registry.rewards().items() if getattr(kind, "taught", False)]
            kind = getattr(self.reward, "kind", "")
            raise problems_at(
                [("reward.kind", f"a judge cannot be trained on pairs for {kind}; it can for {listing(kinds)}")]
            )
        if not isinstance(self.reward.judge, Local):
            raise problems_at([("reward.judge", "a judge behind a server is not trained from here; name a local one")])
        if self.reward.wants:
            raise problems_at(
                [
                    (
                        "reward",
                        f"shows {listing(self.reward.wants)} of the prompt, which training on pairs does not support",
                    )
                ]
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
        problems += [
            *generator_problems(config.generator),
            *missing(config.memory, training=False, device=config.generator.device),
        ]
        part, read = "prompts", partial(read_prompts, count=1)
    else:
        problems += devices.problems("device", getattr(config, "device", "cpu"))
        part, read = "data", partial(read_judged, single=isinstance(config, RewardTrainConfig) and config.loss.single)
    for name in ("train", "heldout"):
        if (source := getattr(getattr(config, part), name)) is not None:
            problems += table_problems(f"{part}.{name}", source, read)
    if problems:
        raise ConfigError(problems, config.name)
