"""Roles of one learner: sets of values for its trained parameters.

The network holds the policy. Another role is used by putting its values in place for the length of a block, so LoRA
and full fine-tuning, and any wrapper around the network, are served by the same few lines. A LoRA's reference needs
no values: it is the network with the LoRA switched off. Where processes hold shards of the parameters they hold shards
of the roles.

========== ===========================================================================
policy     the values that the optimizer changes
behaviour  the policy that generated the samples (follows by :meth:`Roles.follow`)
reference  the policy at the start, which never moves
anchor     a reference that moves on a schedule of its recipe
ema        the averaged policy
ahead      the policy that generates the next rollout, where that overlaps with this one
========== ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from align.policy.shards import part, part_of, put
from generators.pinned import synchronise, to_device, to_host


class Roles:
    """The roles of one learner.

    Args:
        parameters: (name, parameter) of the policy, in a fixed order.
        names: the other roles that are copies; each starts equal to the policy.
        base: makes the context in which the network computes as the role ``reference``, which is then not copied.
        at_base: whether the policy equals that base at the start.
        on_cpu: keep the copies in the CPU's memory, pinned where there is a card. Not for shards.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        names: Sequence[str] = (),
        base: Callable[[], AbstractContextManager[None]] | None = None,
        at_base: bool = True,
        on_cpu: bool = False,
    ) -> None:
        self.parameters, self.base, self.on_cpu = list(parameters), base, on_cpu
        self.values: dict[str, list[Tensor]] = {name: self._policy_copy() for name in names}
        self._policy_version = 0
        self._versions = dict.fromkeys(names, 0) | ({"reference": 0 if at_base else -1} if base else {})

    def __contains__(self, role: str) -> bool:
        return role == "policy" or role in self._versions

    def _policy_copy(self) -> list[Tensor]:
        if not self.on_cpu:
            return [parameter.detach().clone() for _, parameter in self.parameters]
        values = [to_host(parameter.detach()) for _, parameter in self.parameters]
        for _, parameter in self.parameters[:1]:
            synchronise(parameter.device)
        return values

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Inside the block the network computes as ``role``. Call it under ``no_grad``; backward comes after it."""
        if role == "policy" or self.same(role):
            yield
            return
        if role == "reference" and self.base is not None:
            with self.base():
                yield
            return
        parameters, values = [parameter for _, parameter in self.parameters], self.values[role]
        if self.on_cpu:
            values = [to_device(value, one.device) for value, one in zip(values, parameters, strict=True)]
        with put(parameters, values):
            yield

    def same(self, role: str) -> bool:
        """Whether ``role`` certainly equals the policy, so that its network call may be skipped."""
        return role == "policy" or self._versions[role] == self._policy_version

    def policy_changed(self) -> None:
        """Record that the optimizer changed the policy."""
        self._policy_version += 1

    @torch.no_grad()
    def follow(self, role: str, decay: float) -> None:
        """``role <- decay * role + (1 - decay) * policy``; decay 0 makes them equal, 1 leaves the role alone."""
        if decay == 1.0 or self.same(role):
            return
        for value, (_, parameter) in zip(self.values[role], self.parameters, strict=True):
            mine = part(value)
            given = part(parameter).to(mine.device)
            mine.lerp_(given, 1.0 - decay) if decay else mine.copy_(given)
        self._versions[role] = self._policy_version if decay == 0.0 else -1

    @torch.no_grad()
    def assign(self, role: str, source: str) -> None:
        """``role <- source``, both other than the policy."""
        for value, given in zip(self.values[role], self.values[source], strict=True):
            part(value).copy_(part(given))
        self._versions[role] = self._versions[source]

    def tensors(self) -> dict[str, Tensor]:
        """Values of the policy and of every copied role as ``role/parameter`` -> tensor."""
        named = {f"policy/{name}": parameter.detach() for name, parameter in self.parameters}
        for role, values in self.values.items():
            named |= {f"{role}/{name}": value for (name, _), value in zip(self.parameters, values, strict=True)}
        return named

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], versions: dict[str, int]) -> None:
        """Restore what :meth:`tensors` and :meth:`versions` returned; tensors are whole."""
        for key, mine in self.tensors().items():
            part(mine).copy_(part(part_of(tensors[key], mine)))
        self._policy_version = versions["policy"]
        self._versions |= {role: versions[role] for role in self.values}

    def versions(self) -> dict[str, int]:
        """Versions of the policy and the copied roles; a role whose version is the policy's equals it."""
        return {"policy": self._policy_version, **{role: self._versions[role] for role in self.values}}


def ema_decay(update: int, decay: float) -> float:
    """EMA decay after optimizer step ``update`` (from 1): warm-up ``(1 + u) / (10 + u)``, at most ``decay``."""
    return min((1 + update) / (10 + update), decay)
