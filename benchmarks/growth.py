"""How the cost of the loop's own work grows with prompts, samples and groups.

    python -m benchmarks.growth
    python -m benchmarks.growth --largest 1e5 --json growth.json

Everything that a step does on the CPU beside the networks is run at sizes that double. The exponent is the slope of log
CPU seconds over log size for the larger half of the sizes: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.data.choice import Shares, _order, mixed_at
from align.maths import pairs, weights
from align.maths.advantages import group_advantage, zero_variance
from align.maths.filters import uninformative
from align.maths.seeds import derive
from align.rollout.rollout import spreads
from generators.noise import seeded_noise

Work = Callable[[], Any]
GROUP = 8


def chosen(size: int) -> Work:
    """Prompts of 20 steps out of ``size``, in the middle of a pass and over its end."""
    shares = Shares([[(0, 1.0)]], 64)
    first = max(size // 64 - 10, 0)

    def work() -> None:
        _order.cache_clear()  # the shuffle of a pass counts
        for step in range(first, first + 20):
            mixed_at(step, shares, [size], seed=size)

    return work


def scored(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and groups of ``size`` samples, eight a prompt."""
    rewards = torch.rand(size, generator=torch.Generator().manual_seed(size))
    return rewards, torch.arange(size) // GROUP


def of_samples(function: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[int], Work]:
    """Work on the rewards and groups of a number of samples."""

    def work(size: int) -> Work:
        rewards, group = scored(size)
        return lambda: function(rewards, group)

    return work


def spread(size: int) -> Work:
    """Diversity of ``size`` samples of 16 x 16 pixels."""
    media, group = torch.zeros(size, 3, 16, 16, dtype=torch.uint8), torch.arange(size) // GROUP
    return lambda: spreads(media, group)


PARTS: dict[str, Callable[[int], Work]] = {
    "choice of prompts": chosen,
    "seeds of samples": lambda size: lambda: [derive(0, "rollout", 3, i) for i in range(size)],
    "noise of samples": lambda size: lambda: seeded_noise(range(size), (4, 8, 8)),
    "advantages": of_samples(group_advantage),
    "groups without differences": of_samples(zero_variance),
    "group filter": of_samples(lambda rewards, group: uninformative(rewards, group, 0.9, 0.01)),
    "weights of regression": of_samples(lambda rewards, group: weights.softmax_weight(rewards, group, 0.5)),
    "best and worst": of_samples(pairs.best_worst),
    "all pairs": of_samples(pairs.all_pairs),
    "diversity": spread,
}
"""Part of a step -> its work at a size: prompts for the first, samples for the others."""


def seconds(work: Work, repeats: int = 3) -> float:
    """Least CPU seconds of several runs."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return max(min(found), 1e-6)


def exponent(sizes: list[int], cost: list[float]) -> float:
    """Slope of log cost over log size for the larger half."""
    half = len(sizes) // 2
    slope, _ = np.polyfit(np.log(sizes[half:]), np.log(cost[half:]), 1)
    return float(slope)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=float, default=32768, help="samples; prompts go to 32 times as many")
    parser.add_argument("--json", type=Path, help="write sizes and seconds here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = 6
    rows: dict[str, dict[str, Any]] = {}
    print("| part | largest size | CPU seconds | exponent |\n|---|---|---|---|")
    for name, work in PARTS.items():
        largest = int(options.largest) * (32 if work is chosen else 1)
        sizes = [largest // 2**power for power in reversed(range(count))]
        cost = [seconds(work(size)) for size in sizes]
        rows[name] = {"sizes": sizes, "seconds": cost, "exponent": exponent(sizes, cost)}
        print(f"| {name} | {largest:,} | {cost[-1]:.3g} | {rows[name]['exponent']:.2f} |", flush=True)
    assert all(math.isfinite(row["exponent"]) for row in rows.values())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
