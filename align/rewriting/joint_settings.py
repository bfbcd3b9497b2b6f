"""Settings of ``alignflow prompts joint``, read from YAML like those of a training run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from align.config.load import Files, load_config, load_settings
from align.config.settings import Config
from align.rewriting import settings as rewritings
from align.rewriting.settings import RewriterConfig, load_rewriter
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import problems_at
from alignflow.settings import RunSettings, Settings


class Stage(Settings):
    """A config of one of the two trainings."""

    config: str = Field(description="config file")
    overrides: list[str] = Field([], description="overrides of it, such as method.steps=100")


class JointConfig(RunSettings):
    """Settings of a training of rewriter and generator in alternation (VANS' Joint-GRPO)."""

    command = "prompts joint"

    rewriter: Stage = Field(description="config of alignflow prompts train; its generator is trained")
    renderer: Stage = Field(description="config of alignflow train; its prompts are the rewriter's captions")
    rounds: int = Field(1, ge=1, description="rounds; each trains the rewriter, then the generator (VANS: 1)")
    anchor: float = Field(
        0.6,
        ge=0,
        le=1,
        description="minimum ROUGE-L between a caption and the reference text for the generator to be trained on it "
        "(VANS: 0.6)",
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        rewriter, renderer = self.rewriter_config(), self.renderer_config()
        problems = []
        if rewriter.caption is None:
            problems.append(("rewriter.config", "is missing caption: captions are compared with the reference text"))
        if rewriter.generator != renderer.generator:
            problems.append(("renderer.config", "trains a generator other than the one that renders rewrites"))
        if renderer.policy.kind != "lora":
            problems.append(("renderer.config", "trains all weights; the next round loads the generator as a LoRA"))
        if problems:
            raise problems_at(problems)
        return self

    def rewriter_config(self, overrides: Sequence[str] = ()) -> RewriterConfig:
        """The first training's config."""
        return load_rewriter(self.rewriter.config, [*self.rewriter.overrides, *overrides])

    def renderer_config(self, overrides: Sequence[str] = ()) -> Config:
        """The second training's config."""
        return load_config(self.renderer.config, [*self.renderer.overrides, *overrides])


def load_joint(path: Files, overrides: Sequence[str] = ()) -> JointConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, JointConfig)


def essentials(config: JointConfig) -> list[tuple[str, str]]:
    """(name, what the config resolves to) for the lines of ``check``."""
    first, second = config.rewriter_config(), config.renderer_config()
    return [
        ("run", f"{config.name}, seed {config.seed}, into {config.run_dir}"),
        ("rewriter", f"{config.rewriter.config}, {getattr(first.method, 'kind', '')}, {first.method.steps} steps"),
        ("renderer", f"{config.renderer.config}, {second.recipe.kind}, {second.train.steps} steps"),
        ("rounds", str(config.rounds)),
    ]


def check_files(config: JointConfig) -> None:
    """Raise ConfigError for what the first training names and is not there."""
    try:
        rewritings.check_files(config.rewriter_config())
    except ConfigError as error:
        problems = [Problem(f"rewriter.config: {one.path}", one.message) for one in error.problems]
        raise ConfigError(problems, config.name) from None
