"""Comparison of a recipe's needs with the rest of a config, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from align.config import registry
from align.maths.samplers import STOCHASTIC
from alignflow.kinds import nearest
from alignflow.settings import Problems
from alignflow.words import listing
from rewards.scopes import has_parts, known_scope, without_gradient

if TYPE_CHECKING:
    from align.config.sections import Sections
    from rewards.base import RewardSettings

ROLES = ("behaviour", "reference", "anchor")
"""Roles that a recipe can declare: a run copies and updates them, see :mod:`align.policy.roles`."""


def problems(config: Sections) -> Problems:
    """(path, message) of every need of the recipe and its learners that the config does not meet."""
    found = _declarations(config)
    for need in config.recipe.required:
        found += CHECKS[need](config) if need in CHECKS else []
    return found + _learners(config) + _added(config) + _recomputed(config) + _kept(config) + _engine(config)


def _recomputed(config: Sections) -> Problems:
    if not getattr(config.rollout, "recompute", False) or hasattr(config.recipe, "surrogate"):
        return []
    return [("rollout.recompute", f"{config.recipe.kind} has no ratio of log-probabilities of steps: leave this out")]


def _kept(config: Sections) -> Problems:
    keep = getattr(config.rollout, "keep", None)
    if keep is None:
        return []
    if not config.recipe.divides_group:
        return [("rollout.keep", f"{config.recipe.kind} does not train samples separately: leave this out")]
    if keep > config.rollout.group:
        return [("rollout.keep", f"is larger than the group of {config.rollout.group}")]
    return []


def _engine(config: Sections) -> Problems:
    """Limits of an external engine: it returns samples of text prompts, generated with a LoRA of the network."""
    rollout: Any = config.rollout
    engine = getattr(rollout, "engine", None)
    if engine is None:
        return []
    kind, found = config.recipe.kind, []
    instead = "use nft, awm, flow_rwr, flow_dpo or another recipe of finished samples, or leave this out"
    if needs := [need for need in config.recipe.needs if need in ELSEWHERE]:
        found.append(("rollout.engine", f"{kind} needs {ELSEWHERE[needs[0]]}, which no engine returns: {instead}"))
    elif "trajectory" in config.recipe.needs and not engine.returns_steps:
        said = f"{kind} needs the latents of the sampler's steps, and {engine.kind} returns finished samples"
        found.append(("rollout.engine", f"{said}: {instead}"))
    elif "trajectory" in config.recipe.needs and not hasattr(config.recipe, "surrogate"):
        said = f"{kind} reads log-probabilities of the rollout, and those of an engine are not used"
        found.append(("rollout.engine", f"{said}: {instead}"))
    elif "trajectory" in config.recipe.needs and not config.rollout.recompute:  # type: ignore[union-attr]
        said = f"{kind} compares log-probabilities with those of the rollout, and an engine's are not used: set true"
        found.append(("rollout.recompute", said))
    if config.policy.kind != "lora":
        found.append(("policy.kind", f"an engine is sent a LoRA, not a policy of kind {config.policy.kind}: use lora"))
    if "text" in config.recipe.learners()["policy"].trains:
        found.append(
            (
                "rollout.engine",
                f"{kind} trains text encoders, and an engine is sent only the network's LoRA: leave this out",
            )
        )
    if inputs := registry.inputs(config.generator.kind):
        said = (
            f"{config.generator.kind} reads {' and '.join(inputs)} with every prompt, and an engine is sent only texts"
        )
        found.append(("rollout.engine", f"{said}: leave this out"))
    return found + engine.problems(rollout.sampler, rollout.same_noise, config.generator.kind)  # type: ignore[no-any-return]


ELSEWHERE = {
    "predictions": "the clean samples that the sampler's steps predict",
    "step_scores": "the clean samples that the sampler's steps predict",
    "reward_gradient": "samples that it generates in its loss",
}
"""Need of a recipe that an engine cannot meet -> in words."""


def _declarations(config: Sections) -> Problems:
    """Unknown needs and roles in a recipe's declarations. A run would ignore them."""
    recipe = config.recipe
    declared: list[tuple[str, Iterable[str], Iterable[str]]] = [
        ("need", recipe.required, CHECKS),
        ("role", recipe.largest.roles(config), ROLES),
    ]
    return [
        ("recipe.kind", f"{recipe.kind} declares the {what}{nearest(name, known, f'there are {listing(known)}')}")
        for what, names, known in declared
        for name in names
        if name not in known
    ]


def _trajectory(config: Sections) -> Problems:
    kind, sampler = config.recipe.kind, getattr(config.rollout, "sampler", None)
    if sampler is None:
        return [("rollout.kind", f"{kind} learns from its own samples: use kind 'online'")]
    if not sampler.stochastic:
        return [("rollout.sampler.kind", f"{kind} needs a stochastic sampler: one of {', '.join(STOCHASTIC)}")]
    return []


def _predictions(config: Sections) -> Problems:
    sampler = getattr(config.rollout, "sampler", None)
    if sampler is None or sampler.window.strategy == "all":
        return []
    return [("rollout.sampler.window", f"{config.recipe.kind} trains every step of the sampler: leave this out")]


def _reward_gradient(config: Sections) -> Problems:
    kind, reward = config.recipe.kind, config.reward
    if config.rollout.kind != "online":
        return [("rollout.kind", f"{kind} learns from its own samples: use kind 'online'")]
    if reward is None:
        return []
    if reward.gradient() is False:
        remedy = "`alignflow recipes` lists those that do"
        return [
            (place, f"{kind} follows the reward's gradient, and {name} has none; {remedy}")
            for place, name in without_gradient(reward).items()
        ]
    if known_scope(reward) == "group" and whole_groups(config):
        found = _chunks_of_groups(config, reward)
    elif known_scope(reward) != "sample":
        found = [("reward", f"{kind} scores samples chunk by chunk, and {_kind(reward)} compares samples")]
    else:
        found = []
    if found:
        return found
    if config.rollout.filter is not None or config.rollout.overlap != "none":
        key = "filter" if config.rollout.filter is not None else "overlap"
        return [(f"rollout.{key}", f"{kind} samples and scores in its loss: leave this out")]
    return []


def whole_groups(config: Sections) -> bool:
    """Whether the loss scores whole prompts where its chunks hold them."""
    return bool(getattr(config.recipe, "scores_groups", False))


def _chunks_of_groups(config: Sections, reward: RewardSettings) -> Problems:
    group, said = config.rollout.group, f"{_kind(reward)} compares the samples of a prompt, so"
    if config.train.updates > 1:
        return [("train.updates", f"{said} an update needs all of them: use 1")]
    if config.train.chunk % group:
        return [("train.chunk", f"{said} a chunk should be a multiple of rollout.group = {group}")]
    return []


def _kind(reward: RewardSettings) -> str:
    return str(getattr(reward, "kind", "this reward"))


def _parts(config: Sections) -> Problems:
    if config.reward is None or has_parts(config.reward):
        return []
    return [("reward", f"{config.recipe.kind} needs the named parts of a reward, as a mixture has")]


def _regions(config: Sections) -> Problems:
    if config.reward is None or config.reward.gives_regions:
        return []
    able = listing([kind for kind, cls in registry.rewards().items() if getattr(cls, "gives_regions", False)])
    return [
        ("reward", f"{config.recipe.kind} needs scores of regions, and {_kind(config.reward)} gives none; {able} does")
    ]


def _step_scores(config: Sections) -> Problems:
    found = _trajectory(config)
    if not found and config.reward is not None and known_scope(config.reward) != "sample":
        found.append(
            ("reward", f"{config.recipe.kind} scores predictions step by step, but {_kind(config.reward)} compares")
        )
    return found


def _text_gradient(config: Sections) -> Problems:
    kind, memory, generator, found = config.recipe.kind, config.memory, config.generator.kind, []
    if memory.cache_prompts != "none":
        found.append(("memory.cache_prompts", f"{kind} trains the text encoders, so prompts cannot be cached: none"))
    if memory.offload != "none":
        message = f"{kind} trains the text encoders, which stay beside the network until its backward pass: none"
        found.append(("memory.offload", message))
    if config.policy.kind != "lora":
        found.append(("policy.kind", f"{kind} trains LoRAs on the text encoders: use lora"))
    if ":" not in generator and not registry.declared(generator, "text_loras"):
        able = listing([one for one in registry.generators() if registry.declared(one, "text_loras")])
        message = (
            f"{kind} trains text encoders, but diffusers cannot load a LoRA of those of {generator}; use one of {able}"
        )
        found.append(("generator.kind", message))
    return found


CHECKS: dict[str, Callable[[Sections], Problems]] = {
    "trajectory": _trajectory,
    "predictions": _predictions,
    "reward_gradient": _reward_gradient,
    "parts": _parts,
    "step_scores": _step_scores,
    "text_gradient": _text_gradient,
    "regions": _regions,
}


def _learners(config: Sections) -> Problems:
    kind = config.recipe.kind
    others = {name: learns for name, learns in config.recipe.learners().items() if name != "policy"}
    trained = [name for name, learns in others.items() if learns.updates != 0]
    found: Problems = []
    if others and config.policy.kind != "lora":
        says = f"trains a {trained[0]}" if trained else f"holds the LoRA of {next(iter(others))}"
        found.append(("policy.kind", f"{kind} {says} on the same network: use lora"))
    if trained and config.train.precision == "fp16":
        found.append(("train.precision", f"{kind} trains a {trained[0]} too, and fp16 scales one loss: use bf16 or no"))
    return found


def _added(config: Sections) -> Problems:
    """Settings that exclude modules added to the network's blocks."""
    policy = config.policy.kind
    if policy in ("lora", "full"):
        return []
    found: Problems = []
    if config.memory.compile != "none":
        found.append(("memory.compile", f"a policy of kind {policy} acts on layers while they compute: use none"))
    if config.train.gradient_checkpointing and "reward_gradient" in config.recipe.needs:
        says = (
            f"recomputes blocks of several calls, and a policy of kind {policy} can repeat only the last one: use false"
        )
        found.append(("train.gradient_checkpointing", says))
    generator = config.generator.kind
    if policy == "users" and ":" not in generator and not registry.declared(generator, "user_attention"):
        able = listing([one for one in registry.generators() if registry.declared(one, "user_attention")])
        found.append(("generator.kind", f"{generator} names no layers that can attend to a user; {able} do"))
    return found


def followed(config: Sections) -> RewardSettings | None:
    """The reward whose gradient the recipe of a run follows, if it follows one."""
    return config.reward if "reward_gradient" in config.recipe.required else None
