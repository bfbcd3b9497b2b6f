"""Simulated voting: the verifier votes on pairs of samples, and a reward and a Flow-DPO run learn from its votes.

    python -m benchmarks.votes --votes 200 --out runs/votes

Writes ``samples/`` (two samples per training prompt of the embedded world), ``votes.jsonl`` and ``heldout.jsonl`` as
``alignflow label`` writes them, trains a reward on the votes, optimises it with ``nft``, and trains ``flow_dpo`` on the
votes alone. Prints held-out gold before and after both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.config.load import load_config
from align.data.media import read_media
from align.data.prompts import read_prompts
from align.data.tables import Cell
from align.evaluation.evaluate import sample_to_folder
from align.labelling.votes import Choice, Votes, read_candidates
from align.preference.settings import load_reward_training
from align.preference.train import train_reward
from align.training.trainer import train
from rewards import parse

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "configs" / "shapes"


def vote(folder: Path, split: str, count: int, table: Path) -> dict[str, int]:
    """Vote on one pair of each of ``count`` prompts, as the verifier prefers; how often which side won."""
    import torch

    config = load_config(SHAPES / "nft.yaml")
    samples = folder / f"samples-{split}"
    if not samples.exists():
        prompts = read_prompts(f"shapes:{split}", count, seed=7)
        sample_to_folder(config, samples, prompts=prompts, count=2, seed=11)
    verifier, found = parse({"kind": "shapes"}).build(), {"left": 0, "right": 0, "tie": 0}
    with Votes(table, "verifier", print) as votes:
        for pair in read_candidates(samples):
            files = [side for side in pair.sides if not isinstance(side, Cell)]
            media = torch.stack([read_media(file) for file in files])
            left, right = verifier(media, [pair.prompt.text] * 2).values.tolist()
            choice: Choice = "tie" if left == right else "left" if left > right else "right"
            found[choice] += votes.add(pair, choice, 0.0)
    return found


def main() -> None:
    """Vote, train both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "votes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=48, help="of nft on the trained reward")
    parser.add_argument("--only", choices=("reward", "flow_dpo"))
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    tables = {split: out / f"votes-{split}.jsonl" for split in ("train", "heldout")}
    for split, table in tables.items():
        print(split, vote(out, split, options.votes, table), flush=True)
    fixed = [f"seed={options.seed}", f"evaluate.seed={options.seed}", "samples.count=0", "evaluate.every=0"]
    if options.only != "flow_dpo":
        data = [f"data.train={tables['train']}", f"data.heldout={tables['heldout']}", f"out={out / 'reward'}"]
        judged = train_reward(load_reward_training(ROOT / "configs" / "rewards" / "votes.yaml", data), overwrite=True)
        print("reward", json.dumps({when: judged[when] for when in ("before", "after")}), flush=True)
        reward = f"reward={{kind: trained, path: {out / 'reward'}}}"
        steps = f"train.steps={options.rollouts}"
        show(train(load_config(SHAPES / "nft.yaml", [*fixed, steps, reward, f"out={out / 'nft'}"]), overwrite=True))
    if options.only != "reward":
        pairs = [f"rollout={{kind: pairs, file: {tables['train']}, prompts: 64}}", f"out={out / 'flow_dpo'}"]
        show(train(load_config(SHAPES / "votes.yaml", [*fixed, *pairs]), overwrite=True))


def show(summary: dict[str, object]) -> None:
    """One line of a run's summary."""
    print(f"{summary['recipe']}: gold {summary['gold_before']:.3f} to {summary['gold_after']:.3f}", flush=True)


if __name__ == "__main__":
    main()
