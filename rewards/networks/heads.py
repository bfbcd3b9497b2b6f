"""Heads of LAION's aesthetic predictors and ImageReward: linear layers without activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rewards.networks.state_dicts import check_keys, skeleton

WIDTHS = (1024, 128, 64, 16, 1)
_DROPPED = (True, True, True, False)  # after which layers dropout stands: it counts in the keys


def mlp(width: int) -> nn.Sequential:
    """``[b, width]`` -> ``[b, 1]``; the layers are called 0, 2, 4, 6, 7 as in the published files."""
    layers: list[nn.Module] = []
    for i, out in enumerate(WIDTHS):
        layers.append(nn.Linear(width, out))
        layers.extend([nn.Identity()] if i < len(_DROPPED) and _DROPPED[i] else [])
        width = out
    return nn.Sequential(*layers)


def load_mlp(state: Mapping[str, Tensor], prefix: str, where: str, what: str) -> nn.Sequential:
    """The head whose keys start with ``prefix``, float32; RewardError names what does not fit."""
    own = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    surplus = {key: value for key, value in state.items() if not key.startswith(prefix)}
    first = own.get("0.weight", torch.zeros(WIDTHS[0], 768))
    width = first.shape[-1]
    check_keys({**own, **surplus}, skeleton(lambda: mlp(width)), where, what)
    head = mlp(width)
    head.load_state_dict(own)
    return head.requires_grad_(False).eval()


def load_linear(state: Mapping[str, Tensor], where: str, what: str) -> nn.Linear:
    """One layer ``[b, width]`` -> ``[b, 1]``, float32; RewardError names what does not fit."""
    width = state["weight"].shape[-1] if "weight" in state else 768
    check_keys(state, skeleton(lambda: nn.Linear(width, 1)), where, what)
    head = nn.Linear(width, 1)
    head.load_state_dict({key: value.float() for key, value in state.items()})
    return head.requires_grad_(False).eval()
