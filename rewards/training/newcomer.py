"""A user who is not in a trained reward's table, known by a few preferences: PAL and VPL for new users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from alignflow.files.images import ImageError, named, read_image
from alignflow.files.rows import RowError, json_rows
from alignflow.paths import expanded, is_file
from rewards.base import RewardError
from rewards.training.heads import Head, IdealPoint, Variational

if TYPE_CHECKING:
    from rewards.training.scorer import Scorer

Pair = tuple[str, Tensor, Tensor]
"""Prompt, preferred image ``[3, H, W]`` and the other one, in [0, 1]."""


def read_pairs(table: str) -> list[Pair]:
    """Preferences of one user: JSON lines with ``prompt``, ``chosen`` and ``rejected``, files relative to the table.

    Rows with ``tie: true`` are left out.

    Raises:
        RewardError: no such table, a row without these texts, an image that cannot be read, or no pair.
    """
    path = expanded(table, RewardError)
    if not is_file(path):
        raise RewardError(f"pairs: there is no file {table}")
    found: list[Pair] = []
    try:
        for place, row in json_rows(path):
            texts = [row.get(name) for name in ("prompt", "chosen", "rejected")]
            if not all(isinstance(value, str) and value for value in texts):
                raise RewardError(f"pairs: {place} should have a prompt, a chosen and a rejected image, all text")
            prompt, chosen, rejected = map(str, texts)
            if row.get("tie") not in (True, "true"):
                won, lost = (_read(path.parent / expanded(file, RewardError), place) for file in (chosen, rejected))
                found.append((prompt, won, lost))
    except RowError as error:
        raise RewardError(f"pairs: {error}") from None
    if not found:
        raise RewardError(f"pairs: {table} holds no pair with a preference")
    return found


def _read(file: Path, place: str) -> Tensor:
    try:
        pixels = read_image(file)
    except (ImageError, OSError) as error:
        raise RewardError(f"pairs: {place}: {named(file)} cannot be read: {error}") from None
    return torch.from_numpy(pixels.copy()).movedim(-1, -3).float() / 255


@torch.no_grad()
def user_of(scorer: Scorer, pairs: list[Pair], chunk: int) -> Tensor:
    """The user of these pairs as input of the head: a mixture ``[1, K]`` or a latent ``[1, dim]``.

    Raises:
        RewardError: the head has no users.
    """
    prompts = [prompt for prompt, _, _ in pairs]
    text = scorer.text(prompts, chunk)
    chosen = scorer.embed([one for _, one, _ in pairs], prompts, chunk)
    rejected = scorer.embed([one for _, _, one in pairs], prompts, chunk)
    head: Head = scorer.head
    if isinstance(head, IdealPoint):
        return mixture_of(head, chosen, rejected, text)[None]
    if isinstance(head, Variational):
        return head.encode(head.join(chosen, text), head.join(rejected, text))[0][None]
    raise RewardError("pairs: this reward's head has no users; ideal_point and variational heads do")


def mixture_of(head: IdealPoint, chosen: Tensor, rejected: Tensor, text: Tensor, ridge: float = 0.1) -> Tensor:
    """The mixture ``softmax(w) [K]`` that explains M pairs best, while projection and prototypes stay as they are.

    ``w`` minimises ``mean -log sigmoid(s(chosen) - s(rejected)) + ridge |w|^2 / M`` (PAL, arXiv 2406.08469, few-shot
    users; the ridge is ours, and holds ``w`` where the pairs say nothing).

    Args:
        chosen: ``[M, D]`` unit features of the preferred images, as ``rejected`` and ``text``.
    """
    logits = torch.zeros(len(head.prototypes), dtype=torch.float64, device=chosen.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        share = logits.softmax(-1).float().expand(len(chosen), -1)
        margin = (head(chosen, text, share) - head(rejected, text, share))[:, 0]
        loss = F.softplus(-margin).mean() + ridge * logits.square().sum() / len(chosen)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return logits.detach().softmax(-1).float()
