"""Log-probabilities and verdicts of a judge -> scores: pure tensor functions, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignflow.groups import members
from alignflow.lazy import lazy
from rewards.combine import groups_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def share(log_probabilities: Tensor, answer: int = 0) -> Tensor:
    """``[Q, K]`` -> ``[Q]`` in [0, 1]: the answer's share of the K. Of yes and no, sigmoid(lp_yes - lp_no)."""
    return log_probabilities.softmax(-1)[:, answer]


def expectation(log_probabilities: Tensor) -> Tensor:
    """``[Q, K]`` of K numbers in a row -> ``[Q]``: their mean under the softmax among them, lowest 0, highest 1."""
    steps = torch.linspace(0, 1, log_probabilities.shape[1], device=log_probabilities.device)
    return (log_probabilities.softmax(-1) * steps).sum(-1)


def both_orders(first: Tensor, swapped: Tensor) -> tuple[Tensor, Tensor]:
    """How often A beats B, freed of the place it is shown at, and the place's own advantage.

    Args:
        first: ``[M]`` P(the first is better) with A first.
        swapped: ``[M]`` the same with B first.

    Returns:
        ``(first + 1 - swapped) / 2`` in [0, 1], and ``first + swapped - 1`` in [-1, 1]: 0 for a judge that does not
        look at places, 1 for one that always names the first.
    """
    return (first + 1 - swapped) / 2, first + swapped - 1


def listener_shaped(written: Tensor, right: Tensor, heard: Tensor) -> Tensor:
    """``written + right / 2 + heard / 2``, the listener-shaped reward of arXiv 2506.22832.

    Args:
        written: ``[Q]`` 1 if the reply has its form.
        right: ``[Q]`` 1 if the verdict is right.
        heard: ``[Q]`` a listener's probability of the right verdict, once it has read the reasons.
    """
    return written + 0.5 * right + 0.5 * heard


def matches(prompts: Sequence[str], group: Tensor | None, opponents: int | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) of samples of one prompt that meet.

    Args:
        opponents: each meets the next ``opponents`` of its group in a ring, so ``2 * opponents`` in all; None for all.
    """
    numbers = groups_of(prompts, group)
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    for some in members(numbers):
        rows = some.tolist()
        for step in range(1, min(opponents or len(rows), len(rows) - 1) + 1):
            for place, i in enumerate(rows):
                j = rows[(place + step) % len(rows)]
                pairs.setdefault(frozenset((i, j)), (i, j))
    return list(pairs.values())


def best(first: Tensor, count: int) -> list[int]:
    """The ``count`` of G that win most often, the earlier of equals first.

    Args:
        first: ``[G, G]`` P(row is better than column), row shown first; NaN is a match nobody wins.
    """
    wins = (first > first.T).sum(1)
    return wins.sort(descending=True, stable=True).indices[:count].tolist()


def panels(image: Tensor, rows: int, columns: int) -> list[Tensor]:
    """``[3, H, W]`` -> ``rows * columns`` sub-images, line by line."""
    return [part for line in image.tensor_split(rows, 1) for part in line.tensor_split(columns, 2)]
