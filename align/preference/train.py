"""Training of a reward on a table of preferences, as in ``alignflow reward train``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config.load import dump_config
from align.data.files import new_folder, without_nan, write_json, write_text
from align.data.pair_table import Judged, read_judged
from align.maths.seeds import derive
from align.preference import agreement as bench
from align.preference.checkpoint import FOLDER, Checkpoint, Learned
from align.preference.examples import CHUNK, Examples
from align.preference.settings import RewardTrainConfig
from align.runs.devices import require
from align.runs.identity import data_digest
from align.runs.lock import locked
from align.runs.owned import REWARD, check_out, mark
from align.runs.stopping import GracefulStop
from alignflow.errors import DataError, RunFolderError
from rewards.training import folder as reward_folder
from rewards.training.folder import new_scorer
from rewards.training.heads import Head, Variational, build_head
from rewards.training.scorer import Scorer
from rewards.training.trust import gram


def train_reward(
    config: RewardTrainConfig, *, resume: bool = False, overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Train the reward of a config into its folder; returns what ``summary.json`` holds.

    Args:
        resume: continue from the checkpoint of an interrupted training.

    Raises:
        DataError, RewardError: tables, images or weights that do not serve.
        RunFolderError: the folder is there already, or the loss is not finite.
        KeyboardInterrupt: after a step and its checkpoint, when the user stopped it.
    """
    if resume and overwrite:
        raise RunFolderError("--resume continues a training run and --overwrite deletes it: give one of the two")
    _check_out(config.run_dir, resume, overwrite)
    with locked(config.run_dir):
        _check_out(config.run_dir, resume, overwrite)
        return _train(config, resume, say)


def _check_out(folder: Path, resume: bool, overwrite: bool) -> None:
    begun = (folder / FOLDER).is_dir()
    if resume and not begun and (folder / "reward.json").is_file():
        raise RunFolderError(f"{folder} holds a finished reward; --overwrite trains it again")
    check_out(folder, REWARD, overwrite=overwrite or (resume and begun))


def _train(config: RewardTrainConfig, resume: bool, say: Callable[[str], None]) -> dict[str, Any]:
    single = config.loss.single
    rows = [row for row in read_judged(config.data.train, single=single, limit=config.data.limit) if _used(config, row)]
    if not rows:
        raise DataError(f"{config.data.train} holds only ties, which loss {config.loss.kind} leaves out")
    heldout = read_judged(config.data.heldout, single=single) if config.data.heldout else []
    users = sorted({row.user for row in rows}) if config.head.users else []
    if "" in users:
        raise DataError(f"{config.data.train}: head {config.head.kind} needs who judged, a column user in every row")
    scorer = new_scorer(config.backbone, config.head, require(config.device, "device"))
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "head"))
        scorer.head = build_head(config.head, scorer.width, len(users), config.backbone.apart).to(config.device).eval()
    opened = scorer.open(config.backbone, derive(config.seed, "backbone"))
    labels = config.head.labels if config.loss.labelled else ()
    train = Examples(scorer, rows, users, frozen=not opened, labels=labels)
    test = Examples(scorer, heldout, users, frozen=not opened, labels=labels, needed=False) if heldout else None
    learned = _fresh(config, scorer, opened)
    checkpoint = Checkpoint(config.run_dir, config.model_dump(mode="json"), data_digest(row.prompt for row in rows))
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "latents"))
        if resume and checkpoint.resume(learned):
            say(f"continuing at step {learned.step}")
        else:
            checkpoint.forget()
            learned.before = _measured(config, scorer, test)
        started = time.perf_counter()
        fit(config, scorer, train, learned, checkpoint, say)
    summary = {
        "rows": len(rows), "heldout": len(heldout), "before": learned.before,
        "after": _measured(config, scorer, test), "loss": learned.metrics[-1]["loss"],
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    manifest = reward_folder.Manifest(backbone=config.backbone, head=config.head, width=scorer.width, users=users)
    with new_folder(config.run_dir, replaces=True) as staging:
        mark(staging, REWARD)
        head = scorer.head
        reward_folder.save(staging, manifest, head.state_dict(), scorer.changed(), _gram(head, train))
        write_text(staging / "config.yaml", dump_config(config))
        write_text(staging / "metrics.jsonl", "".join(json.dumps(without_nan(row)) + "\n" for row in learned.metrics))
        write_json(staging / "summary.json", summary)
    return summary


def _fresh(config: RewardTrainConfig, scorer: Scorer, opened: Sequence[torch.nn.Parameter]) -> Learned:
    """The trained modules at their start."""
    settings = config.fit
    groups: list[dict[str, Any]] = [{"params": list(scorer.head.parameters()), "lr": settings.lr}]
    if opened:
        groups.append({"params": list(opened), "lr": settings.backbone_lr})
    weights = {**scorer.head.state_dict(), **{f"backbone.{number}": value for number, value in enumerate(opened)}}
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    return Learned(weights, optimizer, np.random.default_rng(derive(config.seed, "rows")))


def _used(config: RewardTrainConfig, row: Judged) -> bool:
    return config.loss.single or config.loss.ties or row.outcome != 0


def fit(
    config: RewardTrainConfig,
    scorer: Scorer,
    examples: Examples,
    learned: Learned,
    checkpoint: Checkpoint,
    say: Callable[[str], None],
) -> None:
    """The loop; the head ends in ``eval`` and has its users."""
    head, settings, optimizer = scorer.head, config.fit, learned.optimizer
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    head.train()
    with GracefulStop(say) as stop:
        while learned.step < settings.steps:
            step = learned.step + 1
            pick = torch.from_numpy(_batch(config, examples, learned.rng)).to(examples.outcome.device)
            loss, right = _step_loss(config, scorer, examples, pick, min(1.0, 2 * step / settings.steps))
            if not bool(loss.isfinite()):
                raise RunFolderError(f"the loss is {loss.item()} at step {step}; nothing saved. Try a smaller fit.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            learned.step = step
            if step % settings.log_every == 0 or step in (1, settings.steps):
                learned.metrics.append({"step": step, "loss": loss.item(), "right": right})
                say(f"step {step}/{settings.steps} loss {loss.item():.4f}")
            if step < settings.steps and (stop.asked or step % settings.checkpoint == 0):
                checkpoint.save(learned)
                if stop.asked:
                    raise KeyboardInterrupt
    head.eval()
    if isinstance(head, Variational):
        _remember(head, examples)


def _batch(config: RewardTrainConfig, examples: Examples, rng: np.random.Generator) -> np.ndarray:
    """Random rows of one step, or ``per_user`` rows of each of some users if users are inferred."""
    per_user = getattr(config.head, "per_user", None)
    count = min(config.fit.batch, len(examples))
    if per_user is None or examples.user is None:
        return rng.choice(len(examples), count, replace=False)
    user = examples.user.cpu().numpy()
    drawn: list[np.ndarray] = []
    for number in rng.permutation(np.unique(user)):
        mine = np.flatnonzero(user == number)
        drawn.append(rng.choice(mine, min(per_user, len(mine)), replace=False))
        if sum(map(len, drawn)) >= count:
            break
    return np.concatenate(drawn)


def _step_loss(
    config: RewardTrainConfig, scorer: Scorer, examples: Examples, pick: Tensor, warm: float
) -> tuple[Tensor, float | None]:
    """Mean loss of some rows, and the share of pairs ranked right; ``warm`` is the share of the penalty's weight."""
    sides, outcome, head = examples.features(pick), examples.outcome[pick], scorer.head
    user = None if examples.user is None else examples.user[pick]
    if config.loss.single:
        output = head(*sides[0], user)
        return config.loss.loss(output, output, outcome).mean(), None
    penalty: Tensor | float = 0.0
    if user is not None:
        user, penalty = head.infer(head.join(*sides[0]), head.join(*sides[1]), user)
    first, second = (head(*side, user) for side in sides)
    loss = config.loss.pair_loss(first, second, outcome, examples.labels_at(pick), config.head)
    loss = loss + getattr(config.head, "beta", 0.0) * warm * penalty
    known = outcome > 0
    right = (first[known, 0] > second[known, 0]).float().mean()
    return loss.mean(), right.item() if bool(known.any()) else None


@torch.no_grad()
def _remember(head: Variational, examples: Examples) -> None:
    assert examples.user is not None
    everything = torch.arange(len(examples), device=examples.user.device)
    parts = [[head.join(*side) for side in examples.features(some)] for some in everything.split(CHUNK)]
    chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
    head.remember(chosen, rejected, examples.user)


@torch.no_grad()
def _gram(head: Head, examples: Examples) -> Tensor:
    """Sum of ``z z^T`` over the features of all training images."""
    parts = []
    for pick in torch.arange(len(examples), device=examples.outcome.device).split(CHUNK):
        parts += [gram(head.features(*side)) for side in examples.features(pick)]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def _measured(config: RewardTrainConfig, scorer: Scorer, examples: Examples | None) -> dict[str, Any] | None:
    """Held-out results: accuracy without ties with its interval, or the mean squared error and the correlation."""
    if examples is None:
        return None
    scorer.head.eval()
    outputs: list[list[Tensor]] = []
    for pick in torch.arange(len(examples), device=examples.outcome.device).split(CHUNK):
        user = None if examples.user is None else examples.user[pick]
        outputs.append([scorer.head(*side, user) for side in examples.features(pick)])
    sides = [torch.cat(side)[:, 0].double().cpu().numpy() for side in zip(*outputs, strict=True)]
    outcome = examples.outcome.cpu().numpy()
    if config.loss.single:
        spread = float(np.std(sides[0]) * np.std(outcome))
        covariance = float(np.mean((sides[0] - sides[0].mean()) * (outcome - outcome.mean())))
        return {
            "mean_squared_error": float(np.mean((sides[0] - outcome) ** 2)),
            "correlation": covariance / spread if spread > 0 else None,
        }
    prompts = np.unique([row.prompt.text for row in examples.rows], return_inverse=True)[1]
    right = bench.right_without_ties(sides[0] - sides[1], outcome)
    return {**bench.interval(right, prompts).model_dump(), **_orders(config, examples, outputs)}


def _orders(config: RewardTrainConfig, examples: Examples, outputs: Sequence[Sequence[Tensor]]) -> dict[str, float]:
    """For every part with labels, the share of held-out pairs with different labels that it orders correctly."""
    if not examples.labels:
        return {}
    count = len(config.head.parts)
    first, second = (torch.cat(side)[:, 1 : 1 + count] for side in zip(*outputs, strict=True))
    gap = examples.labels[0] - examples.labels[1]
    right = (first - second).sign() == gap.sign()
    known = gap.isfinite() & (gap != 0)
    shares = {f"order/{name}": right[known[:, i], i].float().mean().item() for i, name in enumerate(config.head.parts)}
    return {name: share for name, share in shares.items() if share == share}
