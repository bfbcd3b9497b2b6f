"""Settings of ``alignflow prompts``, read from YAML like those of a training run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from align.checking.check import generator_problems
from align.checking.folder_check import lora_problems
from align.config.load import Files, load_settings
from align.config.memory import conflicts, missing
from align.config.model import GeneratorConfig
from align.config.sampling import Sampler
from align.config.sections import REWARD
from align.data.prompts import read_prompts
from align.data.tables import table_problems
from align.preference.settings import JudgeLora
from align.rewriting.table import read_rewrites
from align.rewriting.words import EVOLVE, REWRITE
from align.runs import devices
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import OneOf, problems_at
from alignflow.paths import is_dir
from alignflow.settings import RunSettings, Settings
from alignflow.strict import Named
from alignflow.words import one_line
from generators.settings import Memory
from rewards.base import RewardError, RewardSettings
from rewards.judges.models import Endpoint
from rewards.networks.hub import find_model


def holds(*names: str) -> Any:
    """Validator of a template that must hold ``{name}`` for each of the names."""

    def check(template: str | None) -> str | None:
        absent = [] if template is None else [name for name in names if "{" + name + "}" not in template]
        if absent:
            raise PydanticCustomError("setting", "does not show {absent}", {"absent": "{" + absent[0] + "}"})
        return template

    return AfterValidator(check)


class LocalWriter(Settings):
    """A causal language model of transformers in this process."""

    kind: Literal["local"] = Field("local", description="causal language model in this process")
    model: str = Field(
        "Qwen/Qwen2.5-7B-Instruct",
        description="shapes (the embedded world's rewriter), or a folder or hub id with model and tokenizer",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")
    chunk: int = Field(16, ge=1, description="replies per network call")
    lora: str | None = Field(None, description="folder written by alignflow prompts train; null = none")


class EndpointWriter(Endpoint):
    """A language model behind an OpenAI-compatible server."""


WRITERS: dict[str, type[BaseModel]] = {"local": LocalWriter, "endpoint": EndpointWriter}
AnyWriter = LocalWriter | EndpointWriter
WRITER = OneOf("writer", lambda: WRITERS, default="local")


class Reply(Settings):
    """Instruction and sampling of rewrites."""

    template: Annotated[str, holds("prompt")] = Field(REWRITE, description="instruction; shows {prompt}")
    temperature: float = Field(1.0, ge=0, le=10, description="sampling temperature; 0 = the likeliest token")
    longest: int = Field(128, ge=1, description="maximum number of tokens per rewrite")


class Evolution(Reply):
    """Instruction and sampling of rewrites in view of earlier ones."""

    template: Annotated[str, holds("prompt", "history")] = Field(
        EVOLVE, description="instruction; shows {prompt} and {history}, the best rewrites so far with their scores"
    )
    shown: int = Field(3, ge=1, description="number of best rewrites in the history")


class Rendering(Settings):
    """Sampling of the media of rewrites."""

    sampler: Sampler = Field(Sampler(), description="sampler of the images or videos; must be deterministic")
    samples: int = Field(
        2, ge=1, description="samples per rewrite, whose mean score counts; rewrites of a prompt share their noise"
    )
    chunk: int = Field(64, ge=1, description="samples generated at a time")

    @model_validator(mode="after")
    def _deterministic(self) -> Self:
        if self.sampler.stochastic:
            raise problems_at([("sampler.kind", "rewrites are compared on the same noise; take ode or dpm2")])
        return self


class Caption(Settings):
    """A term of the score on the rewrite's own words, as in VANS' Joint-GRPO."""

    column: str = Field("caption", description="column of the prompt table with the reference text")
    rouge: float = Field(1.0, ge=0, description="weight of ROUGE-L between rewrite and reference text")
    media: float = Field(1.0, ge=0, description="weight of the reward of the rendered rewrite")


class Users(Settings):
    """Users' prompts, in any form that training accepts."""

    train: str = Field(
        description="training prompts: shapes:train, .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]"
    )
    limit: int | None = Field(None, ge=1, description="maximum number of prompts, counted from the first; null = all")
    heldout: str | None = Field(None, description="held-out prompts, for the reported scores; null = none")
    measured: int = Field(64, ge=1, description="maximum number of held-out prompts, counted from the first")
    rewrites: str | None = Field(
        None,
        description="table of scored rewrites for sft and dpo, as alignflow prompts evolve writes it: prompt, rewrite, "
        "score, parts; null = the rewriter writes them first",
    )


class Pool(Settings):
    """Users' prompts to evolve, in any form that training accepts."""

    source: str = Field(description="prompts: shapes:train, .txt, .jsonl, .csv, .parquet or hub:owner/name[:split]")
    limit: int | None = Field(None, ge=1, description="maximum number of prompts, counted from the first; null = all")


class RewritingSettings(RunSettings):
    """Settings that all commands on prompts share: the rewriter, the frozen generator, and the reward."""

    writer: Annotated[AnyWriter, WRITER] = Field(
        LocalWriter(), description="language model that rewrites: local or endpoint"
    )
    generator: GeneratorConfig = Field(description="frozen generator that renders the rewrites")
    generator_lora: str | None = Field(
        None, description="LoRA to load into the generator: a file, a folder or a training run; null = none"
    )
    memory: Memory = Field(
        Memory(), description="memory settings, as for training; presets are available for training only"
    )
    reward: Annotated[RewardSettings, REWARD] = Field(
        description="reward of the rendered rewrite, which is given the user's own prompt"
    )
    gold: Annotated[dict[str, Annotated[RewardSettings, REWARD]], Named] = Field(
        {}, description="rewards by name that are reported beside the reward, but not optimised"
    )
    caption: Caption | None = Field(
        None, description="reference text of every prompt, with which rewrites are also compared; null = none"
    )
    rendering: Rendering = Field(Rendering(), description="samples of a rewrite")

    @model_validator(mode="after")
    def _scores_alone(self) -> Self:
        problems = [
            (place, f"compares samples of a {scope}; choose one that scores each sample alone")
            for place, reward in {"reward": self.reward, **{f"gold.{k}": v for k, v in self.gold.items()}}.items()
            if (scope := reward.compares()) not in (None, "sample")
        ]
        if "reward" in self.gold:
            problems.append(("gold.reward", "is the name of the optimised reward; choose another"))
        problems += conflicts(self.generator, self.memory)
        if problems:
            raise problems_at(problems)
        return self


class EvolveConfig(RewritingSettings):
    """Settings of an evolution of prompts."""

    command = "prompts evolve"

    prompts: Pool = Field(description="users' prompts")
    reply: Evolution = Field(Evolution(), description="instruction and sampling of the rewriter")
    rounds: int = Field(4, ge=1, description="rounds of proposals per prompt")
    proposals: int = Field(3, ge=1, description="rewrites proposed per round (Prompt-A-Video: 3)")
    parquet: bool = Field(False, description="write rewrites.parquet beside rewrites.jsonl")
    batch: int = Field(8, ge=1, description="prompts evolved together; an interrupt loses those in progress")


class Method(Settings):
    """Optimisation of the rewriter's LoRA."""

    steps: int = Field(100, ge=1, description="optimizer steps; for grpo, rounds of rewrites")
    batch: int = Field(8, ge=1, description="rewrites (sft), pairs (dpo) or prompts (grpo) per step")
    lr: float = Field(1e-5, ge=0, description="learning rate of AdamW; 0 = no learning (a control run)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")


class Sft(Method):
    """Cross-entropy on the best rewrites of each prompt."""

    kind: Literal["sft"] = Field("sft", description="supervised on the best rewrites")
    best: int = Field(1, ge=1, description="number of best rewrites per prompt to train on")


class Dpo(Method):
    """DPO on pairs of rewrites (Prompt-A-Video, arXiv 2412.15156)."""

    kind: Literal["dpo"] = Field("dpo", description="preferences between rewrites by threshold and gap")
    beta: float = Field(0.1, gt=0, description="strength of the penalty towards the reference (Prompt-A-Video: 0.1)")
    gap: float = Field(1.4, ge=0, description="minimum score difference of a pair, exclusive (Prompt-A-Video: 1.4)")
    ranks: int = Field(2, ge=1, description="number of best rewrites per prompt that may be chosen")
    above: dict[str, float] = Field(
        {}, description="thresholds (exclusive) of the reward's parts by name, which a chosen rewrite must exceed"
    )


class PolicyGradient(Method):
    """GRPO on the tokens of replies (arXiv 2402.03300)."""

    clip: float = Field(
        0.2, gt=0, lt=1, description="clipping range of a token's probability ratio: 1 - clip to 1 + clip"
    )
    kl: float = Field(0.001, ge=0, description="weight of the KL to the reference")
    updates: int = Field(1, ge=1, description="optimizer steps per round of replies")
    normalise_by: Literal["group", "global", "centred", "none"] = Field("group", description="divisor of the advantage")


class Grpo(PolicyGradient):
    """GRPO on the tokens of rewrites (PromptEnhancer, arXiv 2509.04545)."""

    kind: Literal["grpo"] = Field("grpo", description="policy gradient on rewrites that are rendered and scored")
    rewrites: int = Field(8, ge=2, description="rewrites per prompt (PromptEnhancer: 8)")
    kl: float = Field(0.001, ge=0, description="weight of the KL to the reference (PromptEnhancer: 0.001)")
    invalid: float | None = Field(
        None, description="score of a rewrite that is empty or too long for the generator; null = left out"
    )


METHODS: dict[str, type[Method]] = {"sft": Sft, "dpo": Dpo, "grpo": Grpo}
METHOD = OneOf("method", lambda: METHODS)


class WriterLora(JudgeLora):
    """The trained part of a rewriter."""


class RewriterConfig(RewritingSettings):
    """Settings for training one rewriter; the run folder is a LoRA for ``writer: {lora: ...}``."""

    command = "prompts train"

    prompts: Users = Field(description="users' prompts")
    reply: Reply = Field(Reply(), description="instruction and sampling of the rewriter")
    lora: WriterLora = Field(WriterLora(), description="LoRA to train, unless writer.lora is trained further")
    method: Annotated[Method, METHOD] = Field(description="training method: sft, dpo or grpo")
    candidates: int = Field(5, ge=2, description="rewrites written per prompt if there is no table")
    checkpoint: int = Field(10, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        problems = []
        if self.writer.kind != "local":
            problems.append(("writer", "a model behind a server is not trained from here; name a local one"))
        grpo = isinstance(self.method, Grpo)
        if self.prompts.rewrites is not None and grpo:
            problems.append(("prompts.rewrites", "grpo writes its own rewrites; a table is for sft and dpo"))
        if grpo and self.reply.temperature == 0:
            problems.append(("reply.temperature", "grpo compares different rewrites; 0 writes the same one each time"))
        if problems:
            raise problems_at(problems)
        return self


def load_rewriter(path: Files, overrides: Sequence[str] = ()) -> RewriterConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, RewriterConfig)


def load_evolve(path: Files, overrides: Sequence[str] = ()) -> EvolveConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, EvolveConfig)


def _sources(config: RewritingSettings) -> dict[str, str]:
    """Setting -> table of prompts."""
    named = config.model_dump(include={"prompts": {"source", "train", "heldout"}})["prompts"]
    return {f"prompts.{name}": source for name, source in named.items() if source is not None}


def essentials(config: RewritingSettings) -> list[tuple[str, str]]:
    """(name, what the config resolves to) for the lines of ``check``."""
    generator = config.generator
    rest = {"writer", "reward", "rendering", "method"} & set(type(config).model_fields)
    return [
        ("run", f"{config.name}, seed {config.seed}, into {config.run_dir}"),
        ("generator", f"{generator.kind} {generator.path}, {generator.dtype}, device {devices.said(generator.device)}"),
        *_sources(config).items(),
        *((name, one_line(getattr(config, name).model_dump(mode="json", exclude_none=True))) for name in sorted(rest)),
        ("gold", ", ".join(config.gold) or "none"),
    ]


def _writer_problems(writer: AnyWriter) -> list[Problem]:
    """Files that a writer names and that do not exist."""
    if not isinstance(writer, LocalWriter):
        return []
    try:
        find_model(writer.model, "rewriter")
    except RewardError as error:
        return [Problem("writer.model", str(error))]
    if writer.lora is not None and not is_dir(Path(writer.lora)):
        return [Problem("writer.lora", f"no folder {writer.lora}")]
    return []


def check_files(config: RewritingSettings) -> None:
    """Raise ConfigError for a rewriter, a generator or prompts that are not there; the hub is not asked."""
    problems: list[Problem] = [
        *generator_problems(config.generator),
        *missing(config.memory, training=False, device=config.generator.device),
    ]
    problems += _writer_problems(config.writer)
    if config.generator_lora is not None:
        problems += lora_problems(config.generator_lora, "generator_lora", policy=True)
    for place, source in _sources(config).items():
        problems += table_problems(place, source, partial(read_prompts, count=1))
    if isinstance(config, RewriterConfig) and config.prompts.rewrites is not None:
        problems += table_problems("prompts.rewrites", config.prompts.rewrites, read_rewrites)
    if problems:
        raise ConfigError(problems, config.name)
