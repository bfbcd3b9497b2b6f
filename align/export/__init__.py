"""``alignflow export``: write a trained policy for other programs, then reload and compare it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align.config.load import load_config
from align.data.files import new_folder
from align.export import check
from align.export.card import write_card
from align.policy import gated, layouts
from align.policy.build import build_generator
from align.policy.layers import Lora, linear_layers
from align.policy.layouts import FORMATS, ExportError
from align.policy.lora import file_of, files_of, put_lora
from align.policy.switching import PARTS
from align.runs import checkpoint, devices
from align.runs.lock import check_unwritten, locked
from align.runs.trained import Trained, load_policy
from alignflow.files import tensor_files
from alignflow.files.lora_encoders import PUBLISHED
from generators.base import Generator
from generators.load import DTYPES

if TYPE_CHECKING:
    from align.config.settings import Config

NOTICED, LOST = 0.1, 0.5
"""Shares of the trained effect that rounding may take before a warning, and before the export fails."""
STAGES = {"transformer": "high_noise", "transformer_2": "low_noise"}  # names of the files of two experts


@dataclass(frozen=True)
class Job:
    """One export.

    Args:
        trained: what is exported.
        config: of its run, with the dtype that its generator is loaded in.
        to: one of :data:`FORMATS`.
        dtype: of the written tensors.
    """

    trained: Trained
    config: Config
    to: str
    dtype: str

    @property
    def tolerance(self) -> float:
        """Largest difference that counts as rounding: of velocities at the scale of 1, of a layer at its own."""
        return check.EXACT if {self.dtype, self.config.generator.dtype} == {"float32"} else check.ROUNDED

    def load(self, path: Path | None = None) -> Generator:
        """The run's generator, from another folder where one is given."""
        config = self.config
        settings = config.generator.model_copy(update={"path": str(path)} if path else {})
        device = devices.chosen(settings.device)
        return build_generator(settings, config.memory, device, kinds=[config.evaluate.sampler.kind])

    def names(self, components: list[str]) -> dict[str, str]:
        """File of each network's LoRA; those of text encoders are in the first network's."""
        if self.to == "diffusers":
            return {component: file_of(component) for component in components}
        stem = self.config.name
        several = "transformer_2" in components
        return {
            c: f"{stem}_{STAGES.get(c, 'high_noise')}.safetensors" if several else f"{stem}.safetensors"
            for c in components
        }


def export(
    trained: Trained, to: str, out: Path | None = None, dtype: str | None = None, average: bool = False
) -> dict[str, Any]:
    """Write a policy as ``to`` and check it by reloading; all of the folder or nothing.

    Args:
        trained: from :func:`align.runs.trained.find_policy`.
        to: ``diffusers``, ``comfyui``, ``kohya`` (LoRA files) or ``merged`` (the whole pipeline).
        out: a new folder; ``export/<to>`` in the run folder by default.
        dtype: of the written tensors; float32 for a LoRA and the run's own for a pipeline by default.
        average: write experts with a gate as one LoRA with the shares averaged over time, which is not the same policy;
            without it such a policy is refused.

    Returns:
        a dict with ``folder``, ``from``, ``files``, ``difference`` (largest
        absolute one of velocities and media), ``moved`` (of velocities), ``velocity`` and ``effect`` (largest absolute
        velocity, and its largest change by the training), ``share`` (``moved`` / ``effect``; None where
        nothing was trained), ``warning`` (in words, or None), ``tolerance``.

    Raises:
        RunFolderError: ``out`` exists.
        CheckpointError: a file of the checkpoint was changed after it was written.
        ExportError: the layout cannot express this policy, or the file that was read back differs from it.
        LoraError, GeneratorError: the policy or its base model does not load.
    """
    out = out or trained.run / "export" / to
    check_unwritten(out)
    job = _job(trained, to, dtype, average)
    if trained.checkpoint:
        checkpoint.verify(trained.folder)
    generator = job.load()
    base = check.answers(generator, decode=to == "merged")
    load_policy(generator, trained.folder)
    lost = _averaged(generator) if average else None
    policy = check.answers(generator, decode=to == "merged")
    with locked(out), new_folder(out) as staging:
        again = _write_and_reload(job, generator, staging)
        scale, difference = float(policy.velocities.abs().max()), again.difference(policy)
        _check_reloaded(to, difference, scale, job.tolerance * max(1.0, scale))
        effect, moved = policy.moved(base), again.moved(policy)
        share = _lost_share(job, moved, effect)
        found = {"folder": str(out), "from": str(trained.folder), "step": trained.step}
        found["files"] = sorted(str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file())
        found |= {"difference": difference, "effect": effect, "velocity": scale, "tolerance": job.tolerance}
        found |= {"moved": moved, "share": share, "warning": _warning(job, share, lost)}
        write_card(staging, job.config, trained, to, found)
    return found


def _lost_share(job: Job, moved: float, effect: float) -> float | None:
    """Share of the training's ``effect`` that rounding takes; None if nothing was trained.

    Raises:
        ExportError: it is more than :data:`LOST`.
    """
    share = moved / effect if effect else None
    if share is not None and share > LOST:
        raise ExportError(
            f"--to {job.to}: rounding to {job.dtype} loses {share:.0%} of what training changed (velocities differ by "
            f"up to {moved:.2g}, training changed them by up to {effect:.2g}); nothing was kept. {_remedy(job)}"
        )
    return share


def _warning(job: Job, share: float | None, averaged: float | None) -> str | None:
    if averaged is not None:
        return f"averaging the gate over time changed velocities by up to {averaged:.2g}"
    if share is not None and share > NOTICED:
        return f"rounding to {job.dtype} loses {share:.0%} of what training changed. {_remedy(job)}"
    return None


def _averaged(generator: Generator) -> float:
    """Put the LoRA with averaged shares in the place of experts and gate; the largest change of a velocity."""
    before = check.answers(generator, decode=False)
    lora = gated.averaged(generator)
    gated.take_off(generator)
    put_lora(generator.backbone, lora)
    return check.answers(generator, decode=False).moved(before)


def _check_reloaded(to: str, difference: float, scale: float, allowed: float) -> None:
    if not difference <= allowed:
        raise ExportError(
            f"--to {to}: reloaded, its velocities differ from the policy's by up to {difference:.2g} "
            f"(allowed {allowed:.2g}, velocities up to {scale:.2g}); nothing was kept"
        )


def sentence(found: Mapping[str, Any]) -> str:
    """Result of the comparison of :func:`export`, for people."""
    share = found["share"]
    said = (
        f"training changed them by up to {found['effect']:.2g}, of which this is {share:.1%}"
        if share is not None
        else "training changed none of them"
    )
    return (
        f"read back and compared: velocities differ by at most {found['moved']:.2g} "
        f"(they reach {found['velocity']:.2g}; {said})"
    )


def _remedy(job: Job) -> str:
    other = "merged with --dtype float32, or a LoRA with --to diffusers" if job.to == "merged" else "--dtype float32"
    return f"Use {other}: a LoRA keeps small changes apart from large weights"


def _job(trained: Trained, to: str, dtype: str | None, average: bool) -> Job:
    """Check the arguments; raises ExportError."""
    if to not in FORMATS:
        raise ExportError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    config = load_config(trained.run / "config.yaml", [f"generator.dtype={dtype}"] if dtype and to == "merged" else [])
    if to != "merged" and config.policy.kind == "full":
        raise ExportError(f"--to {to}: {trained.run} trained all weights, there is no LoRA; use --to merged")
    if config.policy.kind == "users":
        raise ExportError(
            f"--to {to}: {trained.run} trained attention to users, which neither a LoRA nor a pipeline can hold; "
            "`alignflow sample` and `search` read the run itself"
        )
    if average and config.policy.kind != "gate":
        raise ExportError(f"--average belongs to experts with a gate; {trained.run} trained another policy")
    if config.policy.kind == "gate" and not average:
        raise ExportError(
            f"--to {to}: the gate of {trained.run} depends on time, and neither a LoRA nor merged weights can. "
            "--average exports the experts with their mean shares; `alignflow sample` and `search` read the run itself"
        )
    return Job(trained, config, to, dtype or (config.generator.dtype if to == "merged" else "float32"))


def _write_and_reload(job: Job, generator: Generator, staging: Path) -> check.Answers:
    """Write into ``staging``, then answer from a fresh generator that read it; ``generator`` is used up."""
    if job.to == "merged":
        digests = _write_pipeline(job, generator, staging)
        _free(generator)
        again = job.load(staging)
        if digests != _fingerprints(again):
            raise ExportError("--to merged: the pipeline does not read back as it was written; nothing was kept")
        return check.answers(again, decode=True)
    policy = check.trained_loras(generator)
    files = _write_loras(job, generator, policy, staging)
    network = type(generator.pipeline.transformer).__name__
    _free(generator)
    again = job.load()
    if job.to == "diffusers":
        check.read_lora(again, files, policy, job.tolerance)
        return check.answers(again, decode=False)
    layout, known = layouts.layout_of(network, job.to), again.backbones()
    networks = {component: lora for component, lora in policy.items() if component in known}
    if layout.converter is None:
        check.read_lora(again, files, networks, job.tolerance)
    else:
        check.read_weights(again, files, layout, networks, job.tolerance)
    text = {component: lora for component, lora in policy.items() if component not in known}
    check.read_encoders(again, files, text, job.tolerance)
    return check.answers(again, decode=False)


def _write_pipeline(job: Job, generator: Generator, staging: Path) -> dict[str, str]:
    """The pipeline with its trained networks; their digests."""
    if job.config.policy.kind != "full":
        check.merge(generator)
    generator.pipeline.save_pretrained(staging)
    return _fingerprints(generator)


def _fingerprints(generator: Generator) -> dict[str, str]:
    return {name: check.fingerprint(network) for name, network in generator.part_networks(PARTS).items()}


def _write_loras(job: Job, generator: Generator, policy: Mapping[str, Lora], staging: Path) -> dict[str, Path]:
    """The LoRA of every network in the file of its name; component -> its file."""
    files = {name: staging / file for name, file in job.names(list(policy)).items()}
    for file, (tensors, about) in _contents(job, generator, policy).items():
        dtype = DTYPES[job.dtype]
        whole = {name: value.to(torch.float32 if name.endswith("alpha") else dtype) for name, value in tensors.items()}
        ready = {name: value.contiguous() for name, value in whole.items()}
        tensor_files.save(staging / file, ready, {"format": "pt", **about})
    return files


def _contents(
    job: Job, generator: Generator, policy: Mapping[str, Lora]
) -> dict[str, tuple[Mapping[str, torch.Tensor], Mapping[str, str]]]:
    """File name -> its tensors and header."""
    if job.to == "diffusers":
        return dict(files_of(policy))
    network = type(generator.pipeline.transformer).__name__
    layout, names = layouts.layout_of(network, job.to), job.names(list(policy))
    text = sorted(set(policy) - set(generator.backbones()))
    if text and not (layout.text and {*text} <= PUBLISHED.keys()):
        raise ExportError(
            f"--to {job.to}: the run trained {' and '.join(text)} too, for which this layout of {network} has no "
            "names; use --to diffusers or merged, or train with recipe.trains=network"
        )
    found: dict[str, dict[str, torch.Tensor]] = {}
    networks = generator.backbones()
    for component, lora in policy.items():
        own = networks.get(component)
        tensors = (
            layouts.encoder(lora, component, layout, job.to) if own is None else _published(job, lora, own, layout)
        )
        found[names[component]] = found.get(names[component], {}) | tensors
    return {file: (tensors, {"modelspec.title": job.config.name}) for file, tensors in found.items()}


def _published(job: Job, lora: Lora, network: nn.Module, layout: layouts.Layout) -> dict[str, torch.Tensor]:
    """Tensors of a network's LoRA in the published names."""
    shapes = linear_layers(network)
    rows = {name: shape[0] for name, shape in shapes.items()}
    layouts.check_sizes(lora, rows, type(network).__name__, job.to)
    lora = layouts.whole(lora, shapes, layout) if job.to == "kohya" and layout.whole else lora
    theirs = layouts.published(lora, rows, layout)
    return layouts.comfyui(theirs, layout) if job.to == "comfyui" else layouts.kohya(theirs)


def _free(generator: Generator) -> None:
    """Give the memory of a generator's networks back before another one is loaded."""
    for network in generator.modules().values():
        network.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
