"""Two users of the embedded world who prefer opposite things: PPD learns both, Flow-DPO on the same pairs neither.

    python -m benchmarks.two_users OUT [--prompts 64] [--steps 40] [--recipes ppd flow_dpo]

Ann prefers the brightest of four samples of a prompt to the darkest, Bob the reverse. The base is sampled once, both
users' pairs are written to a table, and each recipe is trained on it. Held-out prompts are then sampled for each of
them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from align.config.load import load_config
from align.data.media import write_media
from align.data.prompts import read_prompts
from align.evaluation.evaluate import evaluate_run, sample_media
from align.maths.seeds import derive
from align.policy.build import build_generator
from align.preference.user_embeddings import embed_users, save_embeddings
from align.training.trainer import train

SAMPLES, SHOTS = 4, 4
USERS = ("ann", "bob")
REWARD = "benchmarks.two_users:brightness"


def brightness(media: Tensor, prompts: list[str]) -> Tensor:
    """Mean of all pixels: Ann's preference, and the opposite of Bob's."""
    return media.mean(dim=(1, 2, 3))


def write_pairs(folder: Path, count: int) -> Path:
    """Table of both users' pairs of the base's samples."""
    table = folder / "pairs.jsonl"
    if table.exists():
        return table
    config = load_config("configs/shapes/base.yaml", ["recipe=nft"])
    generator = build_generator(config.generator, config.memory, "cpu")
    prompts, rows = read_prompts("shapes:train", count), []
    for number, prompt in enumerate(prompts):
        seeds = [derive(7, "pair", number, index) for index in range(SAMPLES)]
        media = sample_media(generator, [prompt] * SAMPLES, seeds, config.evaluate.sampler, SAMPLES)
        order = brightness(media, []).argsort()
        files = {}
        for name, index in (("dark", order[0]), ("bright", order[-1])):
            files[name] = f"{number:04d}-{name}.png"
            write_media(folder / files[name], media[index])
        for user, (won, lost) in zip(USERS, (("bright", "dark"), ("dark", "bright")), strict=True):
            rows.append({"prompt": prompt.text, "chosen": files[won], "rejected": files[lost], "user": user})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_embeddings(folder / "users.safetensors", embed_users(str(table), SHOTS, "shapes", None, "cpu"))
    return table


def overrides(folder: Path, recipe: str, table: Path, steps: int, lr: str) -> list[str]:
    """Settings of a run on the table."""
    users = f"policy={{kind: users, embeddings: {folder / 'users.safetensors'}}}"
    return [
        f"recipe={{kind: {recipe}, timesteps: 4, t_range: [0.4, 1.0], beta: 200}}",
        users if recipe == "ppd" else "policy.rank=16",
        f"rollout={{kind: pairs, file: {table}, prompts: 32}}", "reward=null", f"train.steps={steps}", f"train.lr={lr}",
        "train.schedule=cosine", f"evaluate.rewards={{gold: {{kind: '{REWARD}'}}, strict: null, clip: null}}",
        "evaluate.prompts=64", "evaluate.every=0", "samples.count=0", "checkpoint.every=0", f"out={folder / recipe}",
    ]  # fmt: skip


def for_each(run: Path, recipe: str) -> dict[str, float]:
    """Mean brightness of held-out samples for each user, for a mixture of both, and without a user."""
    found = {}
    for who in (*USERS, "{ann: 0.5, bob: 0.5}", "null"):
        config = load_config(run / "config.yaml", [f"policy.user={who}"] if recipe == "ppd" else [])
        result = evaluate_run(config, run)
        found[who] = result["scores"]["gold"]
        if recipe != "ppd":
            break
    return found


def main() -> None:
    """Run what the arguments say and print a line of JSON for each recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", default="2e-3")
    parser.add_argument("--recipes", nargs="+", default=["ppd", "flow_dpo"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = write_pairs(given.out.resolve(), given.prompts)
    for recipe in given.recipes:
        settings = overrides(given.out.resolve(), recipe, table, given.steps, given.lr)
        train(load_config("configs/shapes/base.yaml", settings), overwrite=True)
        lines = (given.out / recipe / "metrics.jsonl").read_text().splitlines()
        rows: list[dict[str, Any]] = [row for row in map(json.loads, lines) if row["event"] == "train"]
        losses = [row["loss"] for row in rows]
        said = {"recipe": recipe, "first": losses[0], "last": sum(losses[-5:]) / len(losses[-5:])}
        print(json.dumps(said | {"brightness": for_each(given.out / recipe, recipe)}), flush=True)


if __name__ == "__main__":
    main()
