"""Embeddings of users from a few of their preferences, for policies that attend to users."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from align.data.files import writing
from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.pair_table import Judged, read_judged
from align.preference.examples import CHUNK, Examples
from alignflow.errors import DataError
from alignflow.files import tensor_files
from rewards.training import folder as reward_folder
from rewards.training.newcomer import user_of
from rewards.training.scorer import Scorer, load_backbone
from rewards.training.settings import Backbone


def embed_users(table: str, shots: int, backbone: str, reward: str | None, device: str) -> dict[str, Tensor]:
    """User -> embedding of his or her first ``shots`` pairs.

    With a backbone a pair is a token ``[2 D]``: the direction in which its chosen image's features differ from its
    rejected image's, and those of the prompt, at a mean square of 1. With a trained reward whose head knows users there
    is one token: the mixture (PAL) or latent (VPL) that the head infers from all the pairs.

    Args:
        backbone: a CLIPModel, as ``backbone.model`` of ``alignflow reward train``.
        reward: folder of a trained reward to be used instead; None = the backbone.

    Raises:
        DataError: a row without a user, or a user with fewer pairs.
        RewardError: a backbone or reward that cannot be loaded, or has no users.
    """
    by_user = _first(table, shots)
    if reward is not None:
        _, scorer = reward_folder.load(reward, device, "float32")
        return {user: _inferred(scorer, rows) for user, rows in by_user.items()}
    scorer = Scorer(load_backbone(Backbone(model=backbone), device))
    return {user: _tokens(scorer, rows) for user, rows in by_user.items()}


def _first(table: str, shots: int) -> dict[str, list[Judged]]:
    """User -> his or her first pairs with a preference."""
    found: dict[str, list[Judged]] = {}
    for row in read_judged(table):
        if not row.user:
            raise DataError(f"{row.prompt.where}: the user is missing; an embedding needs a column user in every row")
        if row.outcome == 1 and len(mine := found.setdefault(row.user, [])) < shots:
            mine.append(row)
    few = [user for user, rows in found.items() if len(rows) < shots]
    if few or not found:
        said = f"user {few[0]!r} has {len(found[few[0]])} pairs" if few else "there is no pair with a preference"
        raise DataError(f"{table}: {said}, but --shots {shots} needs more; lower --shots")
    return found


def _tokens(scorer: Scorer, rows: list[Judged]) -> Tensor:
    chosen, rejected = Examples(scorer, rows, (), frozen=True).features(torch.arange(len(rows)))
    direction = F.normalize(chosen[0] - rejected[0], dim=-1)
    return (torch.cat([direction, chosen[1]], 1) * scorer.width**0.5).float().cpu().contiguous()


def _inferred(scorer: Scorer, rows: list[Judged]) -> Tensor:
    sides = [[to_tensor(pixels_of(row.prompt, name)) for row in rows] for name in ("chosen", "rejected")]
    pairs = [(row.prompt.text, won, lost) for row, won, lost in zip(rows, *sides, strict=True)]
    return user_of(scorer, pairs, CHUNK).float().cpu().contiguous()


def save_embeddings(path: Path, users: dict[str, Tensor]) -> None:
    """Write embeddings as ``policy.embeddings`` reads them; whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tensor_files.save(path, users, {"format": "pt"})
