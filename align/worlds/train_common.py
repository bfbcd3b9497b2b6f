"""Code shared by the trainings of the embedded models."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EMA = 0.998
HIGH = 1.1  # centre of the training times' logits: what an image holds is decided at high noise
INNER = re.compile(r"attn|mlp|ff|blocks\.\d+\.proj_out|SelfAttention\.[qkvo]|DenseReluDense")  # matrices inside blocks
Losses = dict[str, Tensor]
NO_CAPTION = 0.1  # share of empty captions, so that classifier-free guidance works


@dataclass(frozen=True)
class Plan:
    """One stretch of training: scenes to draw, optimizer steps, batch, peak learning rate, `wrong` of the captions."""

    scenes: int
    steps: int
    batch: int
    lr: float
    wrong: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Clean latents [n, ...], what the model is given beside the noisy ones and the time, and the loss's weights."""

    x0: Tensor
    inputs: tuple[Any, ...]
    weight: Tensor | float = 1.0


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
    """uint8 [n, h, w, 3] or [n, F, h, w, 3] to float [n, 3, h, w] or [n, 3, F, h, w] in [-1, 1]."""
    return torch.from_numpy(np.moveaxis(images, -1, 1)).float() / 127.5 - 1


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for all else."""
    inner = {n: p for n, p in model.named_parameters() if p.ndim == 2 and INNER.search(n)}
    muon = torch.optim.Muon(inner.values(), lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for group in muon.param_groups:
        group["peak"] = lr
    return [muon, optimizer((p for n, p in model.named_parameters() if n not in inner), lr)]


def minimise(
    name: str,
    model: nn.Module,
    losses: Callable[[np.random.Generator], dict[str, Tensor]],
    plan: Plan,
    seed: int,
    log: Log,
) -> None:
    """Trains `model` on the sum of `losses(rng)`; it ends with the averaged weights, and in `eval`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    opts, mean = optimizers(model.train(), plan.lr), copy.deepcopy(model)
    for step in range(plan.steps):
        parts = losses(rng)
        for opt in opts:
            cosine(opt, step, plan.steps, warmup=100)
            opt.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        update_mean(mean, model, min(EMA, (step + 1) / (step + 10)))
        log(name, step, plan.steps, **{part: loss.item() for part, loss in parts.items()})
    model.load_state_dict(mean.state_dict())
    model.eval()


def fit(name: str, model: nn.Module, rows: int, batch: Callable[..., Batch], plan: Plan, seed: int, log: Log) -> None:
    """Trains `model(x_t, t, *inputs)` by flow matching.

    Args:
        rows: how many examples there are.
        batch: (rows int64 [n], rng) -> those examples.
    """

    def loss(rng: np.random.Generator) -> Losses:
        example = batch(rng.integers(0, rows, plan.batch), rng)
        x0, eps = example.x0, torch.randn_like(example.x0)
        t = torch.sigmoid(HIGH + 1.2 * torch.randn(plan.batch))
        tt = t.view(-1, *[1] * (x0.ndim - 1))
        v = model((1 - tt) * x0 + tt * eps, t, *example.inputs)
        return {"loss": (example.weight * (v - (eps - x0)).square()).mean()}

    minimise(name, model, loss, plan, seed, log)


@torch.no_grad()
def update_mean(mean: nn.Module, model: nn.Module, decay: float) -> None:
    """mean = decay * mean + (1 - decay) * model, on all parameters."""
    torch._foreach_lerp_(list(mean.parameters()), list(model.parameters()), 1 - decay)


class TokenTable:
    """Token ids of all training texts for several tokenizers, int64 [n, length] each, and those of the empty text."""

    def __init__(self, tokenizers: Sequence[Any], texts: Sequence[str]) -> None:
        unique = {text: i for i, text in enumerate(dict.fromkeys(["", *texts]))}
        tables = [t(list(unique), padding="max_length", return_tensors="pt").input_ids for t in tokenizers]
        rows = torch.tensor([unique[text] for text in texts])
        self.ids, self.empty = [table[rows] for table in tables], [table[0] for table in tables]

    def batch(self, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """The texts of `rows`, a share NO_CAPTION of them empty."""
        drop = torch.from_numpy(rng.random((len(rows), 1)) < NO_CAPTION)
        return tuple(torch.where(drop, e, ids[rows]) for ids, e in zip(self.ids, self.empty, strict=True))
