"""Losses: formulas on tensors, one number per term ``[M]``, independent of models, configs and processes.

A term's number is a mean over all its dimensions but the first, in float32 at least (float64 stays float64), so image
``[M, C, H, W]`` and video ``[M, C, F, H, W]`` latents are the same to it. No loss is ever reduced over its terms: that
is done once, by the trainer. Each docstring says which arguments carry gradient; all others are detached here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


@dataclass(frozen=True)
class Loss:
    """One number per term.

    Args:
        value: ``[M]``, with gradient.
        metrics: name -> ``[M]``, without.
    """

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Guard:
    """Inputs of GRPO-Guard's normalised ratio besides the log-probabilities.

    Args:
        mean: ``[M, ...]`` mean of the step under the policy, with gradient.
        mean_old: ``[M, ...]`` the same under the policy that sampled.
        std: ``[M]`` standard deviation of the step, with its ``sqrt(-dt)``.
        dt: ``[M]`` length of the step in time, negative.
    """

    mean: Tensor
    mean_old: Tensor
    std: Tensor
    dt: Tensor


# -- the forward process ------------------------------------------------------------------------------------------


def precise(x: Tensor) -> Tensor:
    """``x`` in float32 at least, because sums in half precision lose digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def column(value: Tensor, like: Tensor) -> Tensor:
    """A number per row ``[N]`` (or one for all, ``[]``) shaped to multiply ``like [N, ...]``, in its dtype."""
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def mse(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of each row: ``[M, ...]`` twice -> ``[M]``.

    Args:
        weight: >= 0, of a shape that broadcasts to ``a``, such as a mask: ``sum(weight d^2) / sum(weight)``, 0 for a
            row without weight.
    """
    square = (precise(a) - precise(b)).square()
    if weight is None:
        return square.flatten(1).mean(1)
    weight = weight.to(square.device, square.dtype).expand_as(square)
    return (weight * square).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-12)


def x_at(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``x_t = (1 - t) x0 + t eps`` for ``t [M]`` (or ``[]``)."""
    t = column(t, x0)
    return (1 - t) * x0 + t * eps


def x0_from(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean sample a velocity points at, ``x0_hat = x_t - t v``, for ``t [M]`` (or ``[]``)."""
    return x_t - column(t, x_t) * v


# -- policy gradient on sampling steps ----------------------------------------------------------------------------


def clipped_pg(logp: Tensor, logp_old: Tensor, advantage: Tensor, clip: float, *, guard: Guard | None = None) -> Loss:
    """Clipped surrogate ``max(-A rho, -A clamp(rho, 1 - clip, 1 + clip))``, ``rho = exp(logp - logp_old)``.

    Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818). Log-probabilities are means over dimensions, hence clip
    ranges of 1e-5 to 1e-3.

    With ``guard`` the ratio is GRPO-Guard's (2510.22319), for a step of standard deviation S::

        rho = exp((logp - logp_old + mean (mu - mu_old)^2 / (2 S^2)) S),    loss / (-dt)

    The added term makes the mean of log rho 0 under the old policy (it is negative otherwise), S makes its spread the
    same at all steps, 1 / (-dt) the gradient's size. The mean is each sample's own; the authors' script takes it over
    the batch.

    Args:
        logp: ``[M]``, with gradient.
        logp_old: ``[M]``.
        advantage: ``[M]``.
        clip: half width of the clipping range, > 0.

    Returns:
        metrics ``ratio`` and ``clipped``, 1 if clipping removed the gradient.
    """
    log_ratio = logp - logp_old.detach()
    if guard is not None:
        bias = kl_mean(guard.mean, guard.mean_old, guard.std)
        log_ratio = (log_ratio + bias) * guard.std
    ratio = log_ratio.exp()
    value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
    if guard is not None:
        value = value / -guard.dt
    ratio = ratio.detach()
    clipped = ((advantage > 0) & (ratio > 1 + clip)) | ((advantage < 0) & (ratio < 1 - clip))
    return Loss(value, {"ratio": ratio, "clipped": clipped.to(ratio.dtype)})


def masked_pg(logp: Tensor, logp_old: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Loss:
    """Unclipped surrogate ``-A rho`` without the terms that leave the old policy: Flow-DPPO (arXiv 2606.11025).

    A term is 0 if its ``divergence`` has reached the threshold and its ratio would move further from 1: it is above 1
    with A > 0, or below 1 with A < 0. A ratio on the other side of 1 moves back, so its term is kept. As in
    verl-omni, ``FlowDPPOLoss``.

    Args:
        logp: ``[M]``, with gradient.
        logp_old: ``[M]``.
        advantage: ``[M]``.
        divergence: ``[M]`` :func:`kl_mean` of the step's means under the policy and under the one that sampled.
        threshold: > 0, published 1e-5.

    Returns:
        metrics ``ratio``, ``divergence`` and, 1 if a term was masked, ``masked_good`` (A > 0) and ``masked_bad``.
    """
    ratio, divergence = (logp - logp_old.detach()).exp(), divergence.detach()
    far, moved = divergence >= threshold, ratio.detach() - 1
    good, bad = far & (advantage > 0) & (moved > 0), far & (advantage < 0) & (moved < 0)
    value = torch.where(good | bad, torch.zeros_like(ratio), -advantage * ratio)
    shares = {"masked_good": good.to(ratio.dtype), "masked_bad": bad.to(ratio.dtype)}
    return Loss(value, {"ratio": ratio.detach(), "divergence": divergence, **shares})


def kl_mean(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussian steps of equal ``std [M]``, per dimension: ``mean (mu - mu_ref)^2 / (2 std^2)`` -> ``[M]``.

    ``std`` is the step's whole standard deviation, with ``sqrt(-dt)``: the true KL. The SD3 script of Flow-GRPO leaves
    ``-dt`` out, so its weight means something else at every step length; multiply a weight from there by ``-dt``.
    A step without noise gives 0. Gradient to both means, except that ``mean_ref`` is detached.
    """
    noisy = std > 0
    variance = torch.where(noisy, std, 1.0).square()
    return torch.where(noisy, mse(mean, mean_ref.detach()) / (2 * variance), 0.0)


# -- forward-process losses ---------------------------------------------------------------------------------------


def nft(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    v: Tensor,
    v_old: Tensor,
    probability: Tensor,
    beta: float,
    scale: float = 5.0,
    *,
    adaptive: bool = True,
) -> Loss:
    """DiffusionNFT (arXiv 2509.16117): ``v+`` is fitted to good samples, its mirror image ``v-`` to bad ones::

        v+ = (1 - beta) v_old + beta v        v- = (1 + beta) v_old - beta v        x0+- = x_t - t v+-
        scale / beta * [ r mean (x0+ - x0)^2 / w+  +  (1 - r) mean (x0- - x0)^2 / w- ],     w = sg mean |x0+- - x0|

    This is the authors' code. The paper writes ``r |v+ - u|^2 + (1 - r) |v- - u|^2`` with ``u = eps - x0``:
    ``adaptive=False`` is t^2 scale / beta times that, with minimum at ``v_old + (2 r - 1) / beta (u - v_old)``.

    Args:
        x0: ``[M, ...]`` samples of the old policy.
        x_t: ``[M, ...]`` the same, noised to ``t [M]``.
        v: ``[M, ...]`` velocity of the policy at ``x_t``, with gradient.
        v_old: ``[M, ...]`` of the old policy.
        probability: ``[M]`` r in [0, 1], that the sample is good.
        beta: > 0; smaller values take larger steps.

    Returns:
        metric ``contrast``, ``mean (v - v_old)^2``: at 0 the loss is plain weighted regression.
    """
    v_old = v_old.detach()

    def error(velocity: Tensor) -> Tensor:
        off = precise(x0_from(x_t, velocity, t)) - precise(x0)
        weight = off.detach().abs().flatten(1).mean(1).clamp_min(1e-5) if adaptive else 1.0
        return off.square().flatten(1).mean(1) / weight

    good, bad = error((1 - beta) * v_old + beta * v), error((1 + beta) * v_old - beta * v)
    value = scale / beta * (probability * good + (1 - probability) * bad)
    return Loss(value, {"contrast": mse(v.detach(), v_old)})


def weighted_fm(v: Tensor, x0: Tensor, eps: Tensor, weight: Tensor, v_old: Tensor | None = None) -> Loss:
    """Weighted flow matching ``weight mean (v - (eps - x0))^2``: supervised, RWR (arXiv 2501.13918), on-policy AWM.

    With ``v_old`` the part that every sample shares is known and need not be estimated from samples::

        (weight - 1) mean (v - u)^2 + mean (v - v_old)^2,    u = eps - x0

    ``v_old`` is the mean of u given ``x_t`` where the samples are the old policy's, so for weights of mean 1 that do
    not depend on the noise the expected gradient is the same. This removes the noise of that part, and with it the
    sampler's own error, which plain regression would teach too.

    Args:
        v: ``[M, ...]``, with gradient.
        weight: ``[M]``; a negative one pushes away and has no minimum.
        v_old: ``[M, ...]`` velocity of the policy that generated ``x0``, or None.

    Returns:
        metric ``fm``, the unweighted error.
    """
    error = mse(v, eps - x0)
    value = weight * error if v_old is None else (weight - 1) * error + mse(v, v_old.detach())
    return Loss(value, {"fm": error.detach()})


# -- reward gradients ---------------------------------------------------------------------------------------------


def reward_backprop(rewards: Tensor, known: Tensor, margin: float | None = None, scale: float = 1.0) -> Loss:
    """Direct reward gradients: the mean over C copies of each sample of::

        -scale r                        DRaFT (arXiv 2309.17400), AlignProp (2310.03739)
        scale relu(margin - r)          ReFL (2304.05977): margin 2, scale 1e-3

    Args:
        rewards: ``[C, M]``, with gradient; any finite number where missing.
        known: ``[C, M]`` bool, whether there is a reward; copies without one are left out of the mean.
        margin: reward from which a sample has no gradient; None = no limit.

    Returns:
        0 for a sample of which no copy has a reward.
    """
    each = -rewards if margin is None else F.relu(margin - rewards)
    counted = known.to(each.dtype)
    return Loss(scale * (each * counted).sum(0) / counted.sum(0).clamp_min(1))


# -- distribution matching ----------------------------------------------------------------------------------------


def dmd(x: Tensor, x_real: Tensor, x_fake: Tensor, weight: float | Tensor = 1.0) -> Loss:
    """Distribution matching distillation (DMD, arXiv 2311.18828), weighted by reward (Re-DMD, Reward Forcing)::

        g = (x_fake - x_real) / mean |x - x_real|,    weight mean (x - sg(x - g))^2 / 2

    The gradient with respect to ``x`` is ``weight g / D`` for D dimensions: it leads from the student's distribution
    to the teacher's, and is 0 if the two predictions are equal.

    Args:
        x: ``[M, ...]`` samples of the student, with gradient.
        x_real: ``[M, ...]`` clean samples that the teacher predicts from ``x`` re-noised.
        x_fake: ``[M, ...]`` the same from the critic, a model of the student's own distribution.
        weight: number or ``[M]``, such as ``exp(beta reward)``.

    Returns:
        metric ``mismatch``, ``mean |g|``.
    """
    here, real, fake = (precise(part.detach()) for part in (x, x_real, x_fake))
    scale = (here - real).abs().flatten(1).mean(1).clamp_min(1e-8)
    g = (fake - real) / column(scale, here)
    value = weight * (precise(x) - (here - g)).square().flatten(1).mean(1) / 2
    return Loss(value, {"mismatch": g.abs().flatten(1).mean(1)})


# -- preferences --------------------------------------------------------------------------------------------------


def pair_pref(
    error_w: Tensor,
    error_l: Tensor,
    ref_error_w: Tensor,
    ref_error_l: Tensor,
    beta: float | Tensor,
    weight: float | Tensor = 1.0,
    label: float | Tensor = 1.0,
) -> Loss:
    """Preference loss on flow-matching errors: Diffusion-DPO (arXiv 2311.12908), Flow-DPO (2501.13918)::

        D = (error_w - error_l) - (ref_error_w - ref_error_l)
        -weight [ y log sigmoid(-beta/2 D) + (1 - y) log sigmoid(beta/2 D) ]

    log 2 where policy and reference agree. Both samples of a pair share noise and time. ``beta`` is constant in time:
    the factor (1 - t)^2 that follows from noise prediction frees the high noise levels from the reference.

    Args:
        error_w: ``[P]`` mean squared error of the policy on the winner, with gradient; ``error_l`` on the loser.
        ref_error_w: ``[P]`` of the reference; ``ref_error_l`` likewise.
        beta: number or ``[P]``.
        weight: number or ``[P]``, importance of the pair.
        label: number or ``[P]``, probability y that the winner really is better.

    Returns:
        metrics ``accuracy`` (1 if the policy favours the winner more than the reference does, 1/2 where equally)
        and ``margin`` (-beta/2 D).
    """
    margin = -beta / 2 * ((error_w - error_l) - (ref_error_w - ref_error_l).detach())
    value = -weight * (label * F.logsigmoid(margin) + (1 - label) * F.logsigmoid(-margin))
    margin = margin.detach()
    return Loss(value, {"accuracy": (1 + margin.sign()) / 2, "margin": margin})


def rdp(
    log_ratio_a: Tensor,
    log_ratio_b: Tensor,
    gap: Tensor,
    beta: float,
    *,
    old_a: Tensor | None = None,
    old_b: Tensor | None = None,
    clip: float | None = None,
    reduce: Literal["sum", "mean"] = "sum",
) -> Loss:
    """Reward difference prediction, PRDP (arXiv 2402.08714): the log-ratios of two samples must explain their rewards::

        l = (R(a) - R(b) - gap / beta)^2,    R = sum over steps of logp - logp_ref
        max(l, l with every step's log-ratio within +-clip of what it was under the old policy)

    0 for all pairs exactly at the optimum of reward minus beta KL. ``beta`` belongs to the reduction: with mean
    log-probabilities over D dimensions, or ``reduce="mean"`` over T steps (the authors' code), it is D, T times larger
    than in ``reward - beta KL``.

    Args:
        log_ratio_a: ``[P, T]`` logp - logp_ref of one prompt's sample a, with gradient; ``log_ratio_b`` of sample b.
        gap: ``[P]`` reward(a) - reward(b).
        beta: > 0.
        old_a: ``[P, T]`` the log-ratios when the samples were generated; ``old_b`` likewise. Required with ``clip``.
        clip: trust region of a step's log-ratio; None for none.

    Returns:
        metrics ``difference`` (R(a) - R(b)), ``residual`` (difference - gap / beta) and ``clipped`` (1 where the
        clipped term decides).
    """

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).sum(1) if reduce == "sum" else (a - b).mean(1)

    found, wanted = difference(log_ratio_a, log_ratio_b), gap / beta
    plain = found - wanted
    metrics = {"difference": found.detach(), "residual": plain.detach(), "clipped": torch.zeros_like(plain)}
    if clip is None:
        return Loss(plain.square(), metrics)
    if old_a is None or old_b is None:
        raise ValueError("rdp with clip needs old_a and old_b, the log-ratios when the samples were generated")
    near_a = torch.clamp(log_ratio_a, old_a.detach() - clip, old_a.detach() + clip)
    near_b = torch.clamp(log_ratio_b, old_b.detach() - clip, old_b.detach() + clip)
    near = (difference(near_a, near_b) - wanted).square()
    metrics["clipped"] = (near > plain.square()).to(plain.dtype)
    return Loss(torch.maximum(plain.square(), near), metrics)
