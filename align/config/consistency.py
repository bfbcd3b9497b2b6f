"""Settings of a training run that do not go together, of any installation. No torch."""

from __future__ import annotations

from collections.abc import Callable

from align.config import needs, registry
from align.config.memory import conflicts as memory_conflicts
from align.config.sections import Sections
from align.config.sources import OnlineRollout, SamplesRollout
from alignflow.kinds import listing, nearest
from alignflow.settings import Problems
from rewards.scopes import has_parts, known_scope

SPLITS = ("auto", "native", "flash", "flash_hub", "flash3_hub")
"""Attention backends that compute with tokens spread over processes, with a gradient."""


def problems(config: Sections) -> Problems:
    """(setting, problem) of every combination that cannot be run."""
    return [problem for check in CHECKS for problem in check(config)] + config.recipe.check(config)


def _check_evaluation(config: Sections) -> Problems:
    evaluate, problems = config.evaluate, []
    if evaluate.rewards and config.prompts.heldout is None:
        problems.append(("prompts.heldout", "is missing, and evaluate.rewards needs it: name held-out prompts"))
    if evaluate.gold is not None and evaluate.gold not in evaluate.rewards:
        names = listing(evaluate.rewards) or "none"
        wrong = nearest(evaluate.gold, evaluate.rewards, f"there are {names}")
        problems.append(("evaluate.gold", f"no such reward in evaluate.rewards{wrong}"))
    best, scored = config.checkpoint.best, [*evaluate.rewards, *(["reward"] if config.reward else [])]
    if best is not None and (best not in scored or config.prompts.heldout is None):
        names = listing(scored) or "none"
        wrong = nearest(best, scored, f"there are {names} (prompts.heldout is needed)")
        problems.append(("checkpoint.best", f"no score of held-out prompts has this name{wrong}"))
    if evaluate.patience is not None and best is None:
        problems.append(("evaluate.patience", "needs checkpoint.best, the name of the score to watch"))
    return problems


def _check_reward(config: Sections) -> Problems:
    if config.reward is None and isinstance(config.rollout, OnlineRollout):
        return [("reward", f"is missing; an online rollout needs one of {listing(registry.rewards())}")]
    return []


def _check_warmup(config: Sections) -> Problems:
    total = config.train.steps * config.train.updates
    if config.train.warmup > total:
        return [
            (
                "train.warmup",
                f"{config.train.warmup} optimizer steps, but the run has {total} (train.steps x train.updates)",
            )
        ]
    return []


def _check_comparisons(config: Sections) -> Problems:
    """Rewards and recipes that compare samples need several of them; evaluation has one sample per prompt."""
    problems: Problems = []
    for name, reward in config.evaluate.rewards.items():
        if known_scope(reward) != "sample" and (name == config.evaluate.gold or not has_parts(reward)):
            message = "compares samples, and evaluation has one per prompt: use a reward that scores them one by one"
            problems.append((f"evaluate.rewards.{name}", message))
    rollout = config.rollout
    if isinstance(rollout, OnlineRollout) and rollout.group < 2:
        if config.recipe.compares_group:
            message = f"{config.recipe.kind} learns from the differences in a group: at least 2 samples per prompt"
            problems.append(("rollout.group", message))
        elif config.reward is not None and known_scope(config.reward) == "group":
            problems.append(("rollout.group", "the reward compares the samples of a prompt: at least 2"))
    if isinstance(rollout, SamplesRollout) and rollout.by_reward and rollout.prompts < 2:
        problems.append(("rollout.prompts", "by_reward compares the samples of a step: at least 2"))
    return problems


def _check_precision(config: Sections) -> Problems:
    if config.train.precision == "fp16" and config.generator.device == "cpu":
        return [("train.precision", "fp16 needs a card; a CPU trains with 'no' or 'bf16'")]
    return []


def _check_size(config: Sections) -> Problems:
    """Settings that fit only the size of the rollouts cannot be used with samples of another size."""
    generator, size = config.generator, config.evaluate.size
    if size is None or size == generator.size:
        return []
    if generator.kind == "generic":
        return [("evaluate.size", "a pipeline without an adapter samples at one size; leave this out")]
    if config.memory.cache_prompts != "none" and registry.inputs(generator.kind):
        message = (
            f"prompts of {generator.kind} are cached with their images at one size: leave this out, or do not cache"
        )
        return [("evaluate.size", message)]
    return []


def _check_buckets(config: Sections) -> Problems:
    """Buckets need a size whose pixels they have, and a network whose inputs may have any of these sizes."""
    rollout, generator = config.rollout, config.generator
    if isinstance(rollout, OnlineRollout) or rollout.buckets is None:
        return []
    found: Problems = []
    if generator.size is None:
        found.append(("generator.size", "is missing; rollout.buckets have about its number of pixels"))
    if generator.kind == "generic":
        found.append(("rollout.buckets", "a pipeline without an adapter samples at one size; leave this out"))
    if config.memory.cache_prompts != "none" and registry.inputs(generator.kind):
        said = f"prompts of {generator.kind} are cached with their images at one size: leave this out, or do not cache"
        found.append(("rollout.buckets", said))
    return found


def _check_memory(config: Sections) -> Problems:
    """(setting, problem) of a training config that no installation could run."""
    memory, train, found = config.memory, config.train, []
    if config.policy.kind == "full" and memory.quantise != "none":
        found.append(("memory.quantise", f"{memory.quantise} weights cannot be trained; use policy.kind=lora, or none"))
    if config.policy.kind == "full" and memory.swap_blocks:
        found.append(("memory.swap_blocks", "swapped weights cannot be trained; use policy.kind=lora, or 0"))
    if memory.swap_blocks and not train.gradient_checkpointing:
        backward = "backward needs a block's weights again, and only a repeated forward pass copies them"
        found.append(("memory.swap_blocks", f"{backward}; use train.gradient_checkpointing=true, or 0"))
    if config.recipe.compares_logp and not getattr(config.rollout, "recompute", False):
        found += _rounded_apart(config)
    return found + memory_conflicts(config.generator, memory, train.optimizer, train.precision)


def _rounded_apart(config: Sections) -> Problems:
    """Settings with which a rollout and its update round differently, which a ratio of the two does not allow."""
    said = f"{config.recipe.kind} compares log-probabilities with those of the rollout, and"
    remedy = "rollout.recompute=true, or " if hasattr(config.recipe, "surrogate") else ""
    found = []
    if config.memory.compute == "fp8":
        steps = "fp8 products turn differences in the last digit, which other batch sizes make on a card, into steps of"
        found.append(("memory.compute", f"{said} {steps} up to 1/8; use {remedy}memory.compute=dtype"))
    if config.memory.compile == "full":
        graphs = "a whole compiled network has one graph with gradient and another without"
        found.append(("memory.compile", f"{said} {graphs}; use {remedy}memory.compile=blocks, which runs one"))
    return found


def _check_parallel(config: Sections) -> Problems:
    """(setting, problem) of a config whose samples cannot be divided among processes on any installation."""
    ways, found = config.parallel.context, []
    if ways == 1:
        return []
    where, kind = "parallel.context", config.generator.kind
    if kind in registry.generators() and not registry.declared(kind, "splits_tokens"):
        able = listing(one for one in registry.generators() if registry.declared(one, "splits_tokens"))
        found.append((where, f"{kind} cannot divide a sample among processes; these can: {able}. Use 1"))
    if config.policy.kind not in ("lora", "full"):
        found.append(
            ("policy.kind", f"a policy of kind {config.policy.kind} does not go with {where}: use lora or full")
        )
    if config.memory.attention not in SPLITS:
        said = f"{config.memory.attention} cannot attend to tokens of other processes ({where}); use"
        found.append(("memory.attention", f"{said} {listing(SPLITS)}"))
    if config.memory.compile != "none":
        found.append(("memory.compile", f"a network divided by {where} is not compiled: use none"))
    if config.memory.swap_blocks:
        found.append(("memory.swap_blocks", f"blocks of a network divided by {where} are not swapped: use 0"))
    if getattr(config.rollout, "engine", None) is not None:
        found.append(
            ("rollout.engine", f"an engine samples by itself and does not go with {where}: leave one of them out")
        )
    return found


CHECKS: tuple[Callable[[Sections], Problems], ...] = (
    _check_evaluation,
    _check_reward,
    _check_warmup,
    _check_comparisons,
    _check_precision,
    _check_size,
    _check_buckets,
    _check_memory,
    needs.problems,
    _check_parallel,
)
