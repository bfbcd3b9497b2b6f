"""Interface of a reward: media and prompts in, one score per sample out, with a reason for each missing score.

Settings of a reward are part of the config and are read without torch; :meth:`RewardSettings.build` makes the reward.
A missing score is NaN with a reason, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from alignflow.lazy import lazy
from alignflow.secrets import resolve
from alignflow.strict import Strict
from rewards.scores import Refreshed as Refreshed
from rewards.scores import RewardError as RewardError
from rewards.scores import RewardExitError as RewardExitError
from rewards.scores import Scores as Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rewards import guard
    from rewards.checks import checked_scores
else:
    guard = lazy("rewards.guard")
    checked_scores = lazy("rewards.checks:checked_scores")


INPUTS = ("image", "mask", "metadata")
"""Optional inputs of prompts: the source image ``[N, 3, H, W]`` and its mask ``[N, 1, H, W]`` (1 = to be repainted),
both float in [0, 1] at the size of the media, and N dicts with the other columns of the prompts' rows."""


Scope = Literal["sample", "group", "batch"]
"""Samples on which a score depends: the sample alone, all samples of its prompt, or all samples of the call. Samples
outside each other's scope may be scored in separate calls, in any order and on any machine."""


SCOPES: tuple[Scope, ...] = ("sample", "group", "batch")
"""From narrow to wide."""


def widest_known(scopes: Sequence[Scope | None]) -> Scope | None:
    """The widest scope; None if unknown scopes (None) could make it wider than the known ones."""
    known = max((SCOPES.index(scope) for scope in scopes if scope is not None), default=0)
    return None if None in scopes and known == 0 else SCOPES[known]


def all_known(answers: Sequence[bool | None]) -> bool | None:
    """Whether all are True; None if that depends on unknown answers (None)."""
    return False if False in answers else None if None in answers else True


def resolved(value: Any, where: str) -> Any:
    """``value`` with ``${NAME}`` replaced by environment variables; RewardError names one that is not set."""
    try:
        return resolve(value)
    except KeyError as error:
        raise RewardError(f"{where}: environment variable {error.args[0]} is not set") from None


class RewardSettings(Strict):
    """Base of every reward's settings. A subclass adds ``kind: Literal["name"]``, its options and :meth:`build`.

    The first line of the subclass's docstring is what ``alignflow recipes`` prints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    passes_gradient: ClassVar[bool] = False
    """Whether gradients flow from scores to media; for a wrapper, whether it passes on those of the inner reward."""
    gives_regions: ClassVar[bool] = False
    """Whether the built reward has :attr:`Reward.regions`, and a finite range."""

    def compares(self) -> Scope | None:
        """The scope, known from the settings alone; None = unknown before the reward is built."""
        return "sample"

    def gradient(self) -> bool | None:
        """Whether gradients flow from scores to media, known from the settings alone; None = unknown.

        Otherwise equal to :attr:`Reward.differentiable` of the built reward. A subclass whose answer depends on its
        settings overrides this.
        """
        return self.passes_gradient

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Make the reward, with its networks on ``device``. Torch is imported here, not before."""
        raise NotImplementedError


class WrapperSettings(RewardSettings):
    """Base of a wrapper of another reward, its field ``reward``, whose scope it has."""

    if TYPE_CHECKING:
        reward: RewardSettings

    def compares(self) -> Scope | None:
        """The scope of the inner reward."""
        return self.reward.compares()

    def gradient(self) -> bool | None:
        """The gradient of the inner reward, if the wrapper passes it on."""
        return self.reward.gradient() if self.passes_gradient else False


@dataclass(frozen=True)
class Reward:
    """A ready reward. ``reward(media, prompts, group, inputs)`` -> :class:`Scores`.

    Args:
        name: its name in logs and reports.
        function: ``(media, prompts, group) -> Scores | Tensor | sequence of float``; ``media`` is
            ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` float in [0, 1], ``prompts`` has N entries, and ``group [N]`` is the
            number of each sample's prompt, which only rewards that compare samples use.
        range: (lowest, highest) raw value.
        differentiable: whether gradients flow from the values to the media.
        wants: names of the :data:`INPUTS` that the function also receives, by keyword.
        scope: samples that must be scored together.
        fingerprint: digest of weights and code, on which scores depend beside the settings; computed for caches and
            servers only.
        embed: ``(media, prompts) -> [N, D]``, embeddings in which the reward compares samples, if it has any.
        regions: ``(media, prompts)`` -> ``[N, 1, H, W]``, scores in [-1, 1] of regions of images ``[N, 3, H, W]``, NaN
            outside all regions; None = the reward knows none.
        apart: names of the parts of :class:`Scores` that depend on one sample alone although the score does not.
        refresh: the part that trains alongside the policy, if there is one; a sample's score then changes over time.
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
    regions: Callable[[Tensor, list[str]], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None and not isinstance(self.refresh, guard.Guarded):
            object.__setattr__(self, "refresh", guard.Guarded(self.name, self.refresh))

    def fixed(self) -> Reward:
        """This reward, if the score of a sample never changes.

        Raises:
            RewardError: it trains alongside a policy, so its scores have no meaning outside that run.
        """
        if self.refresh is not None:
            said = "trains alongside a policy; its scores have no meaning outside that run"
            raise RewardError(f"reward {self.name!r} {said}")
        return self

    def __call__(
        self,
        media: Tensor,
        prompts: Sequence[str],
        group: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Score N samples. Shapes are checked; exceptions and values that are not finite become NaN with a reason.

        Args:
            inputs: inputs of the prompts, N of each; at least those in :attr:`wants`.

        Raises:
            RewardError: the function did not return N numbers, or an input in :attr:`wants` is missing.
        """
        return checked_scores(self, media, list(prompts), group, inputs)


def wanted(rewards: Mapping[str, Reward]) -> tuple[str, ...]:
    """Names of the :data:`INPUTS` that at least one of the rewards needs, in order of first use."""
    return tuple(dict.fromkeys(name for reward in rewards.values() for name in reward.wants))
