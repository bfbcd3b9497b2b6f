"""Estimate of GPU memory from the config alone; no weights are loaded.

Weights, adapters, optimizer states and the tensors of a rollout are counted. Activations, and the peaks of a forward
pass and of decoding, are the widths of the linear layers of the network's blocks times measured factors
(:data:`SAVED`, measured on small networks of the real classes: ``tests/test_estimate.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.checking.architectures import Part, arguments, count, on_meta, parts_of, stored_buffers
from align.checking.context_check import part_of_tokens
from align.checking.reward_sizes import reward_bytes
from align.checking.sizes import Shapes, shapes_of, terms_per_sample
from align.checking.trained_sizes import experts_size, linears, trained_numbers
from align.config.memory import placed
from align.config.needs import followed
from align.policy import held
from alignflow.errors import ConfigError, Problem
from alignflow.lazy import lazy

if TYPE_CHECKING:
    from torch import nn

    from align.config.settings import Config
    from generators.load import adapter
else:
    adapter = lazy("generators.load:adapter")

GB = 2**30
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "bf16": 2, "fp16": 2}
STORED = {"none": None, "nf4": 0.53, "int8": 1.0, "fp8": 1.0}
"""Bytes per frozen weight of a linear layer; nf4 with its doubly quantised scales."""

SAVED = {"full": 1.66, "lora": 1.35, "lora, autocast": 1.12}
"""Numbers saved for backward, per token and per input and output feature of a block's linear layers."""

FORWARD = 0.8
"""The same for the numbers that exist at once in a block's pass without gradient."""

DECODED = {"image": 3.0, "frame": 9.2, "video": 27.5}
"""Feature maps of full resolution and the last stage's width that exist at once while a VAE decodes: for an image VAE,
for a video VAE on one frame, and for a video VAE on any video, which it decodes a few frames at a time."""

GRAPH = {"image": 22.7, "frame": 41.5, "video": 30.0}
"""The same for the graph of a VAE that decodes with gradient; for a video, per frame."""

CONTEXT, FRAGMENTS = 0.8 * GB, 1.1
"""Memory of CUDA itself, and the factor for memory lost to fragmentation."""


@dataclass(frozen=True)
class Item:
    """One line of an estimate: bytes and their derivation."""

    name: str
    bytes: float
    how: str = ""


@dataclass(frozen=True)
class Estimate:
    """Memory on one card.

    Args:
        kept: memory used all the time.
        phases: additional memory while sampling, decoding and updating.
    """

    kept: tuple[Item, ...]
    phases: dict[str, tuple[Item, ...]]

    @property
    def peak(self) -> str:
        """The phase that uses most memory."""
        return max(self.phases, key=lambda name: _sum(self.phases[name]))

    @property
    def bytes(self) -> float:
        """Bytes that a card must have: everything kept, the largest phase, CUDA and fragmentation."""
        return (_sum(self.kept) + _sum(self.phases[self.peak])) * FRAGMENTS + CONTEXT


def _sum(items: tuple[Item, ...]) -> float:
    return sum(item.bytes for item in items)


def estimate(config: Config) -> Estimate:
    """Memory of a run on each card.

    Raises:
        ConfigError: the model is neither on this machine nor in ``align.checking.architectures.KNOWN``.
    """
    path = config.generator.path
    parts = parts_of(config.generator.kind, path)
    if parts is None or "transformer" not in parts:
        raise ConfigError(f"generator.path: {path} is not on this machine and its networks are unknown; download it")
    shapes = shapes_of(config, parts)
    networks = [on_meta(parts[name]) for name in ("transformer", "transformer_2") if name in parts]
    encoders = _encoders(config, parts)
    trained = trained_numbers(config, networks, encoders)
    kept = (*_weights(config, parts), *_learning(config, trained, shapes), *_rewards(config))
    return Estimate(kept, _phases(config, networks[0], parts, shapes, encoders))


# -- kept all the time ------------------------------------------------------------------------------------------------


def _weights(config: Config, parts: dict[str, Part]) -> list[Item]:
    memory, dtype, items = config.memory, config.generator.dtype, []
    size = SIZES[dtype]
    for name, part in parts.items():
        number, tables = count(part), stored_buffers(part)
        bytes_, how = float(number * size), f"{_count(number)} weights, {dtype}"
        if name.startswith("transformer") and memory.quantise != "none":
            layers = linears(on_meta(part)).values()
            linear = sum(layer.weight.numel() for layer in layers)
            bytes_ = linear * (STORED[memory.quantise] or size) + (number - linear) * size
            how = f"{_count(number)} weights, {_count(linear)} of them {memory.quantise}"
            if memory.quantise == "fp8":
                bytes_ += 4 * sum(layer.out_features for layer in layers)
                how += " with a scale a row" + (", products in fp8" if memory.compute == "fp8" else "")
        if name.startswith("transformer") and memory.swap_blocks:
            bytes_ = float(swapped(on_meta(part), memory.swap_blocks) * size)
            how = f"{_count(number)} weights, {dtype}, {memory.swap_blocks} blocks swapped, two of them on the card"
        if name.startswith("text_encoder") and memory.cache_prompts != "none":
            bytes_, how = 0.0, "dropped once every prompt is encoded"
        elif name.startswith("text_encoder") and memory.offload != "none":
            bytes_, how = 0.0, f"stored on the CPU ({memory.offload})"
        elif tables:
            bytes_, how = bytes_ + tables * size, f"{how}, and {_count(tables)} numbers of stored tables"
        items.append(Item(name, bytes_, f"{part.name}: {how}"))
    return items


def swapped(network: nn.Module, count: int) -> int:
    """Weights on the card at once while ``count`` blocks are swapped: all others and the two largest of them.

    Raises:
        ConfigError: the network has fewer blocks.
    """
    from generators.swap import blocks, spread

    sizes = [sum(value.numel() for value in block.parameters()) for block in blocks(network)]
    if count > len(sizes):
        known = f"{type(network).__name__} has {len(sizes)} blocks"
        raise ConfigError([Problem("memory.swap_blocks", f"{known}; use a smaller number")])
    away = [sizes[number] for number in spread(len(sizes), count)]
    here = sum(sorted(away, reverse=True)[:2])
    return sum(value.numel() for value in network.parameters()) - sum(away) + here


def _encoders(config: Config, parts: dict[str, Part]) -> list[nn.Module]:
    """The text encoders that are trained."""
    trains = config.recipe.learners()["policy"].trains
    names = adapter(config.generator.kind).text_loras if "text" in trains else ()
    return [on_meta(parts[name]) for name in names if name in parts]


def _learning(config: Config, trained: int, shapes: Shapes) -> list[Item]:
    apart, optimizer = config.policy.kind != "full", config.train.optimizer
    size = 4 if apart else SIZES[config.generator.dtype]
    each = 1 if optimizer.endswith("8bit") else size
    paged = optimizer.startswith("paged")
    copies, held_too = held.copies(config), config.recipe.learners()
    learners = [name for name, learns in held_too.items() if learns.updates != 0]
    others = [name for name in held_too if name != "policy"]  # each a LoRA, counted at the policy's size
    roles = [*(["policy"] if apart else []), *copies, *others]
    on_card, kept = len(roles), ""
    if config.memory.roles == "cpu" and copies:
        on_card = len(roles) - len(copies) + 1
        kept = f"; {', '.join(copies)} on the CPU until one computes"
    what = {"lora": "LoRA", "gate": "gate", "users": "added attention"}.get(config.policy.kind, "")
    off = f"; the reference is the {what} switched off" if held.reference_is_base(config) else ""
    how = f"{_count(trained)} trained weights, {size} bytes each"
    state = "on the CPU when the card is full" if paged else f"two numbers of {each} bytes a weight"
    state += f", of {' and '.join(learners)}" if len(learners) > 1 else ""
    experts = [Item("experts", *experts_size(config.policy))] if config.policy.kind == "gate" else []
    return [
        *experts,
        Item("roles", trained * size * on_card, f"{', '.join(roles) or 'none'}: {how}{off}{kept}"),
        Item("optimizer", 0.0 if paged else 2.0 * trained * each * len(learners), f"{optimizer}: {state}"),
        Item("gradients", trained * size, f"{how}, one learner at a time" if len(learners) > 1 else how),
        Item("rollout", shapes.rollout_bytes, shapes.rollout_how),
    ]


def _rewards(config: Config) -> list[Item]:
    named, on_card = {"reward": config.reward, **config.evaluate.rewards}, followed(config)
    bytes_, how = reward_bytes([*placed(named, config.memory, on_card).values()])
    if config.memory.rewards == "cpu":
        how = f"{how}, as {config.recipe.kind} follows its gradient; others on the CPU" if how else "on the CPU"
    return [Item("rewards", bytes_, how)]


# -- phases -----------------------------------------------------------------------------------------------------------


def _phases(
    config: Config, network: nn.Module, parts: dict[str, Part], shapes: Shapes, encoders: list[nn.Module]
) -> dict[str, tuple[Item, ...]]:
    size = SIZES[config.train.precision] if config.train.precision != "no" else SIZES[config.generator.dtype]
    image, words = part_of_tokens(config, parts["transformer"].name, shapes)
    blocks = block_widths(network, image, words)
    factor = SAVED[_way(config)]
    one = max(blocks) * factor * size  # for one sample
    rows, text = shapes.sampled_rows, ""
    compiled = config.memory.compile == "blocks"  # as generators.compiled runs them
    how = f"{rows} samples at a time" + (", with what one compiled block saves for backward" if compiled else "")
    sampling = Item("forward pass", rows * (one if compiled else max(blocks) * size * FORWARD), how)
    decoding = Item("decoding", *_decoding(config, parts, shapes))
    rows = shapes.trained_rows
    if config.train.gradient_checkpointing:
        state = (image + words) * shapes.width * size
        bytes_, text = rows * (len(blocks) * state + one), f"inputs of {len(blocks)} blocks, all of one"
    else:
        bytes_, text = rows * sum(blocks) * factor * size, f"all of {len(blocks)} blocks"
    tokens = f"{image} + {words} tokens"
    updating = [Item("activations", bytes_, f"{text}, {rows} samples at a time, {tokens}")]
    if config.generator.dtype == "float32" and config.train.precision != "no":
        share = 1 / len(blocks) if config.train.gradient_checkpointing else 1
        copies = count(parts["transformer"]) * size * share
        updating.append(Item("autocast", copies, f"{config.train.precision} copies of float32 weights"))
    if encoders:
        each = terms_per_sample(config) * config.rollout.group / config.train.updates
        prompts = min(config.rollout.prompts, math.ceil(config.train.chunk / each) + 1) + 1
        bytes_ = prompts * sum(map(text_width, encoders)) * factor * size
        updating.append(Item("text activations", bytes_, f"{prompts} prompts at a time, one of them the negative one"))
    if shapes.scored_rows:
        updating.append(Item("decoding with gradient", *_decoding_graph(config, parts, shapes)))
    return {"sampling": (sampling,), "decoding": (decoding,), "updating": tuple(updating)}


def _way(config: Config) -> str:
    if config.policy.kind == "full":
        return "full"
    casts = config.generator.dtype != "float32" and config.train.precision == "no"
    return "lora" if casts else "lora, autocast"


def text_width(encoder: nn.Module) -> int:
    """Input and output features of a text encoder's linear layers, times the tokens they see."""
    settings: Any = encoder.config
    features = sum(layer.in_features + layer.out_features for layer in linears(encoder).values())
    return settings.max_position_embeddings * features


def block_widths(network: nn.Module, image: int, text: int) -> list[int]:
    """Per block of a network: input and output features of its linear layers, times their tokens."""
    blocks = block_layers(network, image, text)
    return [sum(tokens * (layer.in_features + layer.out_features) for layer, tokens in block) for block in blocks]


def block_layers(network: nn.Module, image: int, text: int) -> list[list[tuple[Any, int]]]:
    """Per block of a network: its linear layers that work on tokens, each with their number for one sample."""
    from torch import nn

    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for one in lists for block in one if linears(block)]
    joint = any("add_k_proj" in name for block in blocks for name in linears(block) if not name.startswith("attn2"))
    return [_with_tokens(linears(block), image, text, joint) for block in blocks]


def _with_tokens(layers: dict[str, Any], image: int, text: int, joint: bool) -> list[tuple[Any, int]]:
    beside = any("add_k_proj" in name for name in layers)
    crossed = not joint and any(name.startswith("attn2") for name in layers)
    found = []
    for name, layer in layers.items():
        if "norm" in name or "mod" in name or "adaLN" in name:
            continue  # once a sample
        if joint and not beside:
            tokens = image + text  # both in one stream
        elif "add_" in name or "context" in name or "txt" in name:
            tokens = text
        elif crossed:
            tokens = text if name.endswith(("attn2.to_k", "attn2.to_v")) else image
        else:
            tokens = image if joint else image + text
        found.append((layer, tokens))
    return found


def _decoding(config: Config, parts: dict[str, Part], shapes: Shapes) -> tuple[float, str]:
    if "vae" not in parts:
        return 0.0, "no VAE"
    height, width = (min(side, TILE) if config.memory.vae_tiling else side for side in shapes.size)
    most = 2**22 // (shapes.size[0] * shapes.size[1] * max(1, shapes.frames // 4))  # as generators.codec decodes
    rows = 1 if config.memory.vae_slicing else max(1, min(shapes.decoded_rows, most))
    kind, widest = decoder_maps(arguments(parts["vae"]), shapes.frames)
    maps = DECODED[kind]
    bytes_ = maps * widest * height * width * SIZES[config.generator.dtype] * rows
    return bytes_, f"{rows} at a time, {widest} channels of {height} x {width}"


def _decoding_graph(config: Config, parts: dict[str, Part], shapes: Shapes) -> tuple[float, str]:
    rows, how = shapes.scored_rows, "samples at a time, without the graph of the reward's networks"
    if "vae" not in parts:
        return 0.0, "no VAE"
    kind, widest = decoder_maps(arguments(parts["vae"]), shapes.frames)
    pixels = shapes.size[0] * shapes.size[1] * shapes.frames
    return GRAPH[kind] * widest * pixels * SIZES[config.generator.dtype] * rows, f"{rows} {how}"


def decoder_maps(vae: Mapping[str, Any], frames: int) -> tuple[str, int]:
    """(key of :data:`DECODED` and :data:`GRAPH`, channels of a full-resolution map) of a VAE with these settings."""
    widths = vae.get("block_out_channels")
    if widths and frames == 1:
        return "image", widths[min(1, len(widths) - 1)]
    base = widths[0] if widths else vae.get("decoder_base_dim") or vae.get("base_dim") or 96
    return "video" if frames > 1 else "frame", 2 * base


TILE = 512
"""Pixels of a side of diffusers' tiles, most of them."""


def _count(number: int) -> str:
    """``11.9 billion``."""
    for unit, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.1f} {word}"
    return str(number)
