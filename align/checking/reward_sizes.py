"""Memory of the rewards' networks, by the ids of published weights; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from align.checking.named import parts_of
from rewards.base import RewardSettings

VIT_H = 986_109_441
"""CLIP ViT-H/14 of open_clip, both towers."""
PUBLISHED = {
    "yuvalkirstain/PickScore_v1": VIT_H,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": VIT_H,
    "xswu/HPSv2/HPS_v2_compressed.pt": VIT_H,
    "xswu/HPSv2/HPS_v2.1_compressed.pt": VIT_H,
    "openai/clip-vit-large-patch14": 427_616_513,
    "openai/clip-vit-base-patch32": 151_277_313,
    "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth": 927_969,
    "THUDM/ImageReward/ImageReward.pt": 447_000_000,
    "facebook/dinov2-base": 86_580_480,
    "MizzenAI/HPSv3/HPSv3.safetensors": 8_291_375_616,
    "KwaiVGI/VideoReward/checkpoint-11352/model.pth": 2_208_985_600,
    "Qwen/Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "shapes": 2_000_000,
}
"""Published weights -> parameters, counted from the published sizes of each architecture; ImageReward's is rounded.

Of HPSv3 and VideoReward it is the Qwen2-VL below the head.
"""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SMALL = ("shapes", "checks")


def reward_bytes(rewards: Sequence[RewardSettings | None]) -> tuple[float, str]:
    """Bytes of the networks on the training device, and what they are or why some are not counted.

    Rewards with different settings load their networks separately, even if these have the same weights.
    """
    total, known, unknown = 0.0, [], []
    for reward in (one for top in _distinct(rewards) for one in _leaves(top)):
        kind = str(getattr(reward, "kind", ""))
        if kind in SMALL:
            continue
        sizes = [(PUBLISHED.get(name), dtype) for name, dtype in _weights(reward)]
        if not sizes and _served(reward):
            continue
        if not sizes or any(size is None for size, _ in sizes):
            unknown.append(kind)
            continue
        bytes_ = sum((size or 0) * BYTES[dtype] for size, dtype in sizes)
        total += bytes_
        known.append(f"{kind} {sum(size or 0 for size, _ in sizes) / 1e6:,.0f} million weights, {sizes[0][1]}")
    if unknown:
        known.append(f"without {', '.join(dict.fromkeys(unknown))}, whose size is not known here")
    return total, "; ".join(known)


def _distinct(rewards: Sequence[RewardSettings | None]) -> list[RewardSettings]:
    """Equal settings are one reward."""
    found: list[RewardSettings] = []
    for reward in rewards:
        if reward is not None and reward not in found:
            found.append(reward)
    return found


def _leaves(reward: RewardSettings) -> Iterator[RewardSettings]:
    """The rewards inside a composite one that are on the training device, or the reward itself."""
    kind, device = getattr(reward, "kind", ""), getattr(reward, "device", None)
    if kind == "remote" or (kind == "placed" and device is not None):
        return
    if kind == "pool":  # its workers may share the card
        yield reward
        return
    below = [value for name in type(reward).model_fields for value in _inside(getattr(reward, name))]
    if not below:
        yield reward
    for one in below:
        yield from _leaves(one)


def _inside(value: Any) -> list[RewardSettings]:
    """The outermost rewards in a setting."""
    found: list[tuple[tuple[str, ...], RewardSettings]] = []
    for path, part in parts_of(value):
        if isinstance(part, RewardSettings) and not any(path[: len(above)] == above for above, _ in found):
            found.append((path, part))
    return [part for _, part in found]


def _weights(reward: RewardSettings) -> list[tuple[str, str]]:
    """(id, precision) of each network that a reward loads."""
    from rewards.encoders import aesthetic, clip_score, hpsv2

    dtype = str(getattr(reward, "dtype", "float32"))
    if isinstance(reward, hpsv2.HumanPreferenceScore):
        return [(reward.weights or hpsv2.FILES[reward.version], dtype)]
    if isinstance(reward, clip_score.ClipScore):
        return [(reward.model or clip_score.VARIANTS[reward.variant].model, dtype)]
    if isinstance(reward, aesthetic.Aesthetic):
        return [(reward.model, dtype), (reward.head or aesthetic.FILES[reward.version], "float32")]
    judge = getattr(reward, "judge", None)
    holder: Any = judge if getattr(judge, "kind", "") == "local" else reward
    names = [getattr(holder, name, None) for name in ("model", "weights")]
    dtype = str(getattr(holder, "dtype", "float32"))
    return [(name, dtype) for name in names if isinstance(name, str)][:1]


def _served(reward: RewardSettings) -> bool:
    """Whether a judge behind an address answers."""
    return getattr(getattr(reward, "judge", None), "kind", "") == "endpoint"
