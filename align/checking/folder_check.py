"""Checks of a local pipeline folder and a LoRA file, without loading weights and without torch.

Loading checks what is expensive to check here: weights in .bin files and adapters outside the repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import registry
from alignflow.errors import Problem
from alignflow.files import lora_files, tensor_files
from alignflow.files.foreign_loras import foreign
from alignflow.files.lora_files import LoraFileError
from alignflow.files.policies import OTHERS, other_than_lora
from alignflow.files.tensor_files import TensorFileError
from alignflow.files.weights import first
from alignflow.paths import expanded, is_dir
from alignflow.worlds.shapes import pipelines
from generators.errors import GeneratorError
from generators.folder import check_parts, components, read_index, read_json, single_file

if TYPE_CHECKING:
    from align.config.model import GeneratorConfig
    from align.config.settings import Config

ANY = "DiffusionPipeline"
OWN_RULE = ("generic", "cogvideox", "sana_sprint")
"""Adapters that do not sample by the scheduler's noise levels."""
EULER = ("FlowMatchEulerDiscreteScheduler",)
ORDER_2 = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")


def _expanded(path: str) -> Path:
    try:
        return expanded(path)
    except ValueError:  # the check of paths reports it
        return Path(path)


def folder_of(generator: GeneratorConfig) -> Path | None:
    """The local folder of a generator; None if it is on the hub or does not exist."""
    folder = pipelines(generator.path).get(generator.kind) or _expanded(generator.path)
    return folder if is_dir(folder) else None


def folder_problems(generator: GeneratorConfig) -> list[Problem]:
    """Problems of a path: a single file, an incomplete pipeline, another class, a wrong size, a wrong scheduler."""
    if said := single_file(_expanded(generator.path)):
        return [Problem("generator.path", said)]
    folder = folder_of(generator)
    if folder is None:
        return []
    try:
        index = read_index(folder)
        wanted = registry.declared(generator.kind, "pipeline_class")
        if wanted not in (None, ANY, index["_class_name"]):
            fitting = [kind for kind in registry.generators() if _reads(kind, index["_class_name"])]
            use = f"use generator.kind {' or '.join(fitting)}" if fitting else "generator.kind generic may read it"
            said = f"{generator.kind} reads {wanted}, {folder} holds a {index['_class_name']}; {use}"
            return [Problem("generator.kind", said)]
        check_parts(folder, index)
        return [*_size_problems(generator.size, folder, index), *_scheduler_problems(generator, folder)]
    except GeneratorError as error:
        return [Problem("generator.path", str(error))]


def _reads(kind: str, name: str) -> bool:
    return registry.declared(kind, "pipeline_class") == name


# -- size -------------------------------------------------------------------------------------------------------------


def evaluation_problems(config: Config) -> list[Problem]:
    """Problems of the size of evaluation samples, where the pipeline is on this machine and whole."""
    folder = folder_of(config.generator)
    try:
        index = read_index(folder) if folder else None
    except GeneratorError:
        return []
    return [] if folder is None or index is None else _size_problems(config.evaluate.size, folder, index, "evaluate")


def _size_problems(
    size: tuple[int, int] | None, folder: Path, index: dict[str, Any], section: str = "generator"
) -> list[Problem]:
    unit = _unit(folder, index)
    if unit is None or size is None or not any(side % unit for side in size):
        return []
    near = [max(unit, round(side / unit) * unit) for side in size]
    said = f"{list(size)}: height and width must be multiples of {unit}; the nearest is {near}"
    return [Problem(f"{section}.size", said)]


def size_unit(generator: GeneratorConfig) -> int | None:
    """Divisor of height and width in pixels, as the pipeline's folder says; None if that is not known here."""
    folder = folder_of(generator)
    try:
        return _unit(folder, read_index(folder)) if folder is not None else None
    except GeneratorError:
        return None


def _unit(folder: Path, index: dict[str, Any]) -> int | None:
    """Divisor of height and width in pixels: the VAE's reduction times the network's patch size; None if unknown."""
    parts = components(index)
    if not {"vae", "transformer"} <= set(parts) or not all(
        (folder / p / "config.json").is_file() for p in ("vae", "transformer")
    ):
        return None
    vae, network = (read_json(folder / part / "config.json") for part in ("vae", "transformer"))
    reduction = {
        "AutoencoderKL": _halvings(vae.get("block_out_channels")),
        "AutoencoderKLFlux2": _halvings(vae.get("block_out_channels")),
        "AutoencoderKLQwenImage": _halvings(vae.get("temperal_downsample"), 0),
        "AutoencoderKLWan": vae.get("scale_factor_spatial") or _halvings(vae.get("temperal_downsample"), 0),
        "AutoencoderDC": _halvings(vae.get("encoder_block_out_channels")),
    }.get(parts["vae"][1])
    patch: Any = {
        "SD3Transformer2DModel": network.get("patch_size"),
        "SanaTransformer2DModel": network.get("patch_size"),
        "WanTransformer3DModel": network.get("patch_size"),
    }.get(parts["transformer"][1])
    if parts["transformer"][1] in ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"):
        patch = 2  # packed by the pipeline
    patch = patch[-1] if isinstance(patch, list) and patch else patch
    known = all(type(value) is int and 0 < value < 1000 for value in (reduction, patch))
    return reduction * patch if known else None


def _halvings(levels: Any, less: int = 1) -> int | None:
    return 2 ** (len(levels) - less) if isinstance(levels, list) and less < len(levels) < 10 else None


# -- scheduler --------------------------------------------------------------------------------------------------------


def _scheduler(folder: Path) -> dict[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}


def _is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler is one of flow matching, by its settings; loading compares its steps."""
    name = str(config.get("_class_name", ""))
    return name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))


def _scheduler_problems(generator: GeneratorConfig, folder: Path) -> list[Problem]:
    config = _scheduler(folder)
    if not config or generator.kind in OWN_RULE or ":" in generator.kind or _is_flow(config):
        return []
    name = config.get("_class_name")
    said = (
        f"{folder / 'scheduler'} holds a {name} that is not configured for a flow; use the scheduler/ "
        "published with the model"
    )
    return [Problem("generator.path", said)]


def scheduler_line(generator: GeneratorConfig) -> str:
    """Replacement of the folder's scheduler, in one line; '' if the steps are the same, or unknown."""
    folder = folder_of(generator)
    try:
        config = _scheduler(folder) if folder is not None and generator.kind not in OWN_RULE else {}
    except GeneratorError:
        return ""
    name = str(config.get("_class_name", ""))
    if not config or not _is_flow(config):
        return ""
    if config.get("stochastic_sampling") or "LCM" in name:
        return f"{name} adds fresh noise at every step; sampler {{kind: cps, noise_level: 1}} takes the same steps"
    if name in ORDER_2:
        return f"{name} is replaced by the steps of sampler.kind on the same grid; dpm2 is nearer to it than ode"
    return "" if name in EULER else f"{name} is replaced by Euler steps on the same grid"


# -- LoRA -------------------------------------------------------------------------------------------------------------


def lora_problems(path: str, setting: str, parts: Sequence[str] = (), policy: bool = False) -> list[Problem]:
    """Problems of the LoRA file in ``setting``, found in its header.

    Args:
        parts: that are trained from it on; () = none.
        policy: whether a trained policy other than a LoRA is accepted too.
    """
    place = _expanded(path)
    place = place / "lora" if (place / "lora").is_dir() else place
    if other := other_than_lora(place):
        return [] if policy else [Problem(setting, f"{other} holds {OTHERS[other.name]}, and a LoRA is needed")]
    try:
        file = lora_files.find(place)
        if foreign(file):
            return []  # diffusers' converters read it, or loading says what they leave out
        lora_files.inspect(file)
        wrong = lora_files.other_parts(file, parts) if parts else ""
    except LoraFileError as error:
        wrong = str(error)
    return [Problem(setting, wrong)] if wrong else []


def target_problems(
    generator: GeneratorConfig, targets: Sequence[str] | None, components: Sequence[str] = ("transformer",)
) -> list[Problem]:
    """A problem for targets of a LoRA that match no matrix in the files of these networks of the folder."""
    folder = folder_of(generator)
    if not targets or folder is None:
        return []
    try:
        names = {name for component in components for name in _matrices(folder / component)}
    except TensorFileError:
        return []  # loading reports it, with the file
    missing = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in names)]
    if not names or not missing:
        return []
    ends = sorted({".".join(name.split(".")[-2:]) for name in names})
    return [Problem("policy.targets", f"{first(missing)} match no linear layer; there are {first(ends, 30)}")]


def _matrices(folder: Path) -> Iterator[str]:
    """Names of the layers whose weight is a matrix, from the headers of safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        entries, _ = tensor_files.header(file)
        for key, entry in entries.items():
            if key.endswith(".weight") and len(entry.shape) == 2 and 0 not in entry.shape:
                yield key.removesuffix(".weight")
