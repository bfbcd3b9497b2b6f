"""Sections of the settings of a training run: frozen, strict, every field described.

Class defaults are tested settings. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from align.config import registry
from align.config.model import POLICIES, FullPolicy, GatePolicy, GeneratorConfig, LoRAPolicy, UsersPolicy
from align.config.parallel import Parallel
from align.config.sampling import Sampler
from align.config.sources import ROLLOUTS as ROLLOUTS
from align.config.sources import GroupFilter as GroupFilter
from align.config.sources import OnlineRollout as OnlineRollout
from align.config.sources import PairsRollout as PairsRollout
from align.config.sources import Prompts as Prompts
from align.config.sources import SamplesRollout as SamplesRollout
from align.recipes.base import Recipe
from alignflow import plugins
from alignflow.kinds import FAMILIES, OneOf, from_outside, problems_at
from alignflow.settings import RunSettings, Settings, WithoutSecrets
from alignflow.strict import Named
from generators.settings import Memory, Side
from rewards.base import RewardSettings

# -- the loop ---------------------------------------------------------------------------------------------------------


class Train(Settings):
    """Optimisation settings."""

    renamed: ClassVar[dict[str, str]] = {"micro_batch": "chunk"}

    steps: int = Field(
        100, ge=1, le=10_000_000, description="training steps; each is one rollout followed by its optimizer steps"
    )
    updates: int = Field(
        1, ge=1, le=100_000, description="optimizer steps per rollout, each on an equal share of the loss terms"
    )
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw",
        description="torch AdamW, or a bitsandbytes variant: adamw8bit = 8-bit states | paged_adamw = states "
        "paged to the CPU | paged_adamw8bit = both",
    )
    lr: float = Field(3e-4, ge=0, description="peak learning rate of AdamW; 0 = no learning (a control run)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay")
    warmup: int = Field(0, ge=0, description="optimizer steps over which the learning rate rises from 0; 0 = no warmup")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after the warmup: constant, or decay to 0 along a cosine or a line"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="maximum gradient norm; larger gradients are scaled down to it")
    chunk: int = Field(192, ge=1, description="loss terms per forward and backward pass; affects memory, not results")
    ema: float = Field(
        0.9, ge=0, lt=1, description="decay per optimizer step of the averaged (EMA) weights; 0 = no average"
    )
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="autocast of forward passes; no = float32")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    unscored: int = Field(
        10,
        ge=0,
        description="stop after more than this many consecutive rollouts without any score (only once the reward "
        "has worked)",
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads; null = the fastest number, measured at the start"
    )

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise problems_at([("", "both should be in [0, 1)")], betas)
        return betas


def _rewards_outside(data: dict[str, Any]) -> RewardSettings:
    import rewards

    return rewards.parse(data)


@cache
def unread_settings(base: type[BaseModel]) -> type[BaseModel]:
    """Placeholder settings for a class that was not imported; they accept any key."""

    class Unread(base):  # type: ignore[valid-type, misc]
        model_config = ConfigDict(extra="allow", frozen=True)

    return Unread


def is_unread(settings: BaseModel) -> bool:
    """Whether settings are a placeholder for those of a class that was not imported."""
    return type(settings).__name__ == "Unread"


def derived(base: type[BaseModel]) -> Callable[[dict[str, Any]], Any]:
    """Parser of settings whose kind is a class outside the repository, ``package.module:name``, based on ``base``."""

    def make(data: dict[str, Any]) -> Any:
        try:
            if not plugins.runs():
                plugins.find(data["kind"])
                return unread_settings(base).model_validate(data)
            cls = plugins.load(data["kind"])
        except plugins.PluginError as error:
            raise problems_at([("kind", str(error))], data["kind"]) from None
        if not (isinstance(cls, type) and issubclass(cls, base)):
            message = f"{data['kind']} is not a class derived from {base.__module__}.{base.__name__}"
            raise problems_at([("kind", message)])
        return from_outside(cls).model_validate(data)

    return make


REWARD = OneOf("reward", registry.rewards, outside=_rewards_outside)
RECIPE = OneOf("recipe", registry.recipes, outside=derived(Recipe))
FAMILIES.update({RewardSettings: REWARD, Recipe: RECIPE})


class RewardOnly(WithoutSecrets):
    """A single reward, for commands that score."""

    reward: Annotated[RewardSettings, REWARD] = Field(description="reward to compute")


class Evaluate(Settings):
    """Evaluation on held-out prompts during training."""

    every: int = Field(10, ge=0, description="training steps between evaluations; 0 = only before and after training")
    prompts: int = Field(256, ge=1, description="number of held-out prompts, one sample each")
    seed: int = Field(
        0, ge=0, lt=2**32, description="random seed of the evaluation noise, which is the same at every evaluation"
    )
    sampler: Sampler = Field(Sampler(), description="sampler of the evaluation samples")
    size: tuple[Side, Side] | None = Field(
        None,
        description="[height, width] in pixels of the evaluation samples and sample grids; null = generator.size, the "
        "size of the rollouts, which may be smaller to save time (PaCo-RL)",
    )
    chunk: int = Field(256, ge=1, description="samples generated and scored at a time")
    rewards: Annotated[dict[str, Annotated[RewardSettings, REWARD]], Named] = Field(
        {}, description="rewards to report, by name"
    )
    gold: str | None = Field(
        None,
        description="name of the reward in evaluate.rewards that is the held-out metric and decides about reward "
        "hacking; null = none",
    )
    role: Literal["ema", "policy"] = Field(
        "ema",
        description="weights to evaluate: ema = the averaged weights, or the policy if train.ema is 0 | policy = "
        "the current weights",
    )
    at_start: bool = Field(True, description="evaluate the base model before the first step")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many evaluations in a row without a new highest score of checkpoint.best; null "
        "= never",
    )
    hacking: Literal["warn", "stop"] = Field(
        "warn",
        description="when the optimised reward has risen while gold has fallen or the rollouts have lost half of their "
        "diversity: warn, or also stop the run. Such an evaluation never counts as the best",
    )


class Samples(Settings):
    """Images or videos saved during training, with the same prompts and seeds every time."""

    renamed: ClassVar[dict[str, str]] = {"clips": "video"}

    every: int = Field(10, ge=0, description="training steps between sample grids; 0 = only before and after training")
    count: int = Field(8, ge=0, description="samples per grid; 0 = none")
    video: Literal["webp", "gif", "mp4"] = Field(
        "webp", description="file format of videos; the middle frame is saved beside each as PNG"
    )
    fps: float = Field(16, gt=0, description="frames per second of saved videos")


class Checkpoint(Settings):
    """Full training states to resume from."""

    every: int = Field(10, ge=0, description="training steps between checkpoints; 0 = only at the end")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    best: str | None = Field(
        None,
        description="name of a reward in evaluate.rewards; the checkpoint with its highest score is kept too; "
        "null = none",
    )


class Sections(RunSettings):
    """Settings of one training run, each section by itself."""

    command = "train"

    generator: GeneratorConfig = Field(description="pipeline to align")
    policy: Annotated[LoRAPolicy | FullPolicy | GatePolicy | UsersPolicy, OneOf("policy", lambda: POLICIES, "lora")] = (
        Field(
            LoRAPolicy(),
            description="trained part of the generator: a LoRA, all weights, a gate over LoRAs, or attention to users",
        )
    )
    prompts: Prompts = Field(description="training and held-out prompts")
    rollout: Annotated[
        OnlineRollout | PairsRollout | SamplesRollout,
        OneOf("rollout", lambda: ROLLOUTS, "online"),
    ] = Field(OnlineRollout(), description="source of the training samples")
    reward: Annotated[RewardSettings, REWARD] | None = Field(
        None, description="reward to optimise; may be null for stored pairs or samples"
    )
    recipe: Annotated[Recipe, RECIPE] = Field(description="training algorithm")
    train: Train = Field(Train(), description="optimisation")
    memory: Memory = Field(Memory(), description="memory settings, or a preset: 12gb, 16gb, 24gb, 48gb, 80gb")
    parallel: Parallel = Field(Parallel(), description="division of work among processes, beyond that of the prompts")
    evaluate: Evaluate = Field(Evaluate(), description="evaluation on held-out prompts")
    samples: Samples = Field(Samples(), description="images or videos saved during training")
    checkpoint: Checkpoint = Field(Checkpoint(), description="full training states to resume from")
    trackers: list[
        Literal["tensorboard", "wandb", "trackio", "aim", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab"]
    ] = Field([], description="accelerate trackers to log to; metrics.jsonl is always written")
