"""Velocities of policy, old and ref at one point, without redundant network calls."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from align.maths.losses import mse
from align.policy.roles import Roles
from alignflow.errors import TrainingError
from generators.base import Conditioning, Generator


@dataclass
class _Point:
    x: Tensor
    t: Tensor
    cond: Conditioning
    guidance: float
    v: Tensor


class Networks:
    """What a recipe's loss asks for: :meth:`policy` at a point, then :meth:`old` and :meth:`ref` at the same point.

    Args:
        autocast: context manager factory for mixed precision.
    """

    def __init__(
        self,
        generator: Generator,
        roles: Roles,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.generator, self.roles, self.autocast = generator, roles, autocast
        self._point: _Point | None = None
        self._known: dict[str, Tensor] = {}

    def policy(self, x: Tensor, t: Tensor, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """Velocity of the policy, with gradient. Sets the point for the other roles."""
        with self.autocast():
            v = self.generator.velocity(x, t, cond, guidance)
        self._point, self._known = _Point(x, t, cond, guidance, v), {}
        return v

    def old(self) -> Tensor:
        """Velocity of the old policy at the same point, no gradient; the policy's own where both are equal."""
        return self._role("old")

    def ref(self) -> Tensor:
        """Velocity of the base at the same point, no gradient."""
        return self._role("ref")

    def _role(self, role: str) -> Tensor:
        assert self._point is not None
        if role not in self.roles:
            raise TrainingError(f"the recipe's loss uses the role {role!r}: its method roles() should return that name")
        if role not in self._known:
            point = self._point
            if self.roles.same(role):
                self._known[role] = point.v.detach()
            else:
                self._known[role] = self._velocity(role, point.x, point.t, point.cond, point.guidance)
        return self._known[role]

    def _velocity(self, role: str, x: Tensor, t: Tensor, cond: Conditioning, guidance: float) -> Tensor:
        with torch.no_grad(), self.roles.use(role), self.autocast():
            return self.generator.velocity(x, t, cond, guidance)

    def drifts(self) -> dict[str, float]:
        """Diagnostics at the last point, of the roles that the run has: ``kl_velocity`` (ref), ``contrast`` (old)."""
        known = {"kl_velocity": "ref", "contrast": "old"}
        return {name: self.drift(role) for name, role in known.items() if role in self.roles}

    def drift(self, role: str, rows: int = 32) -> float:
        """Diagnostic ``mean (v - v_role)^2`` at the last point, from its first ``rows`` rows if it must be asked."""
        assert self._point is not None
        point = self._point
        if role in self._known or self.roles.same(role):
            return float(mse(point.v.detach(), self._role(role)).mean())
        few = torch.arange(min(rows, len(point.x)), device=point.x.device)
        there = self._velocity(role, point.x[few].detach(), point.t[few], point.cond[few], point.guidance)
        return float(mse(point.v.detach()[few], there).mean())
