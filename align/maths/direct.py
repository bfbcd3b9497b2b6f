"""Direct reward gradients: samples recovered from known noise, rewards that compare words, losses of a yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from align.maths.losses import column, precise, x_at
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

Ends = tuple[float, float]


class Jumps(NamedTuple):
    """Steps between two noise levels, ``[C]`` each.

    Args:
        t: time at which the velocity is taken.
        t_next: time after the step, at which the sample is recovered.
        k: of :func:`relative_preference`.
        inverts: bool, whether the step goes up to more noise.
    """

    t: Tensor
    t_next: Tensor
    k: Tensor
    inverts: Tensor


def jumps(u: Tensor, stride: float, span: Ends, extra: Ends, extra_inverted: Ends | None) -> Jumps:
    """A step down and a step up to each of the times ``low + (high - low) u`` of a span, those down first.

    Args:
        u: ``[M]`` in [0, 1].
        stride: share of the span that a step covers; less where one of the two would leave the span.
        extra: k at the span's ends, linear between. As in the authors' code, at ``t_next`` of a step down.
        extra_inverted: the same at ``t`` of a step up; None = no steps up.

    Returns:
        C = 2 M steps, or M.
    """
    reach = torch.minimum(u, 1 - u).clamp_max(stride)
    down, up = u + reach, u - reach

    def between(ends: Ends, place: Tensor) -> Tensor:
        return ends[0] + (ends[1] - ends[0]) * place

    found = [(between(span, down), between(span, u), between(extra, u), torch.zeros_like(u, dtype=torch.bool))]
    if extra_inverted is not None:
        inverts = torch.ones_like(u, dtype=torch.bool)
        found.append((between(span, up), between(span, u), between(extra_inverted, up), inverts))
    return Jumps(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def direct_align(x0: Tensor, eps: Tensor, v: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Clean sample recovered with the noise that was added: Direct-Align::

        x_t = (1 - t) x0 + t eps,    x' = x_t + (t' - t) v,    x0_hat = (x' - t' eps) / (1 - t')

    It is ``x0 + (t' - t) / (1 - t') (v - (eps - x0))``: exact at any noise level where the velocity is, and off by a
    known share of the velocity's error otherwise. Gradient to ``v``.

    Args:
        x0: ``[M, ...]`` clean samples; ``eps`` their noise.
        v: ``[M, ...]`` velocity at ``x_at(x0, eps, t)``.
        t: ``[M]``; ``t_next`` likewise, below 1.
    """
    x0, eps, v = precise(x0), precise(eps), precise(v)
    moved = x_at(x0, eps, t) + column(t_next - t, x0) * v
    return (moved - column(t_next, x0) * eps) / column(1 - t_next, x0)


def relative_preference(wanted: Tensor, unwanted: Tensor, k: Tensor | float) -> Tensor:
    """``(1 + k) r(wanted words) - r(unwanted words)``: of what both prompts share k is left (SRPO's code).

    Args:
        wanted: ``[M]`` rewards of samples for prompts with the wanted word; ``unwanted`` likewise.
        k: number or ``[M]``, >= 0.
    """
    return (1 + k) * wanted - unwanted


def yes_loss(probability: Tensor, temperature: float = 1.0) -> Tensor:
    """``-log softmax(temperature * logits)[yes]`` of a judge's yes and no: NP-Edit (arXiv 2510.14978).

    The gradient to the logits is ``temperature (sigmoid(temperature * gap) - 1)``: small temperatures are soft, and at
    0 there is none.

    Args:
        probability: ``[M]`` of yes among yes and no, in [0, 1]. Within 1e-6 of 0 and 1 there is no gradient.
        temperature: factor of the logits; published from 0.1 to 1 over the first 2,000 steps.

    Returns:
        ``[M]``, log 2 where the judge is undecided.
    """
    sure = precise(probability).clamp(1e-6, 1 - 1e-6)
    return F.softplus(-temperature * torch.logit(sure))
