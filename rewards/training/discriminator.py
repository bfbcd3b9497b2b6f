"""The adversarial reward of Adv-GRPO: a discriminator between references and samples, updated as the policy changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rewards.base import Reward, RewardError
from rewards.digest import digest
from rewards.training.heads import perceptron
from rewards.training.losses import hinge

PATCHES = 64
"""Patches of an image that a step of learning sees; of a reference always the same."""


class Discriminator:
    """A small head on the unit features of a frozen backbone; higher looks more like a reference.

    It judges the whole image and, by the same head, its patches. Features are at unit length both where it is fitted
    and where it scores (arXiv 2511.20256's code normalises the latter alone); a score is of all patches, not of some
    that were drawn. Which references and patches a call of :meth:`fit` sees depends on the seed and on how many calls
    there were, so with its :meth:`state_dict` it continues bit for bit.

    Args:
        features: ``[N, 3, H, W]`` or ``[N, F, 3, H, W]`` in [0, 1] -> unit rows ``[N, 1 + P, D]`` of the whole and of
            its P patches, with gradients.
        references: R of ``[3, H, W]`` or ``[F, 3, H, W]`` in [0, 1], what samples should look like; sizes may differ.
        hidden: width of the head.
        lr: of Adam with betas 0.5 and 0.999.
        patches: their share of a score, and the weight of their loss beside that of the whole.
        only_behind: leave a call out in which references already score above the samples.
    """

    instead = False  # the policy learns from every rollout

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        references: Sequence[Tensor] | Tensor,
        *,
        hidden: int = 512,
        lr: float = 1e-4,
        seed: int = 0,
        patches: float = 0.3,
        only_behind: bool = False,
    ) -> None:
        if not len(references):
            raise RewardError("a discriminator needs references")
        self.features, self.seed, self.patches, self.only_behind, self.calls = features, seed, patches, only_behind, 0
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            self.real = torch.cat([self._some(features(one[None]), rng) for one in references])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head: nn.Module = perceptron(self.real.shape[-1], hidden, 1).to(self.real.device).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr, betas=(0.5, 0.999))

    def score(self, media: Tensor) -> Tensor:
        """``[N]`` with gradient to the pixels: ``(1 - patches) * whole + patches * mean over patches``."""
        features = self.features(media)
        whole = self.head(features[:, 0])[:, 0]
        if not self.patches:
            return whole
        return (1 - self.patches) * whole + self.patches * self.head(features[:, 1:])[..., 0].mean(1)

    def _some(self, features: Tensor, rng: np.random.Generator) -> Tensor:
        """``[N, 1 + P, D]`` -> ``[N, 1 + PATCHES, D]``: the whole, and as many random patches of each row."""
        if not self.patches:
            return features[:, :1]
        pick = torch.from_numpy(1 + rng.integers(0, features.shape[1] - 1, (len(features), PATCHES)))
        rows = torch.arange(len(features))[:, None]
        return torch.cat([features[:, :1], features[rows.to(features.device), pick.to(features.device)]], 1)

    def fit(self, media: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        """One step on samples ``[N, ...]``, each against a reference; returns loss and mean scores before the step."""
        rng = np.random.default_rng([self.seed, self.calls])
        self.calls += 1
        pick = torch.from_numpy(rng.integers(0, len(self.real), len(media))).to(self.real.device)
        with torch.no_grad():
            fake = self._some(self.features(media), rng)
        self.head.requires_grad_(True)
        real_score, fake_score = self.head(self.real[pick])[..., 0], self.head(fake)[..., 0]
        terms = hinge(real_score, fake_score)
        loss = terms[:, 0].mean() + (self.patches * terms[:, 1:].mean() if self.patches else 0.0)
        real, fakes = real_score[:, 0].mean(), fake_score[:, 0].mean()
        if real <= fakes or not self.only_behind:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.head.requires_grad_(False)
        return {"loss": loss.item(), "real": real.item(), "fake": fakes.item()}

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`fit` changes."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a discriminator with the same settings and references."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.calls = state["calls"]

    def reward(self) -> Reward:
        """As a reward; its fingerprint changes with every step, so that scores kept before do not count after."""

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return self.score(media)

        return Reward(
            "adversarial",
            function,
            differentiable=True,
            fingerprint=lambda: digest(self.head.state_dict()),
            refresh=self,
        )
