"""A CLIP score whose last vision layers are trained with the policy, so that references stay ahead (Adv-GRPO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewards.base import Reward, RewardError
from rewards.digest import digest
from rewards.networks.clip import Clip
from rewards.training.losses import bradley_terry


class TunedClip:
    """Logit scale times cosine of image and prompt, by a CLIP that is trained to prefer references (arXiv 2511.20256).

    A step lowers CLIP's cross-entropy among two images of a prompt, a reference and a sample, of which the reference
    wins: ``-log sigmoid(reference - sample)``. It is taken only while references score below the samples, and the
    policy then waits (:attr:`instead`). Which references a call of :meth:`fit` sees depends on the seed and on how many
    calls there were, so with its :meth:`state_dict` it continues bit for bit.

    Args:
        clip: in float32, frozen; it is changed in place.
        references: prompt -> images ``[3, H, W]`` in [0, 1] of any size; kept at the model's size.
        layers: of the vision tower, from its end, that learn; norm and projection behind them do not.
        lr: of Adam with betas 0.5 and 0.999.
        chunk: images through the network at once.
        frames: of a video that count, all by default.

    Raises:
        RewardError: no references, or more layers than there are.
    """

    def __init__(
        self,
        clip: Clip,
        references: Mapping[str, Sequence[Tensor]],
        *,
        layers: int = 2,
        lr: float = 5e-6,
        seed: int = 0,
        chunk: int = 32,
        frames: int | None = None,
    ) -> None:
        tower = clip.model.vision_model.encoder.layers
        if not references:
            raise RewardError("there are no references to compare with")
        if layers > len(tower):
            raise RewardError(f"layers: {layers} is more than the {len(tower)} layers of the vision tower")
        self.clip, self.seed, self.chunk, self.frames, self.calls = clip, seed, chunk, frames, 0
        self.references = {
            prompt: torch.cat([clip.preprocess(image[None]) for image in images])
            for prompt, images in references.items()
        }
        self.tuned = tower[len(tower) - layers :]
        self.optimizer = torch.optim.Adam(self.tuned.parameters(), lr=lr, betas=(0.5, 0.999))
        self.instead = False

    def score(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        """``[N]`` with gradient to the pixels; of videos the mean over frames."""
        return self.clip.logit_scale * self.clip.cosine(media, list(prompts), self.chunk, self.frames)

    def fit(self, media: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """At most one step, on the samples whose prompts have references; loss and mean scores before it."""
        rng = np.random.default_rng([self.seed, self.calls])
        self.calls += 1
        rows = [i for i, prompt in enumerate(prompts) if prompt in self.references]
        real = [self.references[prompts[i]][rng.integers(len(self.references[prompts[i]]))] for i in rows]
        sums = torch.zeros(3, device=self.clip.model.device)
        self.tuned.requires_grad_(True)
        for start in range(0, len(rows), self.chunk):
            part = slice(start, start + self.chunk)
            texts = [prompts[i] for i in rows[part]]
            fakes = self.score(media[rows[part]], texts)
            reals = self._logits(torch.stack(real[part]), texts)
            terms = bradley_terry(reals, fakes)
            (terms.sum() / len(rows)).backward()
            sums += torch.stack([terms.sum(), reals.sum(), fakes.sum()]).detach()
        loss, reals_mean, fakes_mean = (sums / len(rows)).tolist()  # without rows NaN
        self.instead = reals_mean < fakes_mean
        if self.instead:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tuned.requires_grad_(False)
        return {"loss": loss, "real": reals_mean, "fake": fakes_mean, "pairs": float(len(rows))}

    def _logits(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """``[N]`` of what the model's preprocessing has made."""
        seen = self.clip.pixel_features(pixels.to(self.clip.model.device))
        return self.clip.logit_scale * (seen * self.clip.text_features(prompts, self.chunk)).sum(-1)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`fit` changes."""
        return {"layers": self.tuned.state_dict(), "optimizer": self.optimizer.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of one with the same model, settings and references."""
        self.tuned.load_state_dict(state["layers"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.calls = state["calls"]

    def reward(self, name: str) -> Reward:
        """As a reward; its fingerprint changes with every step, so that scores kept before do not count after."""

        def function(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
            return self.score(media, prompts)

        scale = self.clip.logit_scale
        return Reward(
            name,
            function,
            range=(-scale, scale),
            differentiable=True,
            fingerprint=lambda: digest(self.tuned.state_dict()),
            refresh=self,
        )
