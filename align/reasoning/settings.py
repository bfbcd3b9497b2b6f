"""Settings of ``alignflow reward reason``, read from YAML like those of a training run. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from align.config.load import Files, load_settings
from align.data.pair_table import read_judged
from align.data.tables import table_problems
from align.preference.settings import Data, Device, JudgeLora
from align.reasoning.words import QUESTION, QUESTION_ONE
from align.rewriting.settings import Method, PolicyGradient, holds
from align.runs import devices
from alignflow.devices import NAMES
from alignflow.errors import ConfigError, Problem
from alignflow.kinds import OneOf, problems_at
from alignflow.settings import RunSettings, Settings
from alignflow.words import one_line
from rewards.judges.models import AnyJudge, Local


class Reply(Settings):
    """Question and sampling of replies."""

    shows: Literal["pair", "one"] = Field(
        "pair",
        description="samples in a question: pair = both samples; the question is which one is better | one = one "
        "sample; the question is whether it shows the prompt (yes for the chosen, no for the rejected)",
    )
    template: Annotated[str | None, holds("prompt")] = Field(
        None, description="question after the samples, with {prompt} and {medium}; null = the built-in one"
    )
    temperature: float = Field(1.0, ge=0, le=10, description="sampling temperature; held-out replies are the likeliest")
    longest: int = Field(1024, ge=1, description="maximum number of tokens per reply")
    dimensions: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="names of dimensions that the answer about a pair judges as well; the table has columns "
        "chosen_score.NAME and rejected_score.NAME",
    )
    rounds: int = Field(0, ge=0, description="maximum number of requests for further frames; 0 = none")
    more: int = Field(4, ge=1, description="maximum number of frames per request")
    window: int = Field(1, ge=0, description="number of latest requests whose frames are still shown (VR-Thinker: 1)")

    @model_validator(mode="after")
    def _compared(self) -> Self:
        if self.dimensions and self.shows == "one":
            raise problems_at([("dimensions", "dimensions are judged for pairs; set shows=pair")])
        return self

    @property
    def question(self) -> str:
        """The template."""
        return self.template or {"pair": QUESTION, "one": QUESTION_ONE}[self.shows]


class Cold(Method):
    """Cold start: cross-entropy on written critiques with the correct verdict."""

    kind: Literal["cold"] = Field(
        "cold", description="supervised on critiques: columns chosen_critique and rejected_critique"
    )
    batch: int = Field(16, ge=1, description="pairs per step")


class Rejection(Method):
    """Rejection sampling: cross-entropy on the judge's own replies whose verdict is correct."""

    kind: Literal["rejection"] = Field("rejection", description="supervised on its own replies that are right")
    batch: int = Field(16, ge=1, description="replies per step")
    replies: int = Field(4, ge=1, description="replies sampled per pair")
    best: int = Field(1, ge=1, description="number of correct replies to keep per pair, in order of sampling")


class Verdict(Settings):
    """Form + accuracy: UnifiedReward-Think (arXiv 2505.03318)."""

    kind: Literal["verdict"] = Field("verdict", description="form + right verdict")


class Heard(Settings):
    """A term of a second judge that reads the thought and the samples."""

    listener: Local | None = Field(
        None, description="frozen judge that reads the thought; null = the judge as it was at the start of the run"
    )


class Listener(Heard):
    """Form, accuracy and a listener's probability of the right verdict (arXiv 2506.22832)."""

    kind: Literal["listener"] = Field(
        "listener", description="form + accuracy + a listener's probability of the right verdict"
    )
    weight: float = Field(0.5, ge=0, description="weight of accuracy and of the listener (published: 0.5)")


class Rubric(Heard):
    """Accuracy, a proxy that predicts the order from the thought, and form: Proxy-GRM."""

    kind: Literal["rubric"] = Field("rubric", description="accuracy with a proxy that reads the thought + form")
    additive: bool = Field(False, description="+-1 for the verdict and +-1 for the proxy, in place of the best variant")


class Thought(Settings):
    """Accuracy, form and the length of the thought: DeScore."""

    kind: Literal["thought"] = Field("thought", description="0.7 accuracy + 0.1 form + 0.2 length of the thought")


class Frames(Settings):
    """Form, accuracy of the pair and its dimensions, the gain of later rounds, and requests for frames: VR-Thinker."""

    kind: Literal["frames"] = Field("frames", description="form + accuracy + gain of rounds + requests for frames")
    overall: float = Field(
        0.5, ge=0, le=1, description="share of the pair in the accuracy; the dimensions have the rest"
    )
    gain: float = Field(0.2, ge=0, description="weight of the accuracy that rounds after the first one add")
    explore: float = Field(0.5, ge=0, description="weight of the term for replies that request frames")
    least: float = Field(0.2, ge=0, le=1, description="share of such replies to a question from which the term is 0")


SIGNALS: dict[str, type[Settings]] = {
    "verdict": Verdict, "listener": Listener, "rubric": Rubric, "thought": Thought, "frames": Frames,
}  # fmt: skip
Signal = Verdict | Listener | Rubric | Thought | Frames
SIGNAL = OneOf("signal", lambda: SIGNALS, default="verdict")


class ReasonGrpo(PolicyGradient):
    """GRPO on the tokens of replies, rewarded for form and verdict (UnifiedReward-Think, stage three)."""

    kind: Literal["grpo"] = Field("grpo", description="policy gradient on replies that are compared with the label")
    batch: int = Field(8, ge=1, description="pairs per step")
    replies: int = Field(8, ge=2, description="replies per pair (Proxy-GRM, DeScore: 8)")
    kl: float = Field(0.01, ge=0, description="weight of the KL to the reference (Proxy-GRM: 0.01)")
    signal: Annotated[Signal, SIGNAL] = Field(
        Verdict(kind="verdict"), description="reward of a reply: verdict, listener, rubric, thought or frames"
    )


METHODS: dict[str, type[Method]] = {"cold": Cold, "rejection": Rejection, "grpo": ReasonGrpo}
METHOD = OneOf("method", lambda: METHODS)


class ReasonConfig(RunSettings):
    """Settings for one stage in the training of a judge that writes; the run folder is a LoRA for ``judge: {lora}``."""

    command = "reward reason"

    device: Device = Field("cpu", description=NAMES)
    data: Data = Field(
        description="preference tables: prompt, chosen, rejected; cold also needs chosen_critique and rejected_critique"
    )
    judge: AnyJudge = Field(Local(), description="local judge to train; its lora, if it has one, is trained further")
    frames: int | None = Field(8, ge=1, description="frames shown per video, evenly spaced; null = all")
    reply: Reply = Field(Reply(), description="question and sampling of the judge")
    lora: JudgeLora = Field(JudgeLora(), description="LoRA to train, unless judge.lora is trained further")
    method: Annotated[Method, METHOD] = Field(description="training method: cold, rejection or grpo")
    measured: int = Field(256, ge=1, description="maximum number of held-out pairs, counted from the first")
    checkpoint: int = Field(10, ge=1, description="steps between checkpoints")

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        problems = []
        if not isinstance(self.judge, Local):
            problems.append(("judge", "a judge behind a server is not trained from here; name a local one"))
        several = isinstance(self.method, ReasonGrpo | Rejection) and self.method.replies > 1
        if several and self.reply.temperature == 0:
            problems.append(("reply.temperature", "different replies are compared; 0 writes the same one each time"))
        if problems:
            raise problems_at(problems)
        return self

    @property
    def local(self) -> Local:
        """The judge, known to be local."""
        assert isinstance(self.judge, Local)
        return self.judge


def load_reasoning(path: Files, overrides: Sequence[str] = ()) -> ReasonConfig:
    """Read a config, as :func:`align.config.load.load_config` reads that of a training run."""
    return load_settings(path, overrides, ReasonConfig)


def essentials(config: ReasonConfig) -> list[tuple[str, str]]:
    """(name, what the config resolves to) for the lines of ``check``."""
    parts: dict[str, Any] = {name: getattr(config, name) for name in ("data", "judge", "reply", "method")}
    return [
        ("run", f"{config.name}, seed {config.seed}, into {config.run_dir}"),
        *((name, _line(part)) for name, part in parts.items()),
    ]


def _line(part: BaseModel) -> str:
    kind = {"kind": part.kind} if hasattr(part, "kind") else {}
    return one_line({**kind, **part.model_dump(mode="json", exclude_defaults=True)})


def check_files(config: ReasonConfig) -> None:
    """Raise ConfigError for tables or a device that are not there."""
    problems: list[Problem] = [*devices.problems("device", config.device)]
    for name in ("train", "heldout"):
        if (source := getattr(config.data, name)) is not None:
            problems += table_problems(f"data.{name}", source, partial(read_judged, limit=1))
    if problems:
        raise ConfigError(problems, config.name)
