"""A commented config to start from: for one's model, prompts and reward. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from align.config import registry
from alignflow.errors import ConfigError
from alignflow.paths import is_dir
from alignflow.words import listing
from alignflow.worlds.shapes import WORLDS
from generators.folder import INDEX, read_index

STOCHASTIC = "{kind: flow_sde, steps: 10, noise_level: 0.7}"


def kind_of(model: str, remedy: str = "add --generator KIND") -> str:
    """The adapter of a model: of an embedded world, or of a folder by its ``model_index.json``.

    Args:
        model: an embedded world, or a folder in diffusers' format.
        remedy: how the caller names an adapter, for the error.

    Raises:
        ConfigError: it is neither, or several adapters read it; names the remedy.
    """
    if model in WORLDS:
        return WORLDS[model][0]
    if not is_dir(model):
        raise ConfigError(
            f"{model} is not a folder on this machine, so its pipeline is unknown: {remedy}, one of "
            f"{', '.join(registry.generators())}"
        )
    name = str(read_index(Path(model)).get("_class_name"))
    found = [kind for kind in registry.generators() if registry.declared(kind, "pipeline_class") == name]
    if len(found) > 1:
        raise ConfigError(f"{model}/{INDEX} is a {name}, which {listing(found)} read: {remedy}, one of them")
    return found[0] if found else "generic"


def reward_of(text: str) -> str:
    """The reward's section: ``{kind: clip}`` of a kind or ``file.py:function``, or YAML as it was given."""
    return text if text.lstrip().startswith("{") else f"{{kind: {json.dumps(text) if ':' in text else text}}}"


TEMPLATE = """\
# A starting point. Check it with `alignflow check FILE`, and its memory with `alignflow check FILE --card 24gb`.
# Settings of a recipe: `alignflow show recipe {recipe}`; all others: docs/reference/training.md.

# The model to align, and its trained part: a LoRA of this rank.
generator: {place}
policy: {{kind: lora, rank: 32, alpha: 64}}

# One prompt a line, or a table; a few hundred are a start.{also}
prompts: {{train: {prompts}{held}

# The score to optimise. Your own: kind: "file.py:function", with def function(media, prompts) -> N numbers.
reward: {reward}

# A step generates `prompts` x `group` samples with this sampler, scores them, and compares those of each prompt.
rollout: {{kind: online, prompts: 8, group: 8, chunk: {chunk}, decode_chunk: 4, sampler: {sampler}}}
recipe: {{kind: {recipe}}}

# Steps of the run, learning rate, and terms of the loss per pass (`chunk` affects memory, not results).
train: {{steps: 100, lr: 1.0e-4, chunk: {chunk}{precision}}}

# Steps between evaluations, sample grids and checkpoints. Use the sampler with which you will use the model.
evaluate: {{every: 25, prompts: 24, chunk: 4, sampler: {{kind: ode, steps: 20}}}}
samples: {{every: 25, count: 8}}
checkpoint: {{every: 25, keep: 2}}
"""


def starter(
    model: str,
    prompts: str,
    reward: str,
    *,
    recipe: str = "nft",
    generator: str | None = None,
    heldout: str | None = None,
    device: str = "auto",
) -> str:
    """The text of a training config.

    Args:
        model: folder, hub id, or ``shapes``.
        prompts: source of prompts, as ``prompts.train``.
        reward: kind, ``file.py:function``, or a mapping in YAML.
        generator: adapter; None = told from the folder.

    Raises:
        ConfigError: the adapter is unknown, or there is no such recipe.
    """
    kind = generator or kind_of(model)
    recipes = registry.recipes()
    if recipe not in recipes:
        raise ConfigError(f"no recipe {recipe!r}; there are {listing(recipes, recipe)}")
    stochastic = "trajectory" in recipes[recipe].needs
    sampler = STOCHASTIC if stochastic else "{kind: ode, steps: 10}"
    small = device == "cpu" or model == "shapes"
    place = f"{{kind: {kind}, path: {json.dumps(model)}, device: {device}" + ("}" if small else ", dtype: bfloat16}")
    needs = registry.inputs(kind)
    also = f" Every prompt comes with: {', '.join(needs)}, as columns of a table." if needs else ""
    held = f", heldout: {json.dumps(heldout)}}}" if heldout else "}  # add heldout: prompts that training never sees"
    chunk = 64 if small else 8
    precision = "" if small else ", precision: bf16, gradient_checkpointing: true"
    return TEMPLATE.format(
        recipe=recipe, place=place, also=also, prompts=json.dumps(prompts), held=held, reward=reward_of(reward),
        chunk=chunk, sampler=sampler, precision=precision,
    )  # fmt: skip
