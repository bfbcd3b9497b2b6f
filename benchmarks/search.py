"""Every search method at equal network calls on the embedded world: reward, gold, diversity, seconds.

    python -m benchmarks.search --prompts 64 --calls 80 320 1280 --seeds 0 1 2 --json out.json
    python -m benchmarks.search --world shapes-video --reward gold --calls 40 80 160 --json out.json

The reward that is raised is the world's CLIP (``--reward gold`` raises the verifier itself, by methods without
gradients); gold is the verifier at the best sample, dense and strict. Methods that need a latent reward take part if
``--latent`` names one. A backward pass costs no network call here, but its time counts in the seconds; ``overhead`` is
the time outside network, decoder, reward and backward passes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from align.config import registry
from align.data.prompts import Prompt, read_prompts
from align.maths.statistics import mean, standard_error
from align.policy.build import build_rewards, hush
from align.rollout.rollout import diversity
from align.search.driver import make, parse, spend
from align.search.task import LatentReward
from alignflow.errors import SearchError
from generators.base import Generator, Options
from generators.load import load
from rewards import parse as reward_settings
from rewards.base import Reward
from rewards.training.latent import load as load_latent

WORLDS = {
    "shapes": ("sd3", Options()),
    "shapes-video": ("wan", Options(size=(32, 32), frames=9, text_length=16)),
}


def measure(
    generator: Generator,
    rewards: dict[str, Reward],
    prompts: list[Prompt],
    method: dict[str, Any],
    calls: int,
    seed: int,
    batch: int,
    latent: LatentReward | None = None,
) -> dict[str, Any]:
    """One method at one budget: means with standard errors over prompts."""
    settings = parse(method, {"network_calls": calls})
    started, found, busy = time.perf_counter(), [], 0.0
    for first in range(0, len(prompts), batch):
        numbers = list(range(first, min(first + batch, len(prompts))))
        task = make(
            generator, rewards["raised"], [prompts[n] for n in numbers], numbers, settings, seed,
            chunk=256, decode_chunk=64, latent_reward=latent if settings.search.latent else None,
        )  # fmt: skip
        found += spend(settings.search, task)
        busy += sum(task.meter.busy.values())
    seconds = time.perf_counter() - started
    media = torch.stack([one.best.media for one in found if one.best])
    texts = [one.prompt for one in found if one.best]
    raised = torch.tensor([one.reward for one in found])
    golds, stricts = (rewards[name](media, texts).values for name in ("gold", "strict"))
    return {
        "method": method["kind"], "calls": calls, "seed": seed, "prompts": len(prompts),
        "reward": mean(raised), "reward_stderr": standard_error(raised),
        "gold": mean(golds), "gold_stderr": standard_error(golds), "strict": mean(stricts),
        "diversity": diversity(media, torch.zeros(len(media))),
        "samples": sum(len(one.rewards) for one in found) / len(found),
        "spent": sum(one.spent["network_calls"] for one in found) / len(found),
        "seconds": seconds / len(prompts), "overhead": 1 - busy / seconds,
    }  # fmt: skip


def main() -> None:
    """Print a row per method, budget and seed; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="shapes")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--calls", nargs="+", type=int, default=[80, 320, 1280])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--methods", nargs="+", default=list(registry.searches()), help="kinds, or JSON mappings")
    parser.add_argument("--reward", choices=("clip", "gold"), default="clip")
    parser.add_argument("--latent", help="folder of a latent reward")
    parser.add_argument("--batch", type=int, default=16, help="prompts searched together")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    hush()
    kind, choices = WORLDS[options.world]
    generator, latent = load(kind, options.world, options=choices), options.latent and load_latent(options.latent)
    verifier = options.world.replace("-", "_")
    named = {"clip": {"kind": "clip"}, "gold": {"kind": verifier}, "strict": {"kind": verifier, "score": "strict"}}
    rewards = build_rewards({name: reward_settings(one) for name, one in named.items()}, "cpu")
    rewards["raised"] = rewards[options.reward]
    rows: list[dict[str, Any]] = []
    plain = {"kind": "best_of_n", "n": 1}
    for seed in options.seeds:
        prompts = read_prompts(f"{options.world}:heldout", options.prompts, seed)
        for calls in options.calls:
            for text in ["plain", *options.methods]:
                method: dict[str, Any] = {"kind": text}
                if text == "plain" or text.startswith("{"):
                    method = plain if text == "plain" else json.loads(text)
                chosen = parse(method, {"decodes": 1}).search
                if (chosen.gradients and not rewards["raised"].differentiable) or (chosen.latent and latent is None):
                    continue
                try:
                    row = measure(generator, rewards, prompts, method, calls, seed, options.batch, latent)
                except SearchError as error:  # this budget does not pay for one sample
                    print(f"{text:14} seed {seed} calls {calls:5}  {error}", flush=True)
                    continue
                rows.append({**row, "method": text})
                shown = {name: f"{value:.3f}" for name, value in row.items() if isinstance(value, float)}
                assert all(map(math.isfinite, (row["reward"], row["gold"])))
                print(
                    f"{text:14} seed {seed} calls {calls:5} ",
                    "  ".join(f"{k} {v}" for k, v in shown.items()),
                    flush=True,
                )
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
