"""A judge from its settings."""

from __future__ import annotations

import torch

from rewards.judges.asking import Judge
from rewards.judges.endpoint import EndpointJudge
from rewards.judges.local import LocalJudge
from rewards.judges.models import Endpoint, Local


def load_judge(settings: Local | Endpoint, device: torch.device | str) -> Judge:
    """Read model, tokenizer and image settings of a local judge, or open a session with a server.

    Raises:
        RewardError: files are missing or damaged, or the server's key is not set.
    """
    return LocalJudge.load(settings, device) if isinstance(settings, Local) else EndpointJudge(settings)
