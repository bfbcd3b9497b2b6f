"""How much of a recipe's gradient is signal: agreement of the gradients of disjoint batches, at the base.

    python -m benchmarks.signal configs/shapes/nft.yaml configs/shapes/grpo.yaml rollout.prompts=48

Every rollout is split in two by prompts. With gradients g_1 .. g_n of the halves, the share of signal is the mean of
g_i . g_j over pairs divided by the mean of |g_i|^2: 1 if all batches agree, 0 if a batch has no information
about the next. The steps that an optimizer wastes on noise are proportional to its inverse.
"""

from __future__ import annotations

import argparse
from itertools import combinations

import torch
from torch import Tensor

from align.config.command_line import files_and_overrides
from align.config.load import load_config
from align.config.settings import Config
from align.data.media import from_bytes
from align.policy.build import build_generator, build_rewards, trainable
from align.policy.roles import Roles
from align.rollout.bench import Bench
from align.rollout.rollout import Scored
from align.rollout.sources import OnlineSource, Share


def share_of_signal(gradients: list[Tensor]) -> float:
    """Mean ``g_i . g_j`` over pairs, divided by mean ``|g_i|^2``, of gradients ``[D]`` of disjoint batches."""
    agreement = torch.stack([a @ b for a, b in combinations(gradients, 2)]).mean()
    return float(agreement / torch.stack([g @ g for g in gradients]).mean())


def half_gradients(config: Config, rollouts: int) -> dict[int, list[Tensor]]:
    """Slot of the loss's terms -> gradients ``[D]`` of the halves of every rollout, all at the base."""
    generator = build_generator(config.generator, config.memory, "cpu")
    parameters = trainable(config, generator)
    bench = Bench(generator, {"policy": Roles(parameters, ["behaviour", "reference", "anchor"])})
    reward = build_rewards({"reward": config.reward}, "cpu")["reward"]
    recipe = config.recipe
    source = OnlineSource(config, generator, Share(), recipe.needs, reward.wants)
    gradients: dict[int, list[Tensor]] = {}
    for step in range(rollouts):
        with torch.no_grad():
            drawn = source(step)
            rollout = drawn.become(
                Scored, scores=reward(from_bytes(drawn.media), drawn.prompts, drawn.group, drawn.inputs)
            )
            rollout = rollout.become(Scored, seen=recipe.look(torch.arange(len(rollout.seeds)), rollout, bench))
        terms = recipe.terms(rollout, recipe.credit(rollout.scores, rollout.group))
        for half in (0, 1):
            mine = rollout.group[terms.sample] % 2 == half
            for slot in terms.slot.unique().tolist():
                rows = (mine & (terms.slot == slot)).nonzero().flatten()
                loss = recipe.loss(terms[rows], rollout, bench).value.mean()
                parts = torch.autograd.grad(loss, [parameter for _, parameter in parameters])
                gradients.setdefault(slot, []).append(torch.cat([part.flatten() for part in parts]))
    return gradients


def main() -> None:
    """A row per config: all terms together, then slot by slot (times of the forward process, or sampling steps)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG|KEY=VALUE", help="configs, then overrides of all of them")
    parser.add_argument("--rollouts", type=int, default=3)
    options = parser.parse_args()
    configs, overrides = files_and_overrides(options.words[0], options.words[1:])
    for path in configs:
        by_slot = half_gradients(load_config(path, overrides), options.rollouts)
        together = [torch.stack(parts).sum(0) for parts in zip(*by_slot.values(), strict=True)]
        slots = " ".join(f"{share_of_signal(parts):+.3f}" for parts in by_slot.values())
        print(f"{path}  all {share_of_signal(together):+.3f}  by slot {slots}", flush=True)


if __name__ == "__main__":
    main()
