"""Report of ``alignflow check`` on a config: main settings, batch sizes, missing files. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from align.checking import context_check
from align.checking.folder_check import (
    evaluation_problems,
    folder_problems,
    lora_problems,
    scheduler_line,
    size_unit,
    target_problems,
)
from align.checking.sizes import native_size, terms_per_sample
from align.checking.users_check import user_problems
from align.config import memory, registry, sharding
from align.config.model import GeneratorConfig
from align.config.sampling import sampler_line
from align.config.sections import is_unread
from align.config.settings import Config
from align.config.sources import OnlineRollout
from align.data import buckets
from align.data.pair_table import stored_rewards
from align.data.prompts import Prompt, check_media, read_prompts, read_stored
from align.data.tables import is_tie, table_problems
from align.rollout import servers
from align.runs import devices
from alignflow.errors import AlignflowError, ConfigError, Problem
from alignflow.extras import remedy
from alignflow.paths import exists, expanded
from alignflow.words import count, one_line, reward_lines
from alignflow.worlds.shapes import WORLDS, pipelines


def geometry(config: Config, processes: int = 1) -> str:
    """Numbers of samples, terms, chunks and optimizer steps of a rollout, in one sentence."""
    rollout, train = config.rollout, config.train
    samples = rollout.prompts * rollout.group
    of = "prompt" if isinstance(rollout, OnlineRollout) else "row"
    made = f"{count(rollout.prompts, of)} x {count(rollout.group, 'sample')} = {count(samples, 'sample')}"
    if is_unread(config.recipe):
        return f"{made} per rollout; terms and updates are known once {config.recipe.kind} is imported"
    trained = rollout.prompts * (getattr(rollout, "keep", None) or rollout.group)
    made += f", of which {trained} are trained on," if trained < samples else ""
    each = terms_per_sample(config) * samples / trained
    terms = math.ceil(trained * each)
    per_update = math.ceil(terms / train.updates)
    per_process = math.ceil(per_update / processes)
    chunks = math.ceil(per_process / train.chunk)
    size = min(per_process, train.chunk)
    where = "one process" if processes == 1 else f"{processes} processes"
    if config.parallel.context > 1:
        groups = "one group" if processes == 1 else f"each of {processes} groups"
        where = f"{groups} of {config.parallel.context} processes"
    return (
        f"{made} per rollout; {each:g} x each = {count(terms, 'term')}; "
        f"{count(train.updates, 'optimizer step')} per rollout, in {count(chunks, 'chunk')} of {count(size, 'term')} "
        f"on {where}; {count(train.steps, 'rollout')} = {count(train.steps * train.updates, 'optimizer step')} in all"
        f"{_others(config, samples)}"
    )


def _others(config: Config, samples: int) -> str:
    """Terms and optimizer steps of the learners other than the policy."""
    said = ""
    for name, learns in config.recipe.learners().items():
        if learns.updates == 0:
            continue
        terms = math.ceil(samples * terms_per_sample(config, name))
        steps = count(learns.updates or config.train.updates, "optimizer step")
        said += "" if name == "policy" else f"; the {name}: {count(terms, 'term')} and {steps} per rollout"
    return said


def network_calls(config: Config) -> int:
    """Network calls, each on one sample, to sample one rollout."""
    rollout = config.rollout
    if not isinstance(rollout, OnlineRollout):
        return 0
    return rollout.prompts * rollout.group * rollout.sampler.steps * (1 if rollout.sampler.guidance == 1.0 else 2)


def essentials(config: Config) -> list[tuple[str, str]]:
    """(name, resolved settings) of each line of the report."""
    generator, train, evaluate = config.generator, config.train, config.evaluate
    size = f"{generator.size[0]} x {generator.size[1]}" if generator.size else "native size"
    rollout, device = config.rollout, devices.said(generator.device)
    source = (
        sampler_line(rollout.sampler) if isinstance(rollout, OnlineRollout) else f"{rollout.kind} of {rollout.file}"
    )
    scores = ", ".join(evaluate.rewards) or "the trained reward"
    gold = f" ({evaluate.gold} decides)" if evaluate.gold else ""
    drawn = f"{count(evaluate.prompts, 'prompt')}, {sampler_line(evaluate.sampler)}"
    drawn += f", {evaluate.size[0]} x {evaluate.size[1]}" if evaluate.size else ""
    held_out = f"{config.prompts.heldout}: {drawn}; scores {scores}{gold}"
    return [
        ("run", f"{config.name}, seed {config.seed}, into {config.run_dir}"),
        (
            "generator",
            f"{generator.kind} {generator.path}, {generator.dtype}, {size}, device {device}",
        ),
        *([("scheduler", line)] if (line := scheduler_line(generator)) else []),
        ("policy", one_line(config.policy.shown())),
        (
            "prompts",
            ", ".join(source.file for source in config.prompts.sources)
            + ("" if config.prompts.bad == "stop" else ", unusable rows left out"),
        ),
        ("rollout", source),
        *([("buckets", line)] if (line := bucket_line(config)) else []),
        *servers.found_out(config)[0],
        *reward_lines(config.reward.model_dump(mode="json", exclude_none=True) if config.reward else None),
        ("recipe", one_line(config.recipe.model_dump(mode="json", exclude_none=True))),
        (
            "train",
            f"lr {train.lr:g} {train.schedule}, warmup {train.warmup}, ema {train.ema:g}, autocast {train.precision}",
        ),
        ("memory", one_line({"kind": train.optimizer, **config.memory.model_dump(exclude_defaults=True)})),
        ("batch", geometry(config, max(1, _processes() // config.parallel.context))),
        ("sampling", f"{count(network_calls(config), 'network call')} per rollout"),
        ("held out", held_out if config.prompts.heldout else "none: prompts.heldout is not set"),
    ]


# -- files and packages -----------------------------------------------------------------------------------------------


def check_files(config: Config) -> None:
    """Raise ConfigError, which lists every file and package that the config needs and this machine does not have."""
    parts = (
        _prompts,
        _stored,
        _videos,
        _policy,
        trackers,
        master_weights,
        sharding.problems,
        evaluation_problems,
        context_check.problems,
    )
    problems = [*generator_problems(config.generator), *(problem for part in parts for problem in part(config))]
    problems += servers.found_out(config)[1]
    problems += memory.missing(config.memory, config.train.optimizer, device=config.generator.device)
    if problems:
        raise ConfigError(problems, config.name)


def _prompts(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    read: Callable[[str], object]
    named = [("train", source.file) for source in config.prompts.sources]
    named += [("heldout", config.prompts.heldout)] if config.prompts.heldout else []
    for name, source in named:
        drawn = name == "heldout" or isinstance(config.rollout, OnlineRollout)
        skips = config.prompts.bad == "skip"
        if drawn and not skips:
            read = partial(_drawable, generator=config.generator.kind)
        else:
            read = partial(_read, skipped={} if skips else None)
        problems += table_problems(f"prompts.{name}", source, read)
    return problems


def _drawable(source: str, generator: str) -> None:
    _check_inputs(_read(source), generator)


def _read(source: str, skipped: dict[str, str] | None = None) -> list[Prompt]:
    """Prompts of a file. Of an embedded world, whose prompts all have the same inputs, only the first."""
    return read_prompts(source, 1 if source.split(":")[0] in WORLDS else None, skipped=skipped)


def bucket_sizes(config: Config) -> list[tuple[int, int]]:
    """The buckets of stored rows, in multiples of what the model needs where that is known without loading it."""
    settings, size = config.rollout.buckets, config.generator.size  # type: ignore[union-attr]
    assert settings is not None
    assert size is not None
    return buckets.sizes(size, math.lcm(settings.step, size_unit(config.generator) or 1), settings.ratio)


def seen_sizes(config: Config) -> list[tuple[int, int]]:
    """Sizes at which training sees media: the buckets, or the one size of all; [] where that is not known here."""
    if not isinstance(config.rollout, OnlineRollout) and config.rollout.buckets is not None:
        return bucket_sizes(config)
    size = config.generator.size or native_size(config.generator)
    return [] if size is None else [size]


def bucket_line(config: Config) -> str:
    """The buckets with their rows; '' without buckets, and where a row cannot be read, which is reported by itself."""
    rollout = config.rollout
    if isinstance(rollout, OnlineRollout) or rollout.buckets is None:
        return ""
    try:
        stored = read_stored(rollout.file, rollout.columns, {})
        rows = [row for row in stored if not is_tie(row.metadata.get("tie"), row.where)]
        return buckets.divided(rows, rollout.columns, rollout.buckets, bucket_sizes(config), {})[1].said(
            rollout.prompts
        )
    except AlignflowError:
        return ""


def _stored(config: Config) -> list[Problem]:
    rollout = config.rollout
    if isinstance(rollout, OnlineRollout):
        return []
    if config.prompts.bad == "skip":
        return table_problems("rollout.file", rollout.file, lambda file: read_stored(file, rollout.columns, {}))

    def read(file: str) -> None:
        rows = read_stored(file, rollout.columns)
        _check_inputs(rows, config.generator.kind)
        for row in rows:
            if not is_tie(row.metadata.get("tie"), row.where):
                stored_rewards(row, rollout, is_unread(config.recipe) or config.recipe.any_order)
        if rollout.buckets is not None:
            buckets.divided(rows, rollout.columns, rollout.buckets, bucket_sizes(config))

    return table_problems("rollout.file", rollout.file, read)


def _check_inputs(prompts: list[Prompt], generator: str) -> None:
    check_media(prompts, registry.inputs(generator), f"generator {generator}")


def _policy(config: Config) -> list[Problem]:
    policy = config.policy
    if policy.kind == "gate":
        experts = policy.experts.items()
        return [
            one for name, e in experts for one in lora_problems(e.lora, f"policy.experts.{name}.lora", ("network",))
        ]
    if policy.kind == "users":
        return user_problems(config, policy)
    if policy.kind != "lora":
        return []
    learners = {} if is_unread(config.recipe) else config.recipe.learners()
    trains = learners["policy"].trains if learners else ()
    starts = {f"recipe ({name})": one.init for name, one in learners.items() if one.init is not None}
    found = [problem for place, init in starts.items() for problem in lora_problems(init, place)]
    if policy.init is not None:
        return found + lora_problems(policy.init, "policy.init", trains)
    text = (registry.declared(config.generator.kind, "text_loras") or ()) if "text" in trains else ()
    return found + target_problems(
        config.generator, policy.targets, (*text, *(() if trains == ("text",) else ("transformer",)))
    )


def _videos(config: Config) -> list[Problem]:
    if config.samples.video == "mp4" and not any(map(find_spec, ("imageio_ffmpeg", "av"))):
        return [Problem("samples.video", "mp4 needs a codec: pip install imageio-ffmpeg, or av; or write webp")]
    return []


def generator_problems(generator: GeneratorConfig) -> list[Problem]:
    """Problems with the device and the path of a generator.

    A path is a folder with a pipeline, a hub id, or an embedded world that has this kind.
    """
    return [*devices.problems("generator.device", generator.device), *_path_problems(generator)]


def _path_problems(generator: GeneratorConfig) -> list[Problem]:
    kind, path = generator.kind, generator.path
    if have := pipelines(path):
        said = f"the embedded world {path!r} has no {kind!r}; it has {', '.join(have)}"
        return folder_problems(generator) if kind in have else [Problem("generator.path", said)]
    try:
        folder = expanded(path)
    except ValueError as error:
        return [Problem("generator.path", str(error))]
    if exists(folder):
        return folder_problems(generator)
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return []  # a hub id: loading asks the hub for it
    message = f"no folder {path} (looked in {Path.cwd()}); give a diffusers folder, a hub id owner/name, or 'shapes'"
    return [Problem("generator.path", message)]


def master_weights(config: Config) -> list[Problem]:
    """A problem for weights trained in half precision: updates below 1/256 of a weight are rounded away."""
    dtype = config.generator.dtype
    if config.policy.kind != "full" or dtype == "float32":
        return []
    precision = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    message = f"policy full loses small updates of {dtype} weights: use float32, and train.precision {precision}"
    return [Problem("generator.dtype", message)]


def trackers(config: Config) -> list[Problem]:
    """A problem for each tracker that is not installed."""
    packages = {"wandb": "wandb", "trackio": "trackio", "tensorboard": "tensorboard"}
    missing = [name for name in config.trackers if find_spec(packages.get(name, name)) is None]
    return [Problem("trackers", f"{name} is not installed: {remedy(name)}") for name in missing]


def _processes() -> int:
    """Number of processes of this launch, set by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1"))
