"""Losses of language models: formulas on log-probabilities of tokens ``[N, L]``, one number per reply ``[N]``.

``mask [N, L]`` marks the tokens of a reply; values elsewhere are ignored. A reply without tokens gives 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from align.maths.losses import Loss, clipped_pg, pair_pref
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its tokens: ``[N, L]`` -> ``[N]``."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def token_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row over its tokens: ``[N, L]`` -> ``[N]``."""
    return torch.where(mask, values, 0.0).sum(1)


def token_nll(logp: Tensor, mask: Tensor) -> Loss:
    """Cross-entropy of replies, the mean over the tokens of each: supervised fine-tuning.

    Args:
        logp: ``[N, L]``, with gradient.
    """
    return Loss(token_mean(-logp, mask))


def token_kl(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    """Estimate of KL(policy | reference) from tokens of the policy, >= 0, ``[N]``::

        mean over tokens of exp(d) - d - 1,    d = logp_ref - logp

    The estimator k3 of http://joschu.net/blog/kl-approx.html, as in GRPO (arXiv 2402.03300). Gradient to ``logp``.
    """
    off = torch.where(mask, logp_ref.detach() - logp, 0.0)
    return token_mean(off.exp() - off - 1, mask)


def token_pg(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor, clip: float, kl: float = 0.0,
    logp_ref: Tensor | None = None,
) -> Loss:  # fmt: skip
    """GRPO on tokens (arXiv 2402.03300): the clipped surrogate of every token, the mean over the tokens of each reply.

    Every token has the advantage of its reply. ``kl`` times :func:`token_kl` to the reference is added.

    Args:
        logp: ``[N, L]``, with gradient.
        logp_old: ``[N, L]`` under the policy that wrote the replies.
        advantage: ``[N]``.
        clip: half width of the ratio's clipping range, such as 0.2.
        logp_ref: ``[N, L]``; required where ``kl`` is not 0.

    Returns:
        metrics ``ratio`` and ``clipped``, means over tokens, and ``kl``.
    """
    each = clipped_pg(logp.flatten(), logp_old.flatten(), advantage[:, None].expand_as(logp).flatten(), clip)
    value = token_mean(each.value.view_as(logp), mask)
    metrics = {name: token_mean(found.view_as(logp), mask) for name, found in each.metrics.items()}
    if logp_ref is not None:
        distance = token_kl(logp, logp_ref, mask)
        metrics["kl"] = distance.detach()
        value = value + kl * distance
    elif kl:
        raise ValueError("token_pg with kl needs logp_ref, the log-probabilities under the reference")
    return Loss(value, metrics)


def text_dpo(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Loss:
    """DPO on replies (arXiv 2305.18290): ``-log sigmoid(beta [(logp_w - ref_w) - (logp_l - ref_l)])``.

    log 2 where policy and reference agree. It is :func:`align.maths.losses.pair_pref` with the negative
    log-likelihood as the error.

    Args:
        logp_w: ``[P]`` log-probability of the whole better reply (:func:`token_sum`), with gradient.
        logp_l: ``[P]`` of the worse one, with gradient.
        ref_w: ``[P]`` under the reference; ``ref_l`` likewise.
        beta: published 0.1.

    Returns:
        metrics ``accuracy`` and ``margin``, see :func:`align.maths.losses.pair_pref`.
    """
    return pair_pref(-logp_w, -logp_l, -ref_w, -ref_l, 2 * beta)
