"""Recipes that record what the trainer gives them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from align.maths.losses import Loss, weighted_fm
from align.recipes.base import ForwardRecipe, NoisedTerms
from align.rollout.bench import Bench
from align.rollout.rollout import Scored
from rewards.base import Scores

SEEN: dict[str, list[Any]] = {}


class Recording(ForwardRecipe):
    """Flow matching that records scores, looks and terms"""

    needs = ("trajectory", "step_scores")
    kind: Literal["recording"] = "recording"

    def credit(self, scores: Scores, group: Tensor) -> Tensor:
        SEEN.setdefault("scores", []).append((scores, group))
        return scores.values.nan_to_num()

    def look(self, sample: Tensor, rollout: Scored, bench: Bench) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        SEEN.setdefault("look", []).append(sample)
        first = [value.flatten()[0].detach().clone() for _, value in bench.roles.parameters][:1]
        return {"number": sample.float(), "weight": first[0].repeat(len(sample))}

    def loss(self, terms: NoisedTerms, rollout: Scored, bench: Bench) -> Loss:  # type: ignore[override]
        SEEN.setdefault("loss", []).append((rollout, terms))
        x0, eps, point = self.noised(terms, rollout)
        return weighted_fm(bench.velocity("policy", point), x0, eps, torch.ones(len(terms)))
