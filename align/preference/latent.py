"""Training of a latent reward on a generator's scored samples, as in ``alignflow reward train``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config.load import dump_config
from align.data.files import new_folder, write_json, write_text
from align.data.inputs import check_needs, encode, take
from align.data.prompts import Prompt, read_prompts
from align.maths.losses import x_at
from align.maths.seeds import derive
from align.policy.build import build_generator, build_rewards
from align.preference import agreement as bench
from align.preference.settings import LatentTrainConfig
from align.rollout.rollout import decode, draw
from align.runs import devices
from align.runs.lock import locked
from align.runs.owned import LATENT, check_out, mark
from alignflow.errors import DataError, RunFolderError
from generators.base import Generator
from rewards.base import Reward
from rewards.training import latent
from rewards.training.losses import bradley_terry, regression
from rewards.training.scorer import load_backbone

TIMES = (0.2, 0.4, 0.6, 0.8)
"""Times at which the ranking of held-out samples is measured."""


class Drawn:
    """Samples of B prompts, G each: latents ``x0 [B, G, ...]``, scores ``[B, G]`` (NaN = none), texts B."""

    def __init__(self, x0: Tensor, score: Tensor, texts: Sequence[str]) -> None:
        self.x0, self.score, self.texts = x0, score, list(texts)


def train_latent(
    config: LatentTrainConfig, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Draw, score, train, measure; writes the folder and returns what ``summary.json`` holds.

    Raises:
        AlignflowError: the message names the problem and the remedy.
    """
    check_out(config.run_dir, LATENT, overwrite=overwrite)
    with locked(config.run_dir):
        check_out(config.run_dir, LATENT, overwrite=overwrite)
        return _train(config, say)


def _train(config: LatentTrainConfig, say: Callable[[str], None]) -> dict[str, Any]:
    device, started = devices.chosen(config.generator.device), time.perf_counter()
    prompts = read_prompts(config.prompts.train, config.prompts.limit, config.seed)
    heldout = (
        read_prompts(config.prompts.heldout, config.prompts.measured, config.seed) if config.prompts.heldout else []
    )
    reward = build_rewards({"reward": config.reward}, device, config.memory)["reward"]
    generator = build_generator(config.generator, config.memory, device, kinds=[config.sampler.kind])
    check_needs([*prompts, *heldout], generator, {"reward": reward})
    train, test = (_drawn(config, generator, reward, some, which) if some else None
                   for some, which in ((prompts, "train"), (heldout, "heldout")))  # fmt: skip
    assert train is not None
    say(f"{train.score.numel()} samples generated and scored in {time.perf_counter() - started:.0f} s")
    known = train.score[train.score.isfinite()]
    if len(known) < 2 or float(known.std()) == 0:
        raise DataError(f"{len(known)} scores, {'all equal' if len(known) > 1 else 'too few'}: nothing to train on")
    clip = load_backbone(config.text, device)
    manifest = latent.Manifest(
        text=config.text, generator=f"{config.generator.kind} {config.generator.path}", channels=train.x0.shape[2],
        text_width=clip.model.config.projection_dim, width=config.width, blocks=config.blocks,
        motion=train.x0.ndim == 6 and train.x0.shape[3] > 1,
        mean=float(known.mean()), std=float(known.std()),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "net"))
        found = latent.LatentReward(manifest, manifest.build().to(device), clip)
    before = ranking(found, test, config.seed)
    loss = fit_latent(config, found, train, say)
    summary = {
        "samples": train.score.numel(),
        "before": before,
        "after": ranking(found, test, config.seed),
        "loss": loss,
        "seconds": time.perf_counter() - started,
    }
    with new_folder(config.run_dir, replaces=True) as staging:
        mark(staging, LATENT)
        latent.save(staging, found)
        write_text(staging / "config.yaml", dump_config(config))
        write_json(staging / "summary.json", summary)
    return summary


@torch.no_grad()
def _drawn(
    config: LatentTrainConfig, generator: Generator, reward: Reward, prompts: Sequence[Prompt], which: str
) -> Drawn:
    """``config.samples`` samples of every prompt with their scores, a chunk of prompts at a time."""
    latents, scores, count = [], [], config.samples
    step = max(1, config.chunk // count)
    for first in range(0, len(prompts), step):
        some = list(prompts[first : first + step])
        cond, inputs = encode(generator, some, reward.wants)
        row = torch.arange(len(some)).repeat_interleave(count)
        seeds = [derive(config.seed, which, first + int(b), k) for k, b in enumerate(row.tolist())]
        x0, _ = draw(generator, cond, seeds, config.sampler, row=row, steps=(), chunk=config.chunk)
        media = decode(generator, x0, 16)
        found = reward(media, [some[b].text for b in row.tolist()], row, take(inputs, row))
        latents.append(x0.float().cpu().unflatten(0, (len(some), count)))
        scores.append(found.values.detach().cpu().unflatten(0, (len(some), count)))
    return Drawn(torch.cat(latents), torch.cat(scores), [prompt.text for prompt in prompts])


def fit_latent(
    config: LatentTrainConfig, reward: latent.LatentReward, data: Drawn, say: Callable[[str], None]
) -> float:
    """The loop: squared error of standardised scores, and Bradley-Terry between samples of one prompt at one time."""
    net, manifest, settings = reward.net.train(), reward.manifest, config.fit
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    text = reward.text(data.texts).to(device)
    generator = torch.Generator().manual_seed(derive(config.seed, "noise"))
    prompts, count = data.score.shape
    loss = torch.zeros(())
    for step in range(1, settings.steps + 1):
        pick = torch.randperm(prompts, generator=generator)[: max(1, settings.batch // count)]
        t = torch.rand(len(pick), generator=generator).repeat_interleave(count)
        x0, score = data.x0[pick].flatten(0, 1), data.score[pick].flatten()
        eps = torch.randn(x0.shape, generator=generator)
        value = net(x_at(x0, eps, t).to(device), t.to(device), text[pick].repeat_interleave(count, 0))
        target = ((score - manifest.mean) / manifest.std).to(device)
        known = target.isfinite()
        if not bool(known.any()):
            continue
        loss = regression(value[known], target[known]).mean()
        grid, truth = value.unflatten(0, (-1, count)), target.unflatten(0, (-1, count))
        better = truth[:, :, None] > truth[:, None, :]  # a missing score is neither better nor worse
        if bool(better.any()):
            gaps = (grid[:, :, None] - grid[:, None, :])[better]
            loss = loss + config.ranking * bradley_terry(gaps, torch.zeros_like(gaps)).mean()
        if not bool(loss.isfinite()):
            raise RunFolderError(f"the loss is {loss.item()} at step {step}; nothing saved. Try a smaller fit.lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % settings.log_every == 0 or step == settings.steps:
            say(f"step {step}/{settings.steps} loss {loss.item():.4f}")
    net.requires_grad_(False).eval()
    return loss.item()


@torch.no_grad()
def ranking(reward: latent.LatentReward, data: Drawn | None, seed: int) -> dict[str, Any] | None:
    """At each time: how often two samples of one prompt, noised, are ranked as their scores, with its interval."""
    if data is None:
        return None
    reward.net.eval()
    prompts, count = data.score.shape
    generator, found = torch.Generator().manual_seed(derive(seed, "measure")), {}
    i, j = torch.triu_indices(count, count, 1)
    for t in TIMES:
        values = []
        for b in range(prompts):
            eps = torch.randn(data.x0[b].shape, generator=generator)
            times = torch.full((count,), t)
            values.append(reward(x_at(data.x0[b], eps, times), times, [data.texts[b]] * count))
        gap = torch.stack(values)[:, i] - torch.stack(values)[:, j]
        truth = data.score[:, i] - data.score[:, j]
        label = truth.sign().nan_to_num(0).flatten().numpy()  # without both scores there is nothing to rank
        right = bench.right_without_ties(gap.flatten().double().numpy(), label)
        found[str(t)] = bench.interval(right, np.repeat(np.arange(prompts), len(i)), seed=0).model_dump()
    return found
