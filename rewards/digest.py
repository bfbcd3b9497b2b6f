"""Content digests of a reward's settings and of its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignflow.lazy import lazy
from rewards.base import Reward, RewardSettings

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def digest(value: Any) -> str:
    """SHA-256 of tensors (dtype, shape and bytes), and of whatever JSON can hold, in mappings and sequences."""
    seen = hashlib.sha256()
    _feed(seen, value)
    return seen.hexdigest()


def _feed(seen: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        seen.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        # the added dimension has stride 1, which a single row of a larger tensor may not have
        rows = value.detach().cpu().contiguous()[..., None]
        seen.update(rows.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        seen.update(f"mapping {len(value)}:".encode())
        for key in sorted(value):
            _feed(seen, key)
            _feed(seen, value[key])
    elif isinstance(value, list | tuple):
        seen.update(f"sequence {len(value)}:".encode())
        for item in value:
            _feed(seen, item)
    else:
        text = json.dumps(value, sort_keys=True, default=repr)
        seen.update(f"{type(value).__name__} {len(text)}:{text}".encode())


def identity(settings: RewardSettings, reward: Reward) -> str:
    """Digest of everything scores depend on: settings, weights and code as far as the reward tells of them."""
    return digest([settings.model_dump(mode="json"), reward.fingerprint()])
