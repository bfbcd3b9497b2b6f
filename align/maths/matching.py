"""Losses on flow-matching errors ``mean (v - u)^2``, ``u = eps - x0``, that stand in for a sample's log-probability.

One number per term ``[M]``, never reduced over terms, as in :mod:`align.maths.losses`. Where the samples of a prompt
enter a loss together, a term is a group of G samples at one time, and its number is the mean over the valid ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from align.maths.losses import Loss, mse, precise
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
"""How an error becomes a log-probability; see :func:`fm_logp`."""


def fm_logp(error: Tensor, t: Tensor, weighting: Weighting = "ghuber", power: float = 0.25) -> Tensor:
    """Stand-in for the log-probability of a sample at time ``t``: Advantage Weighted Matching (arXiv 2509.25050)::

        uniform  -e          huber    -t (sqrt(e + 1e-10) - 1e-5)
        t        -t e        ghuber   -t ((e + 1e-10)^p - 1e-10^p) / p
        t2       -t^2 e

    As in the authors' code (scxue/advantage_weighted_matching, ``compute_log_prob_awm``). All are 0 at e = 0.

    Args:
        error: ``[M]`` ``mean (v - u)^2``, with gradient.
        t: ``[M]`` in [0, 1].
        power: p of ghuber, in (0, 1]; 1 is ``t`` and 1/2 is twice ``huber``.

    Returns:
        ``[M]``, at most 0.

    Raises:
        ValueError: unknown weighting.
    """
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -t * error
    if weighting == "t2":
        return -t.square() * error
    if weighting == "huber":
        return -t * ((error + 1e-10).sqrt() - 1e-5)
    if weighting == "ghuber":
        return -t * ((error + 1e-10).pow(power) - 1e-10**power) / power
    raise ValueError(f"weighting should be uniform, t, t2, huber or ghuber, given {weighting!r}")


def group_mean(value: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid samples of each group: ``[M, G]`` and bool ``[M, G]`` -> ``[M]``; 0 for a group without."""
    counted = valid.to(value.dtype)
    return (value * counted).sum(1) / counted.sum(1).clamp_min(1)


def dgpo(
    error: Tensor,
    error_ref: Tensor,
    advantage: Tensor,
    valid: Tensor,
    beta: float,
    *,
    error_old: Tensor | None = None,
    clip: float | None = None,
) -> Loss:
    """Direct Group Preference Optimization (arXiv 2510.08425): good samples against bad ones, weighed by the group::

        gate = sg sigmoid(beta mean A (e - e_ref)),    mean gate A e

    The gate closes as the policy prefers the good samples more than the reference does. With ``clip`` a sample whose
    ``exp(e_old - e)`` has left ``1 +- clip`` in the direction of its advantage keeps its value and loses its gradient.
    As in the authors' code (Luo-Yihong/DGPO, ``compute_group_dgpo_loss_allreduce``).

    Args:
        error: ``[M, G]`` ``mean (v - u)^2`` of the policy, with gradient; the samples of a group share noise and time.
        error_ref: ``[M, G]`` of the reference of the gate.
        advantage: ``[M, G]``.
        valid: ``[M, G]`` bool, whether a sample is trained on.
        beta: > 0; with mean errors 10 to 2000.
        error_old: ``[M, G]`` of the policy that bounds the change. Needed if ``clip`` is given.

    Returns:
        metrics ``gate`` and ``clipped``, the share of valid samples without gradient.
    """
    clipped = torch.zeros_like(valid)
    if clip is not None:
        if error_old is None:
            raise ValueError("dgpo with clip needs error_old, the errors of the policy that bounds the change")
        ratio = (error_old.detach() - error.detach()).exp()
        clipped = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    gap = error.detach() - error_ref.detach()
    gate = torch.sigmoid(beta * group_mean(advantage * gap, valid))
    value = gate * group_mean(advantage * torch.where(clipped, error.detach(), error), valid)
    return Loss(value, {"gate": gate, "clipped": group_mean(clipped.to(gate.dtype), valid)})


def implicit_reward(v: Tensor, v_old: Tensor, target: Tensor, *, adaptive: bool = True) -> Tensor:
    """How much better the policy predicts a sample than the old one::

        mean (v_old - u)^2 / w_old - mean (v - u)^2 / w

    Args:
        v: ``[M, ...]``, with gradient.
        v_old: ``[M, ...]``.
        target: ``[M, ...]`` u.
        adaptive: weights ``w = sg mean |v - u|`` (at least 1e-5) and likewise ``w_old``; else 1.

    Returns:
        ``[M]``, 0 where both predict alike.
    """

    def error(velocity: Tensor) -> Tensor:
        size = (precise(velocity.detach()) - precise(target)).abs().flatten(1).mean(1).clamp_min(1e-5)
        return mse(velocity, target) / (size if adaptive else 1.0)

    return error(v_old.detach()) - error(v)


def crd(
    implicit: Tensor,
    reward: Tensor,
    valid: Tensor,
    beta: float,
    *,
    kind: Literal["mse", "bce"] = "mse",
    temperature: float | None = None,
) -> Loss:
    """Centred Reward Distillation (arXiv 2603.14128): implicit rewards must differ within a prompt as rewards do::

        d = beta (i - sg mean i)        R = r - mean r
        mse  mean (d - R)^2             bce  mean of the cross-entropy of sigmoid(d) to sigmoid(R)

    Centring removes the normalising constant of ``p_old exp(r / beta) / Z``. As in the code by the paper's author in
    X-GenGroup/Flow-Factory (``trainers/crd.py``), which centres over a batch; here it is the prompt's samples.

    Args:
        implicit: ``[M, G]`` :func:`implicit_reward`, with gradient.
        reward: ``[M, G]``.
        valid: ``[M, G]`` bool, whether a sample is trained on.
        beta: > 0.
        temperature: None centres at the mean. Otherwise the loss is the mean of two: centred at the mean weighted by
            ``softmax(r / temperature)``, and by ``softmax(-r / temperature)``; 0 is the limit, the best and the worst.

    Returns:
        metric ``implicit_spread``, the group's standard deviation of the implicit rewards.
    """
    reward = reward.detach()
    fixed = implicit.detach()

    def centred_at(weight: Tensor) -> Tensor:
        found = beta * (implicit - (weight * fixed).sum(1, keepdim=True))
        wanted = reward - (weight * reward).sum(1, keepdim=True)
        if kind == "bce":
            return group_mean(F.binary_cross_entropy_with_logits(found, wanted.sigmoid(), reduction="none"), valid)
        return group_mean((found - wanted).square(), valid)

    if temperature is None:
        value = centred_at(_centre(torch.zeros_like(reward), valid))
    else:
        best, worst = (centred_at(_centre(_tilt(sign * reward, valid, temperature), valid)) for sign in (1, -1))
        value = best / 2 + worst / 2
    off = fixed - group_mean(fixed, valid)[:, None]
    return Loss(value, {"implicit_spread": group_mean(off.square(), valid).sqrt()})


def _tilt(reward: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Logits of the weights; at temperature 0 those of the largest rewards are 0 and all others -inf."""
    if temperature:
        return reward / temperature
    top = reward.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return torch.zeros_like(reward).masked_fill(reward < top, -torch.inf)


def _centre(logits: Tensor, valid: Tensor) -> Tensor:
    """Softmax over the valid samples ``[M, G]``; zeros for a group without any."""
    return torch.nan_to_num(torch.softmax(logits.masked_fill(~valid, -torch.inf), 1))


# -- times of distribution matching -------------------------------------------------------------------------------


def next_time(t: Tensor, grid: Tensor) -> Tensor:
    """The time ``[M]`` after ``t [M]``, one of the times before the last, on a falling grid ``[S + 1]``."""
    grid = grid.to(t)
    return grid[(grid[None] > t[:, None] - 1e-6).sum(1)]


def above(t: Tensor, span: tuple[float, float], low: Tensor) -> Tensor:
    """Times ``t [M]`` of a span, moved in order into the part of it that is above ``low [M]``: TDM (arXiv 2503.06674).

    TDM noises the state that a step leads to, up from its time; here it is the step's prediction, as for DMD2.
    """
    start = low.clamp(*span)
    return start + (t - span[0]) / (span[1] - span[0]) * (span[1] - start)
