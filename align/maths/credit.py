"""Rewards of sampling steps, and vectors of rewards -> credit: VGPO's values, VPO's scores of sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.maths.advantages import Divisor, group_advantage
from align.maths.seeds import derive
from alignflow.groups import members
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

LOWEST, HIGHEST = 0.1, 10.0
"""Bounds of a step's share, which the sum of small or mixed values would let grow without end."""


def temporal_value(rewards: Tensor, discount: float) -> Tensor:
    """``Q_s = R_s + discount R_(s+1) + discount^2 R_(s+2) + ...``: values of sampling steps (VGPO).

    Args:
        rewards: ``[N, S]`` of what each step leads to, in the order of sampling; NaN = missing, and so is every value
            that contains it.
        discount: in [0, 1]; 0 gives the rewards.

    Returns:
        ``[N, S]`` float64.
    """
    values = rewards.double().clone()
    for step in range(values.shape[1] - 2, -1, -1):
        values[:, step] += discount * values[:, step + 1] if discount else 0.0
    return values


def step_shares(values: Tensor) -> Tensor:
    """``omega_s = Q_s / mean over s of Q_s`` in [:data:`LOWEST`, :data:`HIGHEST`] (VGPO); 1 if that mean is 0.

    Args:
        values: ``[N, S]`` >= 0; NaN = missing, which the mean leaves out.

    Returns:
        ``[N, S]``; the mean of a row is 1 unless a bound holds.
    """
    mean = values.nanmean(1, keepdim=True)
    shares = torch.where(mean == 0, torch.ones_like(values), values / mean)
    return shares.clamp(LOWEST, HIGHEST)


def anchored(
    values: Tensor, group: Tensor, scale: float, steps: int, normalise_by: Divisor = "group", clip: float | None = None
) -> Tensor:
    """``omega_s [ (Q_s - mean) / (std + eps) + scale Q_s ]``: VGPO's advantage of every step.

    Mean and deviation are those of the group at the step. The second term is in the first ``steps`` steps alone. It is
    what is left in a group without differences. Known of the published formula (arXiv 2512.12387) is ``[(Q - mean) +
    alpha Q] / std`` with ``alpha = scale std``, which has this limit; the rest is our reconstruction.

    Args:
        values: ``[N, S]`` >= 0; NaN = missing.
        group: ``[N]`` integers, one per prompt.
        scale: >= 0.
        steps: number of anchored steps.
        normalise_by: see :func:`~align.maths.advantages.group_advantage`.
        clip: largest absolute advantage; None for none.

    Returns:
        ``[N, S]`` float32, 0 if a value is missing.
    """
    columns = [group_advantage(column, group, normalise_by=normalise_by, clip=None) for column in values.unbind(1)]
    relative = torch.stack(columns, 1).double()
    absolute = torch.where(torch.arange(values.shape[1]) < steps, scale * values, 0.0)
    advantage = torch.nan_to_num(step_shares(values) * (relative + absolute))
    return (advantage if clip is None else advantage.clamp(-clip, clip)).float()


def preference_weights(seed: int, draws: int, heads: int) -> Tensor:
    """``[draws, heads]`` float64 weights of Dirichlet(1, ..., 1), the uniform distribution on the simplex.

    Equal seeds give equal weights.
    """
    generator = torch.Generator().manual_seed(derive(seed, "preferences"))
    raw = -torch.log1p(-torch.rand(draws, heads, generator=generator, dtype=torch.float64))
    return raw / raw.sum(1, keepdim=True)


def set_score(rewards: Tensor, weights: Tensor) -> Tensor:
    """``mean over k of max over j of w_k . r_j``: the score of a set of samples with several rewards (VPO).

    Args:
        rewards: ``[..., m, d]``, m members of a set with d rewards each; NaN = missing, and so is the set's score.
        weights: ``[K, d]`` preferences, see :func:`preference_weights`.

    Returns:
        ``[...]``.
    """
    return (rewards @ weights.to(rewards.dtype).T).amax(-2).mean(-1)


def marginal(rewards: Tensor, weights: Tensor) -> Tensor:
    """Decrease of the set's score without each member: ``S(all) - S(all but j)``.

    0 for a member that another one equals or exceeds under every preference.

    Args:
        rewards: ``[m, d]`` with m >= 2.
        weights: ``[K, d]``.

    Returns:
        ``[m]`` >= 0.
    """
    preferred = rewards @ weights.to(rewards.dtype).T  # [m, K]
    top, best = preferred.topk(2, 0)
    found = preferred.new_zeros(len(rewards))
    return found.index_add_(0, best[0], top[0] - top[1]) / len(weights)


def unit_scale(rewards: Tensor) -> Tensor:
    """Every column ``[N, d]`` from its lowest and highest number to 0 and 1; NaN stays, a constant column becomes 0."""
    low = torch.where(rewards.isnan(), torch.inf, rewards).amin(0)
    high = torch.where(rewards.isnan(), -torch.inf, rewards).amax(0)
    span = high - low
    return torch.where(span > 0, (rewards - low) / span, torch.zeros_like(rewards) * rewards)


def set_credit(rewards: Tensor, group: Tensor, seed: int, draws: int, size: int | None) -> Tensor:
    """Credit of samples with several rewards, before it is compared in the group: VPO for one sample a rollout.

    Args:
        rewards: ``[N, d]``; NaN = missing.
        group: ``[N]`` integers, one per prompt; they and ``seed`` determine a prompt's preferences.
        draws: number of preferences per prompt.
        size: members per set, which are neighbours in the group and share the score of their set; None = the marginal
            credit of each in the whole group.

    Returns:
        ``[N]`` float32; NaN for a sample with a missing reward, or, with ``size``, in the set of such a sample or in an
        incomplete set.
    """
    found = torch.full((len(rewards),), torch.nan, dtype=torch.float64)
    values = rewards.detach().cpu().double()
    known = values.isfinite().all(1)
    for rows in members(group.cpu()):
        weights = preference_weights(derive(seed, int(group[rows[0]])), draws, values.shape[1])
        if size is None:
            rows = rows[known[rows]]
            if len(rows) > 1:
                found[rows] = marginal(values[rows], weights)
            continue
        sets = rows[: len(rows) // size * size].reshape(-1, size)
        whole = sets[known[sets].all(1)]
        found[whole] = set_score(values[whole], weights)[:, None].expand(-1, size)
    return found.float()
