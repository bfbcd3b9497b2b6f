"""Rewards of a judge that writes its verdict, for GRPO on its tokens (:func:`align.maths.tokens.token_pg`).

Arguments are ``[N]``, one number per written reply: ``form`` is 1 if the reply has the required form, and
``right`` is 1 if its verdict is the true one; else they are 0. ``alignflow reward reason`` trains a judge with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def verdict_reward(form: Tensor, right: Tensor) -> Tensor:
    """``form + right``: UnifiedReward-Think (arXiv 2505.03318), third stage."""
    return form + right


def listener_reward(form: Tensor, right: Tensor, listener: Tensor, weight: float = 0.5) -> Tensor:
    """``form + 0.5 right + 0.5 listener``: form, verdict, and a listener that reads the reasons.

    Args:
        listener: probability of the true verdict that a frozen judge gives after it read the reply.
        weight: of each of the two; published 0.5.
    """
    return form + weight * right + weight * listener


def rubric_reward(form: Tensor, right: Tensor, proxy: Tensor, *, additive: bool = False) -> Tensor:
    """Proxy-GRM's reward of a rubric and a verdict: a frozen proxy that reads only the rubric predicts the order.

    A right verdict is worth 1.5 if the proxy is right too, 0.5 if it is not; a wrong verdict -1. ``additive`` is the
    paper's other form, +-1 for the verdict and +-1 for the proxy. Both have 0.5 for the form.

    Args:
        proxy: 1 if the proxy predicts the true order, else 0.
    """
    if additive:
        return (2 * right - 1) + (2 * proxy - 1) + 0.5 * form
    return torch.where(right > 0, 0.5 + proxy, -1.0) + 0.5 * form


LENGTHS = ((2000, 1.0), (1500, 0.6), (1000, 0.4), (500, 0.2))
"""Characters from which a reply's reasoning earns a share of the length term (DeScore)."""


def thought_reward(accuracy: Tensor, form: Tensor, characters: Sequence[int]) -> Tensor:
    """DeScore's reward of reasoning before a score: ``0.7 accuracy + 0.1 form + 0.2 length``, see :data:`LENGTHS`.

    Args:
        accuracy: share of the sub-dimensions whose order is right.
        characters: length of each reply's reasoning.
    """
    length = [next((share for least, share in LENGTHS if count >= least), 0.0) for count in characters]
    return 0.7 * accuracy + 0.1 * form + 0.2 * torch.tensor(length, dtype=accuracy.dtype, device=accuracy.device)


def accuracy_reward(pair: Tensor, dimensions: Tensor, overall: float = 0.5) -> Tensor:
    """``overall pair + (1 - overall) dimensions``: VR-Thinker (arXiv 2510.10518).

    Args:
        pair: 1 if the verdict about the pair is right, else 0.
        dimensions: share of the dimensions whose verdict is right.
    """
    return overall * pair + (1 - overall) * dimensions


def gain_reward(accuracies: Sequence[Sequence[float]], weight: float = 0.2) -> Tensor:
    """``weight sum_i (a_{i+1} - a_i)``: the accuracy that further rounds add, which is last minus first (VR-Thinker).

    Args:
        accuracies: of each reply :func:`accuracy_reward` of its rounds, one or more.
    """
    return weight * torch.tensor([rounds[-1] - rounds[0] for rounds in accuracies])


def exploration_reward(looked: Tensor, group: Tensor, least: float = 0.2, weight: float = 0.5) -> Tensor:
    """``weight max(least - R, 0)`` for replies that requested further frames, else 0 (VR-Thinker).

    Args:
        looked: 1 if a reply asked for frames, else 0.
        group: number of the question; R is the share of its replies that requested frames.
    """
    counts = torch.zeros(int(group.max()) + 1).index_add(0, group, torch.ones_like(looked))
    share = (torch.zeros_like(counts).index_add(0, group, looked) / counts)[group]
    return weight * (least - share).clamp_min(0) * looked
