"""Disk cache of scores, keyed by the content of the scored samples."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alignflow.paths import expanded
from rewards import AnyReward
from rewards.base import Reward, RewardError, Scores, WrapperSettings
from rewards.digest import digest, identity
from rewards.serving.score_store import ScoreStore

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Cached(WrapperSettings):
    """Another reward, computed once per sample: scores are cached by content, across runs and processes.

    The key is a digest of pixels (as float32), prompt, inputs, the reward's settings, and its weights or code as far as
    the reward reports them; change ``version`` where it cannot. A missing score is not kept.
    """

    kind: Literal["cached"] = Field("cached", description="another reward, computed once per sample")
    reward: AnyReward = Field(description="reward to cache: {kind: ...}")
    folder: str = Field("~/.cache/alignflow/scores", description="cache folder, with one file per reward")
    version: str = Field("", description="cache version; change it to discard the cached scores")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Build the reward and open its file.

        Raises:
            RewardError: its scores depend on other samples or change while a policy trains, or the folder cannot be
                written.
        """
        import torch

        inner = self.reward.build(device).fixed()
        if inner.scope != "sample":
            raise RewardError(
                f"reward {inner.name!r} compares samples of a {inner.scope}, so its scores cannot be cached "
                "separately; cache the rewards inside it"
            )
        name = digest([identity(self.reward, inner), self.version])
        store = ScoreStore(expanded(self.folder, RewardError) / f"{inner.name}-{name[:16]}.sqlite")

        def function(media: Tensor, prompts: list[str], group: Tensor | None, **inputs: Any) -> Scores:
            keys = [_key(media[i].detach().float(), prompts[i], inputs, i) for i in range(len(prompts))]
            known = store.read(keys)
            new = [i for i, key in enumerate(keys) if key not in known]
            fresh = _scored(inner, media, prompts, inputs, new)
            names = list(dict.fromkeys([*fresh.parts, *(name for row in known.values() for name in row if name)]))
            rows = {
                keys[i]: {"": float(fresh.values[n]), **{name: float(part[n]) for name, part in fresh.parts.items()}}
                for n, i in enumerate(new)
                if n not in fresh.reasons
            }
            store.write(rows)
            found = known | rows
            missing = {i: fresh.reasons[n] for n, i in enumerate(new) if n in fresh.reasons}
            column = {
                name: torch.tensor([found.get(key, {}).get(name, torch.nan) for key in keys]) for name in ["", *names]
            }
            return Scores(column.pop(""), missing, column)

        return replace(inner, function=function, differentiable=False)


def _key(media: Tensor, prompt: str, inputs: dict[str, Any], index: int) -> str:
    return digest([media, prompt, {name: value[index] for name, value in inputs.items()}])


def _scored(inner: Reward, media: Tensor, prompts: list[str], inputs: dict[str, Any], rows: list[int]) -> Scores:
    """Scores of some of the samples, on the CPU."""
    import torch

    if not rows:
        return Scores(torch.empty(0))
    some = {
        name: value[rows] if isinstance(value, torch.Tensor) else [value[i] for i in rows]
        for name, value in inputs.items()
    }
    scores = inner(media[rows], [prompts[i] for i in rows], None, some)
    return replace(scores, values=scores.values.detach().cpu())
