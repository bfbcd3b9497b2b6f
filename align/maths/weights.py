"""Rewards or advantages -> positive weights and probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


from align.maths.advantages import clean, group_mean


def nft_probability(
    advantage: Tensor,
    clip: float = 5.0,
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all",
) -> Tensor:
    """DiffusionNFT's probability that a sample is good: ``r = 1/2 + clamp(A, -clip, clip) / (2 clip)``.

    Args:
        advantage: ``[N]``.
        clip: > 0, the advantage that counts as certainty.
        mode: which advantages are used, after clipping. "all": both signs; "positive_only" and "negative_only": the
            other sign becomes 0; "one_only": 1 if positive, else 0; "binary": its sign. As in the authors' code, where
            the last two therefore move r by 1 / (2 clip) at most, not to 0 and 1.

    Returns:
        ``[N]`` in [0, 1]; 1/2, without a gradient at ``v = v_old``, for advantage 0.
    """
    value = advantage.clamp(-clip, clip)
    if mode == "positive_only":
        value = value.clamp_min(0)
    elif mode == "negative_only":
        value = value.clamp_max(0)
    elif mode == "one_only":
        value = (value > 0).to(value.dtype)
    elif mode == "binary":
        value = value.sign()
    elif mode != "all":
        raise ValueError(f"mode should be all, positive_only, negative_only, one_only or binary, given {mode!r}")
    return (0.5 + value / (2 * clip)).clamp(0, 1)


def gap_power(winner: Tensor, loser: Tensor, alpha: float, scale: float) -> Tensor:
    """Weight of a preference pair, ``alpha^(winner / scale) - alpha^(loser / scale)``: GAPO (arXiv 2504.10044).

    The same difference weighs more at the top of the scale. 0 for equal scores, and ``alpha - 1`` at most.

    Args:
        winner: ``[P]`` scores from 0 to ``scale``; ``loser`` likewise.
        alpha: > 1.

    Returns:
        ``[P]`` float32.
    """
    return torch.pow(alpha, winner.float() / scale) - torch.pow(alpha, loser.float() / scale)


def beta_of_gap(gap: Tensor, beta: float, rate: float, extra: float) -> Tensor:
    """``beta (1 + extra (1 - exp(-rate gap)))``: MM-DPO's beta of a pair (MM-RLHF, arXiv 2502.10391).

    Args:
        gap: ``[P]`` >= 0, score of the winner minus that of the loser.

    Returns:
        ``[P]`` float32 from ``beta`` (gap 0) to ``beta (1 + extra)``.
    """
    return beta * (1 + extra * (1 - torch.exp(-rate * gap.float())))


def feature_trust(distance: Tensor, rate: float, bias: float, low: float = 1.0, high: float = 2.21) -> Tensor:
    """``exp(bias - rate distance)`` in [low, high]: PrefPaint's trust in a reward (arXiv 2410.21966).

    Args:
        distance: ``[N]`` >= 0 of a sample's features from those that the reward was trained on; NaN = unknown.

    Returns:
        ``[N]`` float32; NaN if the distance is.
    """
    return torch.exp(bias - rate * distance.float()).clamp(low, high)


def softmax_weight(
    rewards: Tensor,
    group: Tensor,
    temperature: float,
    clip: float | None = None,
    standardise: bool = False,
) -> Tensor:
    """Reward-weighted regression's ``exp(r / temperature)``, divided by its mean in the group (arXiv 2501.13918).

    Weighting samples of p this way makes p exp(r / temperature) / Z, the optimum of reward - temperature KL.

    Args:
        rewards: ``[N]``; missing ones (not finite) get weight 0 and count in no mean.
        group: ``[N]`` integers, one per prompt.
        temperature: > 0; lower values favour the best samples more.
        clip: largest weight; the excess is not given to other samples.
        standardise: divide rewards by their group's (population) std first, so that temperature has no unit.

    Returns:
        ``[N]`` float32, >= 0, with mean 1 in a group before the clip.
    """
    if temperature <= 0:
        raise ValueError(f"temperature should be positive, given {temperature}")
    values, index = clean(rewards, group)
    if standardise:
        centred = values - group_mean(values, index)
        values = centred / (group_mean(centred.square(), index).sqrt() + 1e-4)
    top = values.new_full((len(values),), -torch.inf)
    top.scatter_reduce_(0, index, torch.nan_to_num(values, nan=-torch.inf), "amax")
    weight = torch.exp((values - top[index]) / temperature)
    weight = torch.nan_to_num(weight / group_mean(weight, index))
    if clip is not None:
        weight = weight.clamp_max(clip)
    return weight.to(rewards.device, torch.float32)
