"""Whether a model's tokens and attention heads can be divided as ``parallel.context`` says, without its weights."""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING

from align.checking.architectures import arguments, parts_of
from align.checking.sizes import Shapes, shapes_of
from alignflow.errors import Problem

if TYPE_CHECKING:
    from align.config.settings import Config


def problems(config: Config) -> list[Problem]:
    """Numbers that cannot be divided evenly; empty if the model is not known before it is downloaded."""
    ways = config.parallel.context
    parts = parts_of(config.generator.kind, config.generator.path) if ways > 1 else None
    if parts is None or "transformer" not in parts:
        return []
    found, network = [], parts["transformer"]
    heads = arguments(network).get("num_attention_heads")
    if heads and heads % ways:
        said = f"the {heads} attention heads of {config.generator.path} cannot be divided among {ways} processes"
        found.append(Problem("parallel.context", f"{said}: use {_divisors(heads, ways)}"))
    for place, size in (("generator.size", config.generator.size), ("evaluate.size", config.evaluate.size)):
        if place == "evaluate.size" and (size is None or config.prompts.heldout is None):
            continue
        generator = config.generator.model_copy(update={"size": size})
        shapes = shapes_of(config.model_copy(update={"generator": generator}), parts)
        if shapes.image_tokens % ways:
            of = f"{shapes.size[0]} x {shapes.size[1]}" + (f" x {shapes.frames} frames" if shapes.frames > 1 else "")
            said = f"the {shapes.image_tokens} tokens of {of} cannot be divided among {ways} processes"
            found.append(Problem(place, f"{said} (parallel.context): choose another size or another number"))
        if place == "generator.size" and shapes.text_tokens % ways and _splits_text(network.name):
            said = f"{shapes.text_tokens} text tokens cannot be divided among {ways} processes (parallel.context)"
            found.append(Problem("generator.text_length", f"{said}: use a multiple of {ways}"))
    return found


def part_of_tokens(config: Config, network: str, shapes: Shapes) -> tuple[int, int]:
    """(image, text) tokens of a sample that one process computes on; ``network`` is the name of diffusers' class."""
    ways = config.parallel.context
    words = math.ceil(shapes.text_tokens / ways) if ways > 1 and _splits_text(network) else shapes.text_tokens
    return math.ceil(shapes.image_tokens / ways), words


def _divisors(number: int, below: int) -> str:
    """The next smaller number that divides ``number``, in words."""
    best = next(way for way in range(below - 1, 0, -1) if number % way == 0)
    return f"{best}, or another divisor of {number}"


def _splits_text(name: str) -> bool:
    """Whether diffusers' plan for this network divides the text tokens too."""
    plan = getattr(import_module("diffusers"), name)._cp_plan or {}
    return any("encoder_hidden_states" in entry for entry in plan.values() if isinstance(entry, dict))
