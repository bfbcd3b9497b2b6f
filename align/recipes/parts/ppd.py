"""Preferences of several users at once: pairs of each, and attention to an embedding of the user."""

from __future__ import annotations

from typing import Any, Literal

from align.recipes.base import Scored, Tensor, Terms
from align.recipes.flow_dpo import FlowDPO
from alignflow.errors import TrainingError


class PPD(FlowDPO):
    """PPD: one model for many users, conditioned on an embedding of the user (arXiv 2501.06655)

    The loss of ``flow_dpo`` on pairs with a column ``user``. The policy attends to the user's embedding by new keys and
    values, ``policy: {kind: users}``, and the reference is the base without them. The paper drops users at random to
    train a null user; here that user's embedding is zero and the base is reproduced exactly, so nothing is dropped.
    """

    kind: Literal["ppd"] = "ppd"  # type: ignore[assignment]

    def check(self, config: Any) -> list[tuple[str, str]]:
        """Users have embeddings."""
        found = super().check(config)
        if config.policy.kind != "users":
            found.append(("policy.kind", "ppd trains attention to users: use users, with embeddings"))
        return found

    def terms(self, rollout: Scored, credit: Tensor) -> Terms:
        """The pairs of ``flow_dpo``.

        Raises:
            TrainingError: a prompt without a user, from which nothing would be learnt.
        """
        nobody = ~rollout.cond.tensors["user"].flatten(1).any(1).cpu()
        if len(rows := nobody[rollout.row].nonzero()):
            text = rollout.prompts[int(rows[0])]
            raise TrainingError(f"ppd: prompt {text!r} has no user: give its row a column user, or set policy.user")
        return super().terms(rollout, credit)
