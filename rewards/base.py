"""Interface of a reward: media and prompts in, one score per sample out, with a reason for each missing score.

Settings of a reward are read without torch (they are part of the config); :meth:`RewardSettings.build` makes the
thing that scores. A score that could not be had is NaN with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict

from alignflow.errors import AlignflowError
from alignflow.lazy import lazy
from alignflow.secrets import resolve
from alignflow.strict import Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards import guard
    from rewards.checks import checked_scores
else:
    guard = lazy("rewards.guard")
    checked_scores = lazy("rewards.checks:checked_scores")


INPUTS = ("image", "mask", "metadata")
"""What a prompt may come with: the source image ``[N, 3, H, W]``, its mask ``[N, 1, H, W]`` (1 = to be drawn anew),
both float in [0, 1] at the size of the media, and N dicts of whatever else the prompt's row held."""


Scope = Literal["sample", "group", "batch"]
"""What the score of a sample depends on besides that sample: nothing, the others of its prompt, or everything scored
with it. Samples may be scored apart, in any order and anywhere, as long as that stays together."""


SCOPES: tuple[Scope, ...] = ("sample", "group", "batch")
"""From narrow to wide."""


def widest_known(scopes: Sequence[Scope | None]) -> Scope | None:
    """The widest; None where it could be wider than what is known, because some are unknown (None)."""
    known = max((SCOPES.index(scope) for scope in scopes if scope is not None), default=0)
    return None if None in scopes and known == 0 else SCOPES[known]


def all_known(answers: Sequence[bool | None]) -> bool | None:
    """Whether all are True; None where that depends on those that are unknown (None)."""
    return False if False in answers else None if None in answers else True


class RewardError(AlignflowError, RuntimeError):
    """A reward cannot work as configured (missing weights, wrong shape returned); says which reward and what to do."""


def resolved(value: Any, where: str) -> Any:
    """``value`` with ``${NAME}`` replaced by environment variables; RewardError names one that is not set."""
    try:
        return resolve(value)
    except KeyError as error:
        raise RewardError(f"{where}: environment variable {error.args[0]} is not set") from None


class RewardExitError(RewardError):
    """The code of a reward asked the whole process to end."""


class RewardSettings(Strict):
    """Base of every reward's settings. A subclass adds ``kind: Literal["name"]``, its options and :meth:`build`.

    The first line of the subclass's docstring is what ``alignflow recipes`` prints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    passes_gradient: ClassVar[bool] = False
    """Whether gradients flow from scores to media; of a reward around another, whether those of that one do."""

    def compares(self) -> Scope | None:
        """What must be scored together, as far as the settings tell before anything is built; None = unknown."""
        return "sample"

    def gradient(self) -> bool | None:
        """Whether gradients flow from scores to media, as far as the settings tell before anything is built.

        None = unknown. Otherwise equal to :attr:`Reward.differentiable` of what :meth:`build` returns. A subclass whose
        answer depends on its settings overrides this.
        """
        return self.passes_gradient

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load what the reward needs onto ``device``. Torch is imported here, not before."""
        raise NotImplementedError


class WrapperSettings(RewardSettings):
    """Base of a reward around another, its field ``reward``: both need the same samples scored together."""

    if TYPE_CHECKING:
        reward: RewardSettings

    def compares(self) -> Scope | None:
        """As the reward inside."""
        return self.reward.compares()

    def gradient(self) -> bool | None:
        """As the reward inside, or False."""
        return self.reward.gradient() if self.passes_gradient else False


class Refreshed(Protocol):
    """What of a reward learns while the policy does. Training calls :meth:`fit` once a rollout and keeps its state."""

    @property
    def instead(self) -> bool:
        """Whether the last :meth:`fit` stands in the place of the policy's updates on that rollout."""
        ...

    def fit(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """One step on a rollout's N samples ``[N, ...]`` in [0, 1], after they were scored; numbers for the log."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`fit` changes: tensors, numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, to the same bits."""
        ...


@dataclass(frozen=True)
class Scores:
    """Scores of N samples.

    Args:
        values: ``[N]`` float32, higher is better; NaN where there is no score.
        reasons: index -> why ``values[index]`` is NaN. Every NaN has one.
        parts: name -> ``[N]`` raw components (the members of a mixture, strict beside dense).
        steps: ``[N, S]`` scores of the clean samples that S sampling steps predict, for recipes that need them.
    """

    values: Tensor
    reasons: Mapping[int, str] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None

    def rows(self, start: int, stop: int) -> Scores:
        """Scores of the samples ``start`` to ``stop - 1``."""
        some = slice(start, stop)
        reasons = {index - start: why for index, why in self.reasons.items() if start <= index < stop}
        parts = {name: values[some] for name, values in self.parts.items()}
        return Scores(self.values[some], reasons, parts, None if self.steps is None else self.steps[some])


@dataclass(frozen=True)
class Reward:
    """A ready reward. ``reward(media, prompts, group, inputs)`` -> :class:`Scores`.

    Args:
        name: how it is called in logs and reports.
        function: ``(media, prompts, group) -> Scores | Tensor | sequence of float``; ``media`` is
            ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` float in [0, 1], ``prompts`` has N entries, ``group [N]`` numbers
            the prompt each sample belongs to (only rewards that compare samples of one prompt look at it).
        range: (lowest, highest) raw value.
        differentiable: whether gradients flow from the values to the media.
        wants: names of the :data:`INPUTS` the function is given besides, by keyword.
        scope: what must be scored together.
        fingerprint: a digest of what scores depend on besides the settings (weights, code); asked for only by what
            keeps or compares scores.
        embed: ``(media, prompts) -> [N, D]``, the space the reward compares samples in, where it has one.
        apart: names of the parts of its :class:`Scores` that depend on one sample alone, where the score does not.
        refresh: what learns while the policy does, where something does: the same sample then scores otherwise later.
    """

    name: str
    function: Callable[..., Any]
    range: tuple[float, float] = (float("-inf"), float("inf"))
    differentiable: bool = False
    wants: tuple[str, ...] = ()
    scope: Scope = "sample"
    fingerprint: Callable[[], str] = lambda: ""
    embed: Callable[[Tensor, list[str]], Tensor] | None = None
    refresh: Refreshed | None = None
    apart: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.refresh is not None and not isinstance(self.refresh, guard.Guarded):
            object.__setattr__(self, "refresh", guard.Guarded(self.name, self.refresh))

    def fixed(self) -> Reward:
        """Itself, where a sample always scores the same.

        Raises:
            RewardError: it learns while a policy trains, and outside of that run its scores mean nothing.
        """
        if self.refresh is not None:
            raise RewardError(f"reward {self.name!r} learns while a policy trains; elsewhere its scores mean nothing")
        return self

    def __call__(
        self,
        media: Tensor,
        prompts: Sequence[str],
        group: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Score N samples; checks shape, turns what raised or is not finite into NaN with a reason.

        Args:
            inputs: what the prompts came with, N of each; at least what :attr:`wants` names.

        Raises:
            RewardError: the function returned something that is not N numbers, or an input it wants is missing.
        """
        return checked_scores(self, media, list(prompts), group, inputs)


def wanted(rewards: Mapping[str, Reward]) -> tuple[str, ...]:
    """Names of the :data:`INPUTS` that at least one of the rewards needs, in order of first use."""
    return tuple(dict.fromkeys(name for reward in rewards.values() for name in reward.wants))
