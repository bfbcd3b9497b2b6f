"""What the three trainings of the embedded models share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np
import torch


class Log:
    """Prints a line every `every` steps; `seconds` is the time since it was made."""

    def __init__(self, every: int = 50) -> None:
        self.every, self.start = every, time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def __call__(self, stage: str, step: int, steps: int, **values: float) -> None:
        if step % self.every == 0 or step == steps - 1:
            text = " ".join(f"{k} {v:.4f}" for k, v in values.items())
            print(f"{stage} {step + 1}/{steps} {text} {self.seconds:.0f} s", flush=True)


def optimizer(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only; `cosine` sets its learning rate."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    for group in opt.param_groups:
        group["peak"] = lr
    return opt


def cosine(opt: torch.optim.Optimizer, step: int, steps: int, warmup: int = 50) -> None:
    """Sets the learning rate of `step`: a linear warm-up, then half a cosine down to 2 % of the peak."""
    warmup = min(warmup, steps // 10 + 1)
    part = (step - warmup) / max(steps - warmup, 1)
    factor = (step + 1) / warmup if step < warmup else 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * part))
    for group in opt.param_groups:
        group["lr"] = group["peak"] * factor


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] to float [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
