"""Interface of an algorithm: settings, credit from rewards, loss terms, loss. The trainer owns everything else.

The formulas are in :mod:`align.maths`; torch is imported on first use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from align.maths import losses
from align.maths.seeds import derive
from alignflow.lazy import lazy
from alignflow.strict import Strict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.maths.losses import Loss
    from align.policy.velocities import Networks
    from align.rollout.rollout import Rollout
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Terms:
    """The M summands of one rollout's loss.

    Args:
        sample: ``[M]`` row of the rollout a term belongs to.
        slot: ``[M]`` which of its sample's terms it is; with ``sample`` it names the term's noise.
        weight: ``[M]`` weight in the mean; 0 for a sample without a score.
        values: name -> ``[M, ...]`` what the recipe's loss needs besides (time, credit, the partner in a pair).
    """

    sample: Tensor
    slot: Tensor
    weight: Tensor
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return self.sample.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Terms:
        values = {name: value[rows] for name, value in self.values.items()}
        return Terms(self.sample[rows], self.slot[rows], self.weight[rows], values)


class Recipe(Strict):
    """Base of every recipe. A subclass adds ``kind: Literal["name"]``, its options (defaults: vetted) and the methods.

    The first line of the subclass's docstring is what ``alignflow recipes`` prints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: str
    keeps_trajectory: ClassVar[bool] = False
    """Whether the loss needs the stochastic steps of the rollout and their log-probabilities."""
    behaviour: ClassVar[Literal["policy", "old"]] = "policy"
    """The role that makes the samples."""
    compares_group: ClassVar[bool] = False
    """Whether only differences among the samples of a prompt teach it, so that a group needs two of them."""

    old_draws: ClassVar[bool] = True
    """Whether ``old`` stands for what made the samples; if not it is a reference with a schedule of its own."""

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Problems with the rest of the config as (dotted path, message)."""
        return []

    def terms_per_sample(self, config: Any) -> float:
        """Terms of the loss per sample of the rollout, for the batch geometry in words."""
        raise NotImplementedError

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Rewards ``[N]`` of all processes (NaN = missing) and their groups ``[N]`` -> credit ``[N]``."""
        raise NotImplementedError

    def terms(self, rollout: Rollout, credit: Tensor) -> Terms:
        """Local rollout with its rows of the credit ``[N]`` -> terms ``[M]``; not called without samples."""
        raise NotImplementedError

    def loss(self, terms: Terms, rollout: Rollout, net: Networks) -> Loss:
        """Loss per term ``[M]`` of one chunk, with gradient to the policy."""
        raise NotImplementedError

    def roles(self, config: Any) -> tuple[str, ...]:
        """Roles that loss or rollout use with these settings: ``old``, ``ref``. A run holds no others for it."""
        return ("old",) if self.behaviour == "old" else ()

    def old_decay(self, step: int) -> float:
        """After the updates of rollout ``step`` (from 1): ``old <- d old + (1 - d) policy``; 0 follows the policy."""
        return 0.0


class ForwardRecipe(Recipe):
    """Recipes whose loss uses the forward process: re-noise a sample and compare velocities there."""

    times: int = Field(6, ge=1, description="re-noised copies per sample, one in each of this many equal time slices")
    t_range: tuple[float, float] = Field(
        (0.0, 1.0), description="interval of times t to draw the re-noised copies from"
    )
    kl: float = Field(0.0, ge=0, description="weight of the pull towards the base, mean (v - v_ref)^2; 0 = none")

    @property
    def compares(self) -> bool:
        """Whether samples of equal rewards teach it nothing."""
        return True

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Stored samples that nothing compares teach only what learns from every sample."""
        stored = config.rollout.kind == "samples" and not config.rollout.by_reward
        if not (stored and self.compares):
            return []
        return [("rollout.by_reward", f"{self.kind} compares samples: set it, or use flow_rwr without control_variate")]

    def roles(self, config: Any) -> tuple[str, ...]:
        """The reference too, where something pulls towards it."""
        return (*super().roles(config), *(("ref",) if self.kl else ()))

    def terms_per_sample(self, config: Any) -> float:
        """One term per noised copy."""
        return self.times

    def terms(self, rollout: Rollout, credit: Tensor) -> Terms:
        """Every sample at :attr:`times` stratified times."""
        count = len(credit)
        sample = torch.arange(count).repeat_interleave(self.times)
        slot = torch.arange(self.times).repeat(count)
        t = stratified_times(rollout.seeds, self.times, self.t_range)
        return Terms(sample, slot, rollout.valid.float()[sample], {"t": t.flatten(), "credit": credit[sample]})

    def noised(self, terms: Terms, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(x0, eps, x_t, t)`` of the terms, each with M rows."""
        x0 = rollout.latents[terms.sample]
        eps = rollout.noise(terms.sample, terms.slot)
        t = terms.values["t"].to(x0.device)
        return x0, eps, losses.x_at(x0, eps, t), t

    def anchored(self, loss: Loss, v: Tensor, v_ref: Tensor | None) -> Loss:
        """Add ``kl * mean (v - v_ref)^2``; ``v_ref`` is None where the weight is 0."""
        if v_ref is None:
            return loss
        drift = losses.mse(v, v_ref)
        return losses.Loss(loss.value + self.kl * drift, {**loss.metrics, "kl_velocity": drift.detach()})


def stratified_times(seeds: list[int], count: int, span: tuple[float, float]) -> Tensor:
    """Times ``[N, count]``, one uniform draw in each of ``count`` equal slices of ``span``.

    The draws of row i depend on ``seeds[i]`` alone. Stratifying removes most of the variance that the choice of time
    adds to a loss (MMaDA, arXiv 2505.15809, uses one shared offset for the same end).
    """
    low, high = span
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(derive(seed, "times"))
        rows.append(torch.rand(count, generator=generator))
    u = (torch.arange(count) + torch.stack(rows)) / count
    return low + (high - low) * u
