"""Interface of an algorithm: settings, credit from scores, loss terms, loss. The trainer does everything else.

The formulas are in :mod:`align.maths`. A recipe imports its names from here; torch is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from align.maths import advantages, losses
from align.maths.losses import Loss as Loss
from align.maths.schedules import OldPolicy as OldPolicy
from align.maths.schedules import Points, unordered, value_at
from align.maths.schedules import old_policy_decay as old_policy_decay
from align.maths.schedules import stratified_times as stratified_times
from align.rollout.terms import GroupTerms as GroupTerms
from align.rollout.terms import Noised as Noised
from align.rollout.terms import NoisedTerms as NoisedTerms
from align.rollout.terms import ScoredLoss as ScoredLoss
from align.rollout.terms import Terms as Terms
from alignflow.kinds import problems_at
from alignflow.lazy import lazy
from alignflow.strict import Strict
from alignflow.words import listing

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor

    from align.rollout.bench import Bench as Bench
    from align.rollout.bench import Point as Point
    from align.rollout.rollout import Scored as Scored
    from rewards.base import Scores as Scores
else:
    torch, Tensor = lazy("torch"), lazy("torch:Tensor")
    Bench, Point = lazy("align.rollout.bench:Bench"), lazy("align.rollout.bench:Point")
    Scored, Scores = lazy("align.rollout.rollout:Scored"), lazy("rewards.base:Scores")

Need = Literal["trajectory", "predictions", "reward_gradient", "parts", "step_scores", "text_gradient", "regions"]
"""Needs of a recipe:

- trajectory: the stochastic steps of the sampler and their log-probabilities;
- predictions: with the trajectory of all steps, the clean sample that each of them predicts;
- reward_gradient: a gradient of the reward to the media; the loss then samples by itself;
- parts: named parts of the scores beside their values;
- step_scores: scores of the clean samples that the stochastic steps predict, ``Scores.steps``;
- text_gradient: a gradient through the text encoders;
- regions: local scores of a sample, :attr:`rewards.base.Reward.regions`.
"""

Fraction = Annotated[float, Field(ge=0, le=1)]
"""A setting in [0, 1]."""

Part = Literal["network", "text"]
"""Parts of a generator that can be trained: its network (or networks), its text encoders."""

PARTS: dict[str, tuple[Part, ...]] = {"network": ("network",), "text": ("text",), "both": ("network", "text")}
"""Setting ``trains`` -> parts."""


class Objective(Strict):
    """Objective of a learner: terms of a scored rollout, and one loss per term."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Local rollout with its rows of the credit ``[N]`` or ``[N, S]`` -> terms ``[M]``; not called without
        samples."""
        raise NotImplementedError

    def loss(self, terms: Terms, rollout: Scored, bench: Bench) -> Loss:
        """Loss per term ``[M]`` of one chunk, with gradient to the learner."""
        raise NotImplementedError

    def terms_per_sample(self, config: Any) -> float:
        """Terms of the loss per sample of the rollout, for the batch geometry in words."""
        return 1

    def division(self, config: Any) -> tuple[Sequence[int] | None, int]:
        """Samples of a whole rollout at which terms stand (None where scores decide) and the number of slots of each.

        For the forecast, because sample and slot decide which update a term belongs to.
        """
        each = self.terms_per_sample(config)
        return range(config.rollout.prompts * config.rollout.group), int(each) if each == int(each) else 0

    def rows_per_term(self, config: Any) -> int:
        """Rows of the network call with gradient per term, for the estimate of memory."""
        return 1


@dataclass(frozen=True)
class Learns:
    """Settings for training one learner of a recipe.

    Args:
        objective: its terms and loss.
        trains: parts of the generator whose parameters it has.
        updates: optimizer steps per rollout; None = ``train.updates``, 0 = never trained, such as a teacher.
        lr: learning rate; None = ``train.lr``.
        init: LoRA file or folder to start from, for learners other than the policy; None = a new LoRA.
    """

    objective: Objective
    trains: tuple[Part, ...] = ("network",)
    updates: int | None = None
    lr: float | None = None
    init: str | None = None


class Recipe(Objective):
    """Base of every recipe. A subclass adds ``kind: Literal["name"]``, its options (defaults: vetted) and the methods.

    The first line of the subclass's docstring is what ``alignflow recipes`` prints.
    """

    kind: str
    needs: ClassVar[tuple[Need, ...]] = ()
    """Needs of the recipe; ``alignflow check`` compares them with rollout, reward and memory."""
    behaviour: ClassVar[Literal["policy", "behaviour"]] = "policy"
    """The role that generates the samples."""
    compares_group: ClassVar[bool] = False
    """Whether only differences among the samples of a prompt give a gradient, so that a group needs two of them."""
    divides_group: ClassVar[bool] = False
    """Whether every sample has its own terms, so that a part of a group can be trained on."""
    any_order: ClassVar[bool] = False
    """Whether the scores of a stored pair may contradict its order."""
    schedule: dict[str, Points] = Field(
        {},
        description="numbers of the recipe that change in training, {name: [[rollout, value], ...]}: linear between "
        "the points, constant outside them; the setting of that name is not used",
    )

    @model_validator(mode="after")
    def _scheduled(self) -> Self:
        fields, data = type(self).model_fields, self.model_dump()
        numbers = [name for name in fields if type(getattr(self, name)) is float]
        for name, points in self.schedule.items():
            if name not in numbers:
                says = f"is not a decimal setting of {self.kind}; those are {listing(numbers, name)}"
                raise problems_at([(f"schedule.{name}", says)])
            if problem := unordered(points):
                raise problems_at([(f"schedule.{name}", problem)])
            for _, value in points:
                try:
                    type(self).model_validate({**data, name: value, "schedule": {}})
                except ValidationError as error:
                    raise problems_at([(f"schedule.{name}", error.errors()[0]["msg"])], value) from None
        return self

    def at(self, rollout: int) -> Self:
        """The recipe with the settings of rollout ``rollout`` (from 0)."""
        return self.model_copy(update={name: value_at(points, rollout) for name, points in self.schedule.items()})

    @property
    def largest(self) -> Self:
        """The recipe with the largest value of every scheduled setting: what it may need of a run."""
        most = {name: max(value for _, value in points) for name, points in self.schedule.items()}
        return self.model_copy(update=most)

    @property
    def compares_logp(self) -> bool:
        """Whether the loss compares log-probabilities of steps with those that the rollout stored."""
        return False

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Problems with the rest of the config as (dotted path, message)."""
        return []

    def wants(self) -> tuple[str, ...]:
        """Inputs of the prompts that the loss reads from :attr:`~align.rollout.rollout.Asked.inputs`."""
        return ()

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        """Scores of all processes' N samples (NaN = missing or void) and their groups ``[N]`` -> credit ``[N]``, or
        ``[N, S]`` for a recipe with a separate credit for each of S steps. By default the scores themselves."""
        return scores.values

    def seeded_credit(self, scores: Scores, group: Tensor, seed: int) -> Tensor:
        """The same with the rollout's seed, which is equal in all processes, for a recipe with random choices."""
        return self.credit(scores, group)

    def look(self, sample: Tensor, rollout: Scored, bench: Bench) -> dict[str, Tensor]:
        """Values that the updates of a rollout share, computed before the first of them, without gradient.

        Called with chunks of the samples ``[M]``; the results, name -> ``[M, ...]``, are joined to ``[N, ...]`` in
        :attr:`~align.rollout.rollout.Scored.seen`. So neither chunks nor earlier updates of the rollout change them.
        """
        return {}

    def learners(self) -> dict[str, Learns]:
        """Learner -> how it is trained, in the order of their updates; ``policy`` generates the samples."""
        return {"policy": Learns(self)}

    @property
    def required(self) -> tuple[Need, ...]:
        """:attr:`needs`, and the gradient through text encoders where a learner trains them."""
        text = any("text" in one.trains for one in self.learners().values())
        return (*self.needs, "text_gradient") if text else self.needs

    def roles(self, config: Any) -> tuple[str, ...]:
        """Roles of the policy that loss or rollout use with these settings: see :mod:`align.policy.roles`. A run holds
        no others for it. By default the sampling role, and the reference where a setting ``kl`` has a weight."""
        sampled = ("behaviour",) if self.behaviour == "behaviour" else ()
        return (*sampled, "reference") if getattr(self, "kl", 0) else sampled

    def decay(self, role: str, step: int) -> float:
        """After the updates of rollout ``step`` (from 1): ``role <- d role + (1 - d) policy``, for the roles behaviour
        and anchor; 0 follows the policy, 1 stays."""
        return 0.0


class GroupRecipe(Recipe):
    """Recipes that compare the samples of a prompt by their advantages."""

    compares_group: ClassVar[bool] = True
    normalise_by: advantages.Divisor = Field(
        "global",
        description="divisor of the advantage r - mean_group: group = std within the group | global = std of all "
        "rewards | centred = std of all rewards minus their group means | none = 1",
    )

    def advantage(self, scores: Scores, group: Tensor, clip: float | None) -> Tensor:
        """Advantages ``[N]``, 0 for a missing score; larger ones than ``clip`` are clipped."""
        return advantages.group_advantage(scores.values, group, normalise_by=self.normalise_by, clip=clip)


class ForwardRecipe(Recipe):
    """Recipes whose loss uses the forward process: re-noise a sample and compare velocities there."""

    renamed: ClassVar[dict[str, str]] = {"times": "timesteps"}
    timesteps: int = Field(
        6, ge=1, description="re-noised copies per sample, one in each of this many equal time slices"
    )
    t_range: tuple[float, float] = Field((0.0, 1.0), description="interval of the times t of the re-noised copies")
    kl: float = Field(0.0, ge=0, description="weight of the penalty towards the base, mean (v - v_ref)^2; 0 = none")
    trains: Literal["network", "text", "both"] = Field(
        "network",
        description="parts with a LoRA: network | text = the text encoders | both; text encoders need "
        "memory.cache_prompts: none",
    )

    def learners(self) -> dict[str, Learns]:
        """One learner, with one optimizer for the LoRAs of all parts."""
        return {"policy": Learns(self, trains=PARTS[self.trains])}

    @property
    def compares(self) -> bool:
        """Whether samples of equal rewards give no gradient."""
        return True

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Stored samples without comparisons work only with recipes that train on every sample."""
        stored = config.rollout.kind == "samples" and not config.rollout.by_reward
        if not (stored and self.compares):
            return []
        return [("rollout.by_reward", f"{self.kind} compares samples: set it, or use flow_rwr without control_variate")]

    def terms_per_sample(self, config: Any) -> float:
        """One term per noised copy."""
        return self.timesteps

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """Every sample at :attr:`timesteps` stratified times."""
        return NoisedTerms.of(rollout, credit, rollout.valid.float(), range(self.timesteps), self.t_range)

    def point(self, x: Tensor, t: Tensor, sample: Tensor, rollout: Scored) -> Point:
        """Point for velocities of samples ``[M]`` are computed; each role encodes text if encoders are trained."""
        prompts = None if self.trains == "network" else [rollout.prompts[n] for n in sample.tolist()]
        return Point(x, t, rollout.cond_of(sample), prompts=prompts)

    def noised(self, terms: Any, rollout: Scored) -> Noised:
        """The terms' samples with the terms' noise at the terms' times."""
        x0 = rollout.latents[terms.sample]
        eps = rollout.noise(terms.sample, terms.slot)
        t = terms.t.to(x0.device)
        return Noised(x0, eps, self.point(losses.x_at(x0, eps, t), t, terms.sample, rollout))

    def anchored(self, loss: Loss, point: Point, bench: Bench) -> Loss:
        """Add ``kl * mean (v - v_ref)^2`` at the point, where ``kl`` has a weight."""
        if not self.kl:
            return loss
        drift = losses.mse(bench.velocity("policy", point), bench.velocity("reference", point))
        return losses.Loss(loss.value + self.kl * drift, {**loss.metrics, "kl_velocity": drift.detach()})


class AnchorRecipe(ForwardRecipe):
    """Forward recipes that may use the anchor, a moving average of the policy."""

    anchor_decay: tuple[Fraction, Fraction, Fraction] = Field(
        (0.0, 0.001, 0.3), description="decay of the anchor after rollout n, [a, b, c]: min(a + b n, c)"
    )

    def decay(self, role: str, step: int) -> float:
        """The anchor's schedule; the behaviour policy follows the policy."""
        first, slope, most = self.anchor_decay
        return min(first + slope * step, most) if role == "anchor" else 0.0


class WholeGroupRecipe(GroupRecipe, AnchorRecipe):
    """Recipes whose loss couples the samples of a prompt.

    A term is a whole group at one time, so that neither chunks nor updates divide it. A group is inside one process.
    """

    shared_noise: bool = Field(
        True, description="whether the samples of a prompt are re-noised with the same noise; their time is the same"
    )

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Needs the samples of a prompt."""
        problem = ("rollout.kind", f"{self.kind} compares the samples of a prompt: use kind 'online' or 'pairs'")
        return [problem] if config.rollout.kind == "samples" else []

    def terms_per_sample(self, config: Any) -> float:
        """One term per group and noised copy."""
        return self.timesteps / config.rollout.group

    def division(self, config: Any) -> tuple[Sequence[int] | None, int]:
        """Another member in every group, see :meth:`terms`."""
        size = config.rollout.group
        return [number * size + number % size for number in range(config.rollout.prompts)], self.timesteps

    def rows_per_term(self, config: Any) -> int:
        """The whole group."""
        return config.rollout.group

    def terms(self, rollout: Scored, credit: Tensor) -> GroupTerms:
        """Every group at :attr:`timesteps` stratified times, weighted by the number of samples that are trained on."""
        size = int((rollout.group == rollout.group[0]).sum())
        members = rollout.group.argsort(stable=True).reshape(-1, size)
        count, first = len(members), members[:, 0]
        # the term's sample decides which update it belongs to: another member in every group spreads a slot over them
        sample = members[torch.arange(count), rollout.group[first] % size]
        t = stratified_times([rollout.seeds[n] for n in first.tolist()], self.timesteps, self.t_range).flatten()
        row, slot = torch.cartesian_prod(torch.arange(count), torch.arange(self.timesteps)).unbind(1)
        valid = rollout.valid[members]
        return GroupTerms(
            sample=sample[row], slot=slot, weight=valid.sum(1).float()[row], t=t,
            members=members[row], credit=credit[members][row], valid=valid[row],
        )  # fmt: skip

    def noised(self, terms: GroupTerms, rollout: Scored) -> Noised:
        """The ``M * G`` members of the terms at the terms' times, group by group."""
        rows, size = terms.members.flatten(), terms.members.shape[1]
        x0 = rollout.latents[rows]
        if self.shared_noise:
            eps = rollout.noise(terms.members[:, 0], terms.slot).repeat_interleave(size, 0)
        else:
            eps = rollout.noise(rows, terms.slot.repeat_interleave(size))
        t = terms.t.to(x0.device).repeat_interleave(size)
        return Noised(x0, eps, self.point(losses.x_at(x0, eps, t), t, rows, rollout))
