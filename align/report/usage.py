"""Python code that loads a trained policy in plain diffusers and reproduces the run's samples. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import registry
from align.config.sampling import LEVELS
from alignflow.worlds.shapes import WORLDS

Tree = Mapping[str, Any]
"""A resolved config as it is parsed from ``config.yaml``."""

EULER = "FlowMatchEulerDiscreteScheduler"
SOLVERS = {"ode": EULER, "dpm2": "DPMSolverMultistepScheduler"}
"""Our deterministic sampler -> the scheduler of diffusers that takes the same steps."""
TRUE_CFG = ("flux", "flux_kontext", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "hunyuan_video")
"""Adapters whose pipelines call classifier-free guidance ``true_cfg_scale`` and guide only with a negative prompt."""
EMBEDDED_ONLY = ("flux2", "flux2_edit", "flux_fill", "sana_sprint")
"""Adapters whose pipelines have no classifier-free guidance: ``guidance_scale`` is an input of the network."""
GUIDED_FROM_ZERO = ("z_image",)
"""Adapters whose pipelines add ``guidance_scale`` times the difference: 0 is our 1."""
MERGED = '"."'
"""A merged pipeline is loaded from the folder that its card is in."""
OPTIONAL = {"sd3": ("text_encoder_3", "tokenizer_3")}
"""Adapter -> components whose absence must be stated to diffusers."""
GUIDER = ("hunyuan_video15",)
"""Adapters whose pipelines take their guidance from a component."""


@dataclass(frozen=True)
class Shot:
    """One sample of a run.

    Args:
        prompt: its text.
        noise: seed of its initial noise.
        file: where its image lies.
        source: where the image that it was made from lies; None if it was made from none.
    """

    prompt: str
    noise: int
    file: str
    source: str | None = None


@dataclass(frozen=True)
class Weights:
    """Location of the trained weights, as named in code.

    Args:
        folder: holds the LoRA, or the networks.
        second: file name of a second expert's LoRA.
        networks: names of whole networks in the folder, ``transformer``, where all weights were trained.
    """

    folder: str
    second: str | None = None
    networks: Sequence[str] = ()


def code(config: Tree, weights: Weights | None, shot: Shot | None, video: bool = False) -> str:
    """Lines that generate one sample; ``weights`` is None for a pipeline that holds them already."""
    generator = _part(config, "generator")
    embedded = weights is not None and generator.get("path") in WORLDS
    names = ["AutoModel", "DiffusionPipeline"] if weights and weights.networks else ["DiffusionPipeline"]
    media = registry.inputs(str(generator.get("kind")))
    head = [
        "import torch",
        f"from diffusers import {', '.join(names)}",
        *(["from diffusers.utils import load_image"] if media else []),
        *(["", "from alignflow.worlds.shapes import weights"] if embedded else []),
    ]
    result, field = ("video", "frames") if video else ("image", "images")
    given = [f"prompt={_quoted(shot.prompt if shot else 'a prompt')}"]
    files = {"image": shot.source} if shot and shot.source else {}
    given += [f"{name}=load_image({_quoted(files.get(name) or f'{name}.png')})" for name in media]
    given += [f"{name}={value!r}" for name, value in arguments(config).items()]
    if shot:
        given.append(f"generator=torch.Generator().manual_seed({shot.noise})")
    call = [f"{result} = pipeline(", *(f"    {one}," for one in given), f").{field}[0]"]
    if shot:
        call.append(f"# {shot.file}")
    return "\n".join([*head, "", *_loads(config, weights, embedded), *call])


def _loads(config: Tree, weights: Weights | None, embedded: bool) -> list[str]:
    generator = _part(config, "generator")
    base = f"weights({_quoted(generator.get('kind'))})" if embedded else _quoted(generator.get("path") or "BASE MODEL")
    dtype = generator.get("dtype") or "float32"
    kept = "".join(f", {name}=None" for name in _left_out(generator))
    typed = "" if dtype == "float32" else f", torch_dtype=torch.{dtype}"
    kept += typed
    if weights is None:
        lines = [f"pipeline = DiffusionPipeline.from_pretrained({MERGED}{kept})"]
    elif weights.networks:
        lines = [
            f"{name} = AutoModel.from_pretrained({_quoted(weights.folder)}, subfolder={_quoted(name)}{typed})"
            for name in weights.networks
        ]
        trained = "".join(f", {name}={name}" for name in weights.networks)
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({base}{trained}{kept})")
    else:
        lines = [f"pipeline = DiffusionPipeline.from_pretrained({base}{kept})"]
        lines.append(f"pipeline.load_lora_weights({_quoted(weights.folder)})")
        if weights.second:
            second = f"weight_name={_quoted(weights.second)}, load_into_transformer_2=True"
            lines.append(f"pipeline.load_lora_weights({_quoted(weights.folder)}, {second})")
    if generator.get("kind") in GUIDER:
        lines.append(f"pipeline.guider = pipeline.guider.new(guidance_scale={_guidance(config)!r})")
    if generator.get("device") != "cpu":
        lines.append('pipeline.to("cuda" if torch.cuda.is_available() else "cpu")')
    return lines


def arguments(config: Tree) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call, as for the run's held-out samples."""
    generator, kind = _part(config, "generator"), str(_part(config, "generator").get("kind"))
    height, width = generator.get("size") or (None, None)
    given: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": generator.get("frames"),
        "max_sequence_length": generator.get("text_length"),
        "frame_rate": generator.get("fps"),
        "num_inference_steps": sampler_of(config).get("steps"),
        **_guided(config, kind),
        "guidance_rescale": generator.get("guidance_rescale") if kind not in GUIDER else None,
    }
    if kind.startswith("sana"):
        given["use_resolution_binning"] = False
    if kind == "flux_kontext" and height and width:
        given |= {"max_area": height * width, "_auto_resize": False}
    kept = {name: value for name, value in given.items() if value is not None}
    if kept.get("guidance_rescale") == 0:
        del kept["guidance_rescale"]
    if kind == "sana_sprint" and kept.get("num_inference_steps") != 2:
        kept["intermediate_timesteps"] = None
    return kept


def _guided(config: Tree, kind: str) -> dict[str, Any]:
    generator, guidance = _part(config, "generator"), _guidance(config)
    embedded = generator.get("embedded_guidance")
    negative = str(generator.get("negative_prompt") or "")
    if kind in GUIDER or guidance is None:
        return {"negative_prompt": negative or None}
    if kind in EMBEDDED_ONLY:
        return {"guidance_scale": embedded}
    if kind in TRUE_CFG:
        if guidance == 1:
            return {"guidance_scale": embedded, **({"true_cfg_scale": 1.0} if kind.startswith("qwen") else {})}
        # these pipelines guide only where a negative prompt is given, an empty one included
        return {"guidance_scale": embedded, "true_cfg_scale": guidance, "negative_prompt": negative}
    scale = guidance - 1 if kind in GUIDED_FROM_ZERO else guidance
    return {"guidance_scale": float(scale), "negative_prompt": negative if negative and guidance != 1 else None}


def differences(config: Tree, scheduler: str | None) -> list[str]:
    """Reasons why the code's images differ from the run's, a sentence each; empty if they are equal up to rounding.

    Args:
        scheduler: class of the pipeline's own scheduler, None if it is not known.
    """
    generator, kind = _part(config, "generator"), str(sampler_of(config).get("kind") or "ode")
    found = []
    if LEVELS.get(kind) is not None:
        diffusers = "diffusers has no such steps."
        if kind == "cps" and sampler_of(config).get("noise_level") == 1:  # the predicted sample is re-noised
            diffusers = "FlowMatchEulerDiscreteScheduler does so with stochastic_sampling=True, with other noise."
        found.append(f"The run generated its samples with {kind}, which adds noise at every step; {diffusers}")
    elif generator.get("kind") == "sana_sprint":
        if (sampler_of(config).get("steps") or 0) > 1:
            found.append("This pipeline adds fresh noise between its steps; the run took plain steps of the flow.")
    elif scheduler and scheduler != SOLVERS.get(kind, scheduler):
        found.append(f"The run generated its samples with {kind} steps, and this pipeline's scheduler is {scheduler}.")
    elif scheduler is None and kind != "ode":
        found.append(
            f"The run generated its samples with {kind} steps; the pipeline uses the scheduler of its own folder."
        )
    if (_guidance(config) or 1.0) < 1:
        found.append("diffusers applies no guidance below 1.")
    if generator.get("kind") == "generic" or ":" in str(generator.get("kind")):
        found.append(
            "This adapter may pass more to the pipeline than size, steps and guidance, which the code above leaves out."
        )
    if generator.get("kind") == "cogvideox":
        found.append("This pipeline orders its noise by frames first, so equal seeds give different noise.")
    if "mask" in registry.inputs(str(generator.get("kind"))):
        found.append("Image and mask are those of the prompt's row in its file; the run does not keep the mask.")
    if generator.get("dtype") not in (None, "float32") or _part(config, "memory").get("quantise") not in (None, "none"):
        found.append("Rounding differs: the run computed in less than float32.")
    return found


def scheduler_of(path: Any, kind: Any = None) -> str | None:
    """Class of the scheduler of a pipeline's folder, or of a hub id that was downloaded; None if it is not known."""
    try:
        text = model_file(path, "scheduler/scheduler_config.json", kind).read_text(encoding="utf-8")
        return str(json.loads(text)["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def model_file(path: Any, name: str, kind: Any = None) -> Path:
    """Location of a base model's file on this machine, existing or not: in a folder, a world or the hub's cache."""
    if path in WORLDS:
        import alignflow.worlds.shapes

        folder = Path(alignflow.worlds.shapes.__file__).parent / "weights" / str(kind)
    else:
        folder = Path(str(path))
    if not (folder / name).is_file() and str(path).count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(str(path), name)
        return Path(found) if isinstance(found, str) else folder / name
    return folder / name


def _left_out(generator: Tree) -> list[str]:
    """Components that an adapter does not need and the pipeline's folder does not name."""
    index = Path(str(generator.get("path"))) / "model_index.json"
    try:
        named = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [name for name in OPTIONAL.get(str(generator.get("kind")), ()) if not any(named.get(name) or ())]


def sampler_of(config: Tree) -> Tree:
    """Settings of the sampler of held-out samples."""
    return _part(_part(config, "evaluate"), "sampler")


def _guidance(config: Tree) -> float | None:
    value = sampler_of(config).get("guidance")
    return None if value is None else float(value)


def _part(config: Tree, name: str) -> Tree:
    value = config.get(name)
    return value if isinstance(value, Mapping) else {}


def _quoted(text: Any) -> str:
    return json.dumps(str(text), ensure_ascii=False)
