"""Training of a reward on a table of preferences, as in ``alignflow reward train``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.config.load import dump_config
from align.data.files import new_folder, without_nan, write_json, write_text
from align.data.inputs import pixels_of
from align.data.media import to_tensor
from align.data.prompts import PAIR
from align.maths.seeds import derive
from align.preference import agreement as bench
from align.preference.settings import RewardTrainConfig
from align.preference.table import Judged, numbered, read_judged
from align.runs.devices import require
from align.runs.lock import locked
from align.runs.owned import REWARD, check_out, mark
from alignflow.errors import DataError, RunFolderError
from rewards.training import folder as reward_folder
from rewards.training.heads import Head, Variational, joint
from rewards.training.scorer import Scorer, load_backbone, open_backbone, plain_state
from rewards.training.trust import gram

CHUNK = 64
"""Images through the backbone at once where no gradient is wanted."""


class Examples:
    """Rows with their features: read once where the backbone is frozen, else whenever they are asked for."""

    def __init__(self, scorer: Scorer, rows: Sequence[Judged], users: Sequence[str], *, frozen: bool) -> None:
        self.scorer, self.rows = scorer, rows
        self.sides = PAIR if PAIR[0] in rows[0].prompt.media else ("image",)
        device = scorer.clip.model.device
        self.text = scorer.clip.text_features([row.prompt.text for row in rows], CHUNK)
        across = len(self.sides) == 2 and any(row.rejected_text != row.prompt.text for row in rows)
        other = scorer.clip.text_features([row.rejected_text for row in rows], CHUNK) if across else self.text
        self.texts = [self.text, other][: len(self.sides)]
        self.outcome = torch.tensor([row.outcome for row in rows], device=device)
        self.user = torch.tensor(numbered(rows, users), device=device) if users else None
        self.kept: list[Tensor] | None = None
        if frozen:
            with torch.no_grad():
                parts = [self._read(list(range(i, min(i + CHUNK, len(rows))))) for i in range(0, len(rows), CHUNK)]
            self.kept = [torch.cat(side) for side in zip(*parts, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, pick: Tensor) -> list[Tensor]:
        """Features of the sides, ``[M, D]`` each: chosen and rejected, or the one image."""
        if self.kept is not None:
            return [side[pick] for side in self.kept]
        return self._read(pick.tolist())

    def _read(self, numbers: Sequence[int]) -> list[Tensor]:
        found = []
        for side in self.sides:
            pixels = []
            for number in numbers:
                media = to_tensor(pixels_of(self.rows[number].prompt, side))
                pixels.append(self.scorer.pixels(media))
            found.append(self.scorer.embed(pixels, CHUNK))
        return found


def train_reward(
    config: RewardTrainConfig, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train the reward of a config into its folder; returns what ``summary.json`` holds.

    Raises:
        DataError, RewardError: tables, images or weights that do not serve.
        RunFolderError: the folder is there already, or the loss is not finite.
    """
    check_out(config.run_dir, REWARD, overwrite=overwrite)
    with locked(config.run_dir):
        check_out(config.run_dir, REWARD, overwrite=overwrite)
        return _train(config, say)


def _train(config: RewardTrainConfig, say: Callable[[str], None]) -> dict[str, Any]:
    single = config.loss.single
    rows = [row for row in read_judged(config.data.train, single=single, limit=config.data.limit) if _used(config, row)]
    if not rows:
        raise DataError(f"{config.data.train} holds ties alone, which loss {config.loss.kind} leaves out")
    heldout = read_judged(config.data.heldout, single=single) if config.data.heldout else []
    users = sorted({row.user for row in rows}) if config.head.users else []
    if "" in users:
        raise DataError(f"{config.data.train}: head {config.head.kind} needs who judged, a column user in every row")
    clip = load_backbone(config.backbone, require(config.device, "device"))
    before = plain_state(clip) if config.backbone.tune != "none" else {}
    width = clip.model.config.projection_dim
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "head"))
        head = config.head.build(width, len(users)).to(config.device)
    scorer = Scorer(clip, head)
    opened = open_backbone(clip, config.backbone, derive(config.seed, "backbone"))
    train, test = (Examples(scorer, some, users, frozen=not opened) if some else None for some in (rows, heldout))
    assert train is not None
    first, started = _measured(config, scorer, test), time.perf_counter()
    metrics = fit(config, scorer, train, opened, say)
    summary = {
        "rows": len(rows),
        "heldout": len(heldout),
        "before": first,
        "after": _measured(config, scorer, test),
        "loss": metrics[-1]["loss"],
        "seconds": time.perf_counter() - started,
    }
    after = plain_state(clip) if opened else {}
    changed = {name: value for name, value in after.items() if not torch.equal(value, before[name])}
    manifest = reward_folder.Manifest(backbone=config.backbone, head=config.head, width=width, users=users)
    with new_folder(config.run_dir, replaces=True) as staging:
        mark(staging, REWARD)
        reward_folder.save(staging, manifest, head.state_dict(), changed, _gram(head, train))
        write_text(staging / "config.yaml", dump_config(config))
        write_text(staging / "metrics.jsonl", "".join(json.dumps(without_nan(row)) + "\n" for row in metrics))
        write_json(staging / "summary.json", summary)
    return summary


def _used(config: RewardTrainConfig, row: Judged) -> bool:
    return config.loss.single or config.loss.ties or row.outcome != 0


def fit(
    config: RewardTrainConfig,
    scorer: Scorer,
    examples: Examples,
    opened: Sequence[torch.nn.Parameter],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The loop; the head ends in ``eval`` and knows its users. Returns rows of metrics."""
    head, settings = scorer.head, config.fit
    groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr": settings.lr}]
    if opened:
        groups.append({"params": list(opened), "lr": settings.backbone_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    rng = np.random.default_rng(derive(config.seed, "rows"))
    metrics = []
    head.train()
    with torch.random.fork_rng():
        torch.manual_seed(derive(config.seed, "latents"))
        for step in range(1, settings.steps + 1):
            pick = torch.from_numpy(_batch(config, examples, rng)).to(examples.outcome.device)
            loss, right = _step_loss(config, scorer, examples, pick, min(1.0, 2 * step / settings.steps))
            if not bool(loss.isfinite()):
                raise RunFolderError(f"the loss is {loss.item()} at step {step}; nothing saved. Try a smaller fit.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            if step % settings.log_every == 0 or step in (1, settings.steps):
                metrics.append({"step": step, "loss": loss.item(), "right": right})
                say(f"step {step}/{settings.steps} loss {loss.item():.4f}")
    head.eval()
    if isinstance(head, Variational):
        _remember(head, examples)
    return metrics


def _batch(config: RewardTrainConfig, examples: Examples, rng: np.random.Generator) -> np.ndarray:
    """Rows of one step: drawn freely, or ``per_user`` of each of some users where a user is to be inferred."""
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
    sides, texts, outcome = examples.images(pick), [text[pick] for text in examples.texts], examples.outcome[pick]
    user = None if examples.user is None else examples.user[pick]
    if config.loss.single:
        output = scorer.head(sides[0], texts[0], user)
        return config.loss.loss(output, output, outcome).mean(), None
    penalty: Tensor | float = 0.0
    if user is not None:
        user, penalty = scorer.head.infer(joint(sides[0], texts[0]), joint(sides[1], texts[1]), user)
    first, second = (scorer.head(side, text, user) for side, text in zip(sides, texts, strict=True))
    loss = config.loss.loss(first, second, outcome) + getattr(config.head, "beta", 0.0) * warm * penalty
    known = outcome > 0
    right = (first[known, 0] > second[known, 0]).float().mean()
    return loss.mean(), right.item() if bool(known.any()) else None


@torch.no_grad()
def _remember(head: Variational, examples: Examples) -> None:
    assert examples.user is not None
    everything = torch.arange(len(examples), device=examples.user.device)
    parts = [examples.images(some) for some in everything.split(CHUNK)]
    images = [torch.cat(side) for side in zip(*parts, strict=True)]
    chosen, rejected = (joint(*both) for both in zip(images, examples.texts, strict=True))
    head.remember(chosen, rejected, examples.user)


@torch.no_grad()
def _gram(head: Head, examples: Examples) -> Tensor:
    """Sum of ``z z^T`` over the features of all training images."""
    parts = []
    for pick in torch.arange(len(examples), device=examples.outcome.device).split(CHUNK):
        text = examples.text[pick]
        parts += [gram(head.features(side, text)) for side in examples.images(pick)]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def _measured(config: RewardTrainConfig, scorer: Scorer, examples: Examples | None) -> dict[str, Any] | None:
    """Of held-out rows: accuracy without ties with its interval, or the mean squared error and the correlation."""
    if examples is None:
        return None
    scorer.head.eval()
    outputs: list[list[Tensor]] = []
    for pick in torch.arange(len(examples), device=examples.outcome.device).split(CHUNK):
        user = None if examples.user is None else examples.user[pick]
        both = zip(examples.images(pick), examples.texts, strict=True)
        outputs.append([scorer.head(side, text[pick], user)[:, 0] for side, text in both])
    sides = [torch.cat(side).double().cpu().numpy() for side in zip(*outputs, strict=True)]
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
    return bench.interval(right, prompts).model_dump()
