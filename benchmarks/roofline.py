"""Images a second of a config on 1 to 64 cards, from arithmetic alone; nothing is loaded or run.

    python -m benchmarks.roofline configs/flux-dev/nft.yaml memory=80gb --card h100

The network's products and attention are counted for one sample, then for sampling and for the updates of a rollout.
Assumed: a share of the card's peak (``--use``), a sum of all trained gradients over the slowest link once an update,
whole prompts divided over the cards, no time for decoding, rewards, text and evaluation.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from align.checking.architectures import on_meta, parts_of
from align.checking.estimate import block_layers
from align.checking.sizes import shapes_of
from align.checking.trained_sizes import trained_numbers
from align.config.command_line import files_and_overrides
from align.config.load import load_config
from align.config.settings import Config

CARDS = {"a100": (312e12, 300e9), "h100": (989e12, 450e9), "h200": (989e12, 450e9), "4090": (165e12, 16e9)}
"""Card -> dense bfloat16 operations a second, bytes a second to another card of the machine (data sheets)."""
NODE, BETWEEN = 8, 50e9
"""Cards of a machine, and bytes a second between machines (400 Gbit/s)."""


@dataclass(frozen=True)
class Work:
    """Operations of one sample of a rollout.

    Args:
        call: one forward pass of the network; in fp8 a product of layers counts half, as its peak is twice as high.
        sampling: all its sampling steps.
        updating: all passes of all its terms, and of the roles that they are compared with.
        numbers: trained numbers of the run.
    """

    call: float
    sampling: float
    updating: float
    numbers: int


def attention(network: Any, image: int, text: int) -> float:
    """Operations of all attention products of one pass: ``4 L^2 width`` a block, cross attention apart."""
    total = 0.0
    for block in block_layers(network, image, text):
        width = max(layer.in_features for layer, _ in block if layer.in_features <= layer.out_features)
        most = max(tokens for _, tokens in block)
        crossed = {tokens for _, tokens in block} == {image, text} and not hasattr(network, "context_embedder")
        length = image if crossed else max(most, image + text)
        total += 4 * width * length**2 + (4 * width * image * text if crossed else 0)
    beside = [module for name, module in network.named_modules() if name.endswith(".attn2")]
    if hasattr(network, "context_embedder"):  # a second attention of joint blocks, over the image alone (SD3.5)
        total += sum(4 * module.to_q.out_features * image**2 for module in beside)
    return total


def call(network: Any, image: int, text: int, faster: float = 1.0) -> float:
    """Operations of one forward pass for one sample of ``image`` and ``text`` tokens: products and attention.

    Args:
        faster: by what the products of layers are divided: 2 where they are in fp8, whose peak is twice as high.
    """
    layers = [pair for block in block_layers(network, image, text) for pair in block]
    products = sum(2 * tokens * layer.in_features * layer.out_features for layer, tokens in layers)
    return products / faster + attention(network, image, text)


def work(config: Config) -> Work:
    """Operations of one sample of a rollout of ``config``, of which all samples have as many."""
    parts = parts_of(config.generator.kind, config.generator.path)
    assert parts is not None
    shapes = shapes_of(config, parts)
    network = on_meta(parts["transformer"])
    image, text = shapes.image_tokens, shapes.text_tokens
    once = call(network, image, text)  # same for a backward pass
    forward = call(network, image, text, 2.0) if config.memory.compute == "fp8" else once
    sampler = config.rollout.sampler  # type: ignore[union-attr]
    guided = 1 if sampler.guidance == 1.0 else 2
    sampling = forward * sampler.steps * guided
    terms = config.recipe.terms_per_sample(config) * config.recipe.rows_per_term(config)
    backward = 1 + (config.policy.kind == "full")
    others = 1 + config.train.gradient_checkpointing + len(config.recipe.roles(config))
    updating = terms * (guided if config.recipe.needs else 1) * (once * backward + forward * others)
    return Work(forward, sampling, updating, trained_numbers(config, [network], []))


def images_per_second(config: Config, found: Work, card: str, cards: int, use: float) -> float:
    """Samples a second, trained on and all."""
    peak, link = CARDS[card]
    samples = config.rollout.prompts * config.rollout.group
    busiest = -(-config.rollout.prompts // cards) * config.rollout.group
    compute = busiest * (found.sampling + found.updating) / (peak * use)
    slowest = link if cards <= NODE else BETWEEN
    exchange = config.train.updates * (0 if cards == 1 else 2 * 4 * found.numbers / slowest)
    return samples / (compute + exchange)


def main() -> None:
    """Print one line per number of cards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="+", help="files and KEY=VALUE")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--use", type=float, default=0.4, help="share of the card's peak that is reached")
    options = parser.parse_args()
    config = load_config(*files_and_overrides(options.config[0], options.config[1:]))
    if config.memory.compute == "fp8" and options.card == "a100":
        parser.error("an a100 has no fp8: use --card h100, h200 or 4090, or memory.compute=dtype")
    found = work(config)
    tera = [value / 1e12 for value in (found.call, found.sampling, found.updating)]
    print("TFLOP of a sample: {:.2f} a call, {:.0f} to generate it, {:.0f} to learn from it".format(*tera))
    for cards in (1, 2, 4, 8, 16, 32, 64):
        rate = images_per_second(config, found, options.card, cards, options.use)
        print(f"{cards:3} x {options.card}: {rate:7.2f} samples a second, {rate / cards:.3f} a card")


if __name__ == "__main__":
    main()
