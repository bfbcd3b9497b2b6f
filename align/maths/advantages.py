"""Rewards -> advantages: how much better a sample is than the other samples of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Divisor = Literal["group", "global", "centred", "none"]
"""Divisor of an advantage; see :func:`group_advantage`."""


def group_advantage(
    rewards: Tensor,
    group: Tensor,
    *,
    normalise_by: Divisor = "group",
    clip: float | None = 5.0,
    eps: float = 1e-4,
) -> Tensor:
    """``A = (r - mean of the group) / (std + eps)``, clipped: GRPO's advantage.

    Standard deviations are of the population, so a batch given twice changes nothing. Missing rewards (not finite)
    count in no statistic and get 0, as does every sample of a group whose rewards are equal.

    Args:
        rewards: ``[N]`` of all processes.
        group: ``[N]`` integers, equal for the samples of one prompt; in any order, with any gaps.
        normalise_by: the divisor. "group": std within the group; every group has the same influence, however little its
            samples differ. "global": std of all raw rewards (Flow-GRPO, DiffusionNFT); changes when the rewards of one
            prompt shift. "centred": std of all rewards minus their group means; does not change then. "none": 1
            (Dr. GRPO, arXiv 2503.20783).
        clip: largest absolute value; None for none.

    Returns:
        ``[N]`` float32.
    """
    values, index = clean(rewards, group)
    centred = values - group_mean(values, index)
    everyone = torch.zeros_like(index)
    if normalise_by == "group":
        scale = group_mean(centred.square(), index).sqrt() + eps
    elif normalise_by == "global":
        scale = group_mean((values - group_mean(values, everyone)).square(), everyone).sqrt() + eps
    elif normalise_by == "centred":
        scale = group_mean(centred.square(), everyone).sqrt() + eps
    elif normalise_by == "none":
        scale = torch.ones_like(values)
    else:
        raise ValueError(f"normalise_by should be group, global, centred or none, given {normalise_by!r}")
    advantage = torch.nan_to_num(centred / scale)
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    return advantage.to(rewards.device, torch.float32)


def zero_variance(rewards: Tensor, group: Tensor) -> int:
    """Number of groups without a signal: no two of their (not missing) rewards differ."""
    values, index = clean(rewards, group)
    differs = (values - group_mean(values, index)).abs() > 0
    return len(index.unique()) - len(index[differs].unique())


def clean(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards in double precision with NaN for missing, and groups numbered from 0; both ``[N]`` on the CPU.

    Rewards pass through float32, so sums in double are exact and the mean of equal rewards is that reward exactly.
    """
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards and group should both be [N], given {list(rewards.shape)} and {list(group.shape)}")
    values = rewards.detach().to("cpu", torch.float32).double()
    index = group.to("cpu").unique(return_inverse=True)[1]
    return torch.where(values.isfinite(), values, torch.nan), index


def group_mean(values: Tensor, index: Tensor) -> Tensor:
    """Mean of each row's group over what is not NaN, ``[N]``; NaN for a group without any."""
    known = ~values.isnan()
    total = values.new_zeros(int(index.max()) + 1 if len(index) else 0)
    count = total.clone().index_add_(0, index, known.to(values.dtype))
    total.index_add_(0, index, torch.where(known, values, 0.0))
    return (total / count)[index]
