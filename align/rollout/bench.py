"""Operations of a recipe's loss: velocities of roles, sampling, decoding, scoring and encoding, with gradients.

A recipe and its config decide the formula; this module runs the networks. No network is called twice for one result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.data.inputs import take
from align.maths.losses import mse
from align.policy.roles import Roles
from align.rollout.rollout import Asked, Drawn
from align.rollout.unroll import known_scores, ode_steps, unroll
from alignflow.errors import TrainingError
from generators.base import Conditioning, Generator
from generators.pinned import to_device
from rewards.base import Reward, Scores

if TYPE_CHECKING:
    from align.maths.samplers import Step
    from align.rollout.unroll import StepFunction

Context = AbstractContextManager[None]


@dataclass(frozen=True, eq=False)
class Point:
    """Points at which M velocities are computed.

    Args:
        x: ``[M, ...]`` latents at the times ``t [M]`` in [0, 1].
        cond: M rows.
        guidance: scale of classifier-free guidance; 1 = none.
        prompts: ``[M]`` where text encoders are trained: every role then encodes them itself, and the negative prompt,
            and ``cond`` holds the other inputs. None = the text in ``cond`` is every role's.
    """

    x: Tensor
    t: Tensor
    cond: Conditioning
    guidance: float = 1.0
    prompts: Sequence[str] | None = None

    def __getitem__(self, rows: Tensor) -> Point:
        prompts = None if self.prompts is None else [self.prompts[row] for row in rows.tolist()]
        return replace(self, x=self.x[rows], t=self.t[rows], cond=self.cond[rows], prompts=prompts)


class Bench:
    """Operations for the loss of a recipe.

    Args:
        generator: its network holds the policy.
        roles: learner -> its roles; ``policy`` is the learner that samples.
        autocast: makes the context of mixed precision.
        reward: of the run, for :meth:`reward`.
        only: learner -> makes the context in which the network computes as that learner, for learners other than the
            policy that share its network.
        agreed: scores without those that are missing in another process that computes the same samples.
    """

    def __init__(
        self,
        generator: Generator,
        roles: Mapping[str, Roles],
        autocast: Callable[[], Context] = nullcontext,
        reward: Reward | None = None,
        only: Mapping[str, Callable[[], Context]] | None = None,
        agreed: Callable[[Scores], Scores] = lambda scores: scores,
    ) -> None:
        self.generator, self.learners, self.autocast, self.scorer = generator, dict(roles), autocast, reward
        self.roles, self.only = self.learners["policy"], dict(only or {})
        self.agreed = agreed
        self._acting = "policy"
        self._point: Point | None = None
        self._known: dict[str, Tensor] = {}
        self._before: tuple[Point, dict[str, Tensor]] | None = None

    # -- learners and roles -----------------------------------------------------------------------------------------

    @contextmanager
    def acting(self, learner: str) -> Iterator[None]:
        """Inside the block velocities of ``learner`` have gradients; loss and backward of its update belong here."""
        before, self._acting = self._acting, learner
        self._point, self._known, self._before = None, {}, None
        try:
            with self.only[learner]() if learner in self.only else nullcontext():
                yield
        finally:
            self._acting, self._point, self._known, self._before = before, None, {}, None

    @contextmanager
    def role(self, role: str) -> Iterator[None]:
        """Inside the block the generator computes as ``role``: a role of the policy, or another learner."""
        self._check(role)
        if role == self._acting:
            yield
        elif role in self.only:
            with self.only[role]():
                yield
        else:
            with self.only["policy"]() if self._acting != "policy" else nullcontext(), self.roles.use(role):
                yield

    def _check(self, role: str) -> None:
        if role not in self.roles and role not in self.learners:
            raise TrainingError(f"the recipe's loss uses the role {role!r}: its method roles() should return that name")

    def velocity(self, role: str, point: Point) -> Tensor:
        """Velocity ``[M, ...]`` of a role at a point, with gradient for the learner that is being updated.

        A role that equals the policy costs no network call at a :class:`Point` where the policy's is known, and no
        role is computed twice at one Point.

        Args:
            role: ``policy``, one of its roles, or the name of another learner.

        Raises:
            TrainingError: the run does not hold the role.
        """
        self._check(role)
        if self._point is not point:
            if self._point is not None and "policy" in self._known:
                self._before = self._point, self._known
            self._point, self._known = point, {}
        if role not in self._known:
            known = self._known.get("policy")
            if known is not None and self._same(role):
                self._known[role] = known.detach()
            else:
                self._known[role] = self._velocity(role, point)
        return self._known[role]

    def _same(self, role: str) -> bool:
        return role not in self.learners and self.roles.same(role)

    def _velocity(self, role: str, point: Point) -> Tensor:
        trained, cond = role == self._acting, point.cond
        if point.prompts is not None:
            text = self.encode(point.prompts, role)
            cond = replace(text, tensors={**cond.tensors, **text.tensors})
        with nullcontext() if trained else torch.no_grad(), self.role(role), self.autocast():
            return self.generator.velocity(point.x, point.t, cond, point.guidance)

    def steps(
        self, rollout: Drawn, sample: Tensor, slot: Tensor, *, encode: bool = False, guidance: float | None = None
    ) -> Callable[[str], Step]:
        """The stochastic steps ``slot [M]`` of the samples ``[M]``, as a function of the role that takes them.

        It gives mean, standard deviation and log-probability of the latents to which the steps led.

        Args:
            encode: every role encodes the prompts itself, where text encoders are trained.
            guidance: scale of classifier-free guidance; None = the rollout's.
        """
        path, cond, device = rollout.path, rollout.cond_of(sample), rollout.latents.device
        prompts = [rollout.prompts[n] for n in sample.tolist()] if encode else None
        scale = rollout.guidance if guidance is None else guidance
        point = Point(to_device(path.x[sample, slot], device), path.t[slot], cond, scale, prompts)
        t_next, x_next = path.t_next[slot], to_device(path.x_next[sample, slot], device)
        return lambda role: rollout.step(point.x, self.velocity(role, point), point.t, t_next, x_next=x_next)

    # -- sampling, decoding, scoring, encoding ----------------------------------------------------------------------

    def unroll(
        self,
        x: Tensor,
        times: Tensor,
        cond: Conditioning,
        *,
        guidance: float = 1.0,
        step: StepFunction | None = None,
        last: int | None = None,
        bridge: Collection[int] | None = None,
        checkpoint: bool = True,
    ) -> Tensor:
        """Latents at ``times[-1]`` of the policy, from ``x [M, ...]`` at ``times[0]``; see :func:`unroll`.

        Args:
            cond: M rows.
            last: number of steps with gradient, counted from the end; None = all.
            bridge: instead, steps whose velocity alone has a gradient.
        """

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                return self.generator.velocity(x, t, cond, guidance)

        advance = step or ode_steps(times)

        def remembered(i: int, x: Tensor, v: Tensor) -> Tensor:
            if i == len(times) - 2:
                self._point, self._known = Point(x, times[i].expand(len(x)), cond, guidance), {"policy": v}
            return advance(i, x, v)

        return unroll(velocity, x, times, step=remembered, last=last, bridge=bridge, checkpoint=checkpoint)

    @property
    def point(self) -> Point:
        """Point of the last velocities; after :meth:`unroll` that of its last step, where the policy's is known."""
        assert self._point is not None
        return self._point

    def decode(self, latents: Tensor) -> Tensor:
        """Media in [0, 1] of latents ``[M, ...]``, with gradient."""
        return self.generator.decode(latents)

    def reward(self, media: Tensor, sample: Tensor, rollout: Asked, prompts: Sequence[str] | None = None) -> Scores:
        """Scores of media ``[M, ...]`` that stand for the samples ``[M]`` of a rollout, with gradient to the media.

        Args:
            prompts: ``[M]`` for which they are scored; None = the samples' own.

        Raises:
            RewardError: as the reward does.
        """
        assert self.scorer is not None
        rows = sample.cpu()
        asked = [rollout.prompts[n] for n in rows.tolist()] if prompts is None else prompts
        return self.scorer(media, asked, rollout.group[rows], take(rollout.inputs, rows))

    def judged(
        self, media: Tensor, sample: Tensor, rollout: Asked, prompts: Sequence[str] | None = None
    ) -> tuple[Tensor, Scores]:
        """:meth:`reward` as rewards ``[M]`` with gradient, 0 and without it where missing, and the scores without."""
        scores = self.agreed(self.reward(media, sample, rollout, prompts))
        return known_scores(scores.values, media), replace(scores, values=scores.values.detach())

    def scored(self, latents: Tensor, sample: Tensor, rollout: Asked) -> tuple[Tensor, Scores, Tensor]:
        """Decode and score latents ``[M, ...]`` of the samples ``[M]``.

        Returns:
            rewards ``[M]`` with gradient to the latents, 0 and without gradient where missing; the scores; the media.
        """
        media = self.decode(latents)
        return *self.judged(media, sample, rollout), media.detach()

    def encode(self, prompts: Sequence[str], role: str = "policy") -> Conditioning:
        """Text of M prompts as a role encodes it, with gradient to text encoders of the learner that is being updated.

        A prompt that occurs several times is encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        row = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.generator.device)
        with self.role(role), self.autocast(), torch.set_grad_enabled(role == self._acting):
            return self.generator.encode_prompts(unique, graph=role == self._acting)[row]

    # -- diagnostics ------------------------------------------------------------------------------------------------

    def drifts(self) -> dict[str, float]:
        """``kl_velocity`` (from the reference) and ``contrast`` (from the behaviour policy) at the last point where the
        loss took the policy's velocity; none if it took none. Only of the roles that the run holds.
        """
        if "policy" not in self._known:
            if self._before is None:
                return {}
            self._point, self._known = self._before
        known = {"kl_velocity": "reference", "contrast": "behaviour"}
        return {name: self.drift(role) for name, role in known.items() if role in self.roles}

    def drift(self, role: str, rows: int = 32) -> float:
        """``mean (v - v_role)^2`` at the last point; of its first ``rows`` rows where the role is not known there."""
        assert self._point is not None
        point, v = self._point, self._known["policy"].detach()
        if role in self._known or self.roles.same(role):
            return float(mse(v, self.velocity(role, point)).mean())
        few = torch.arange(min(rows, len(point.x)), device=point.x.device)
        here = replace(point, x=point.x.detach())[few]
        return float(mse(v[few], self._velocity(role, here)).mean())
