"""LoRA files as pairs in any of the usual layouts: every A has its B, of equal rank, finite. No torch at import.

``W + scale * B A`` with A ``[rank, inputs]`` and B ``[outputs, rank]``. The scale is ``alpha / rank``, where alpha is a
tensor beside the pair, in the file's header (diffusers), in ``adapter_config.json`` beside the file (peft), or absent,
which every reader takes for alpha = rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignflow.errors import AlignflowError
from alignflow.files import tensor_files
from alignflow.files.lora_encoders import encoder_of
from alignflow.files.tensor_files import Entry, TensorFileError
from alignflow.files.weights import first, is_finite
from alignflow.paths import exists, is_dir, is_file
from alignflow.text import printable
from alignflow.words import count

FILE = "pytorch_lora_weights.safetensors"
"""Name of the file that diffusers reads by default."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
PEFT = "base_model.model."
ABOUT = "lora_adapter_metadata"

_HALF = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.([^.]+))?\.weight")
_BESIDE = re.compile(
    r"(.+?)\.(alpha|dora_scale|lora_magnitude_vector|magnitude_vector|w_norm|b_norm|diff|diff_b|lora_mid|hada_\w+|lokr_\w+|"
    r"oft_\w+|lora_[AB]\.(?:[^.]+\.)?bias)(?:\..*)?"
)
_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+\$?")
_OTHERS = {
    "dora_scale": "DoRA (a magnitude vector beside each pair)",
    "lora_magnitude_vector": "DoRA (a magnitude vector beside each pair)",
    "magnitude_vector": "DoRA (a magnitude vector beside each pair)",
    "w_norm": "changes of norms",
    "b_norm": "changes of norms",
    "diff": "differences of whole weights",
    "diff_b": "differences of biases",
    "lora_mid": "LoCon (Tucker)",
    "hada": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "lora_A": "LoRA with biases",
    "lora_B": "LoRA with biases",
}
"""Name of a tensor -> format that pairs of matrices cannot express."""

LAYOUTS = (
    (PEFT, "peft"),
    ("lora_unet_", "kohya"),
    ("lora_te", "kohya"),
    ("lora_transformer_", "kohya"),
    ("lycoris_", "kohya"),
    ("model.diffusion_model.", "ComfyUI"),
    ("diffusion_model.", "ComfyUI"),
    ("text_encoders.", "ComfyUI"),
    ("transformer.", "diffusers"),
    ("text_encoder", "diffusers"),
)
"""Start of the keys -> layout; the first that fits."""
READ = "layouts read here: diffusers, peft, kohya, ComfyUI"
ELSEWHERE = {
    "lora_te": "a text encoder",
    "text_encoders.": "a text encoder",
    "text_model": "a text encoder",
    "unet.": "a U-Net",
    "lora_unet_down_blocks": "a U-Net",
    "lora_unet_up_blocks": "a U-Net",
}


class LoraFileError(AlignflowError, ValueError):
    """A file that is not a whole LoRA; names the file and the pair."""


@dataclass
class Pair:
    """One layer's change: keys of A, B and alpha in the file."""

    a: str = ""
    b: str = ""
    alpha: str = ""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file whose pairs are whole.

    Args:
        layout: ``diffusers``, ``peft``, ``kohya``, ``ComfyUI`` or ``bare names``.
        pairs: name of the layer in the file -> keys.
        shapes: key -> shape.
        about: settings with ``r``, ``lora_alpha`` and so on; empty if there are none.
    """

    path: Path
    layout: str
    pairs: dict[str, Pair]
    shapes: dict[str, tuple[int, ...]]
    about: dict[str, Any] = field(default_factory=dict)

    def rank(self, stem: str) -> int:
        """Rank of one pair."""
        return self.shapes[self.pairs[stem].a][0]

    def of(self, encoder: str) -> LoraFile:
        """The pairs of one text encoder by its component name, as diffusers names it; of other networks for ""."""
        return replace(self, pairs={stem: pair for stem, pair in self.pairs.items() if encoder_of(stem) == encoder})

    @property
    def ranks(self) -> list[int]:
        """Ranks that occur, smallest first."""
        return sorted({self.rank(stem) for stem in self.pairs})


def file_of(component: str) -> str:
    """File name of one network's LoRA: ``FILE``, but a second expert's has its name in it."""
    return FILE.replace(".", f"_{component}.") if component.startswith("transformer_") else FILE


def encoders(path: Path) -> set[str]:
    """Component names of the text encoders that a file changes, and "" for other networks; raises as
    :func:`inspect`."""
    return {encoder_of(stem) for stem in inspect(path).pairs}


def other_parts(path: Path, parts: Collection[str]) -> str:
    """Why ``parts`` (network, text) cannot be trained on from a file, '' if they can; raises as :func:`inspect`."""
    return differing(path, {"text" if name else "network" for name in encoders(path)}, parts)


def differing(path: Path, held: Collection[str], parts: Collection[str]) -> str:
    """:func:`other_parts` of a file that changes the parts ``held``."""
    words = {"network": "the network", "text": "text encoders"}
    if set(held) == set(parts):
        return ""
    changed, trained = (" and ".join(words[part] for part in words if part in some) for some in (held, parts))
    return (
        f"{path} changes {changed}, and {trained} would be trained: train the same parts (recipe texforce trains text "
        "or both), or merge it by `alignflow export RUN --to merged` and train on that pipeline"
    )


def second(file: Path, component: str) -> Path:
    """File of another expert's LoRA beside the first one's, as named by diffusers or ComfyUI."""
    if "high_noise" in file.name:
        return file.with_name(file.name.replace("high_noise", "low_noise"))
    return file.with_name(file_of(component))


def find(path: Path) -> Path:
    """The LoRA file that a path stands for: itself, or the one in its folder.

    Raises:
        LoraFileError: there is none, or several that may be meant.
    """
    if is_file(path):
        return path
    found = sorted(path.glob("*.safetensors")) if is_dir(path) else []
    known = [file for file in found if file.name in (FILE, "adapter_model.safetensors")]
    first_experts = [file for file in found if second(file, "transformer_2") in found]
    for files in (known, first_experts, found):
        if len(files) == 1:
            return files[0]
    if found:
        raise LoraFileError(f"{path} holds {len(found)} files, {found[0].name} and others; name the file of the LoRA")
    if not exists(path):
        raise LoraFileError(f"no file or folder {printable(path)} (looked in {Path.cwd()})")
    raise LoraFileError(f"no LoRA at {path / FILE if is_dir(path) else path}")


def inspect(path: Path) -> LoraFile:
    """The pairs of a LoRA file by its header alone.

    Raises:
        LoraFileError: not a safetensors file, or not a whole LoRA; names the pair and the remedy.
    """
    try:
        entries, metadata = tensor_files.header(path)
    except TensorFileError as error:
        raise LoraFileError(f"{path} is not a whole safetensors file: {error}; copy or download it again") from None
    pairs = _pairs(path, entries)
    shapes = {key: entry.shape for key, entry in entries.items()}
    layout = layout_of(pairs)
    found = LoraFile(path, layout, pairs, shapes, _about(path, layout, metadata))
    _check(found, entries)
    return found


def layout_of(stems: Iterable[str]) -> str:
    """Name of the layout that most keys are written in."""
    votes: dict[str, int] = {}
    for stem in stems:
        name = next((name for start, name in LAYOUTS if stem.startswith(start)), "bare names")
        votes[name] = votes.get(name, 0) + 1
    return max(votes, key=lambda name: votes[name]) if votes else "bare names"


def _pairs(path: Path, entries: Mapping[str, Entry]) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    foreign: dict[str, list[str]] = {}
    unknown: list[str] = []
    twice: list[str] = []
    for key in entries:
        if found := _HALF.fullmatch(key):
            pair = pairs.setdefault(found[1], Pair())
            half = "a" if found[2] in ("lora_A", "lora_down", "lora.down") else "b"
            twice += [key] if getattr(pair, half) else []
            setattr(pair, half, key)
        elif (found := _BESIDE.fullmatch(key)) and found[2] == "alpha":
            pairs.setdefault(found[1], Pair()).alpha = key
        elif found:
            kind = found[2].split(".")[0]
            name = kind if kind in _OTHERS else kind.split("_")[0]
            foreign.setdefault(_OTHERS[name], []).append(key)
        else:
            unknown.append(key)
    for kind, keys in foreign.items():
        raise LoraFileError(
            f"{path} is not a plain LoRA: {kind}, {len(keys)} tensors, first {printable(keys[0])}; it has no "
            "equivalent pair of matrices. Merge it into the model with the tool that made it, and give the "
            "merged folder"
        )
    if twice:
        raise LoraFileError(f"{path} holds {len(twice)} halves twice, first {printable(twice[0])}; export it again")
    if unknown and not any(pair.a or pair.b for pair in pairs.values()):
        raise LoraFileError(f"{path} is not a LoRA: {len(unknown)} tensors, first {printable(first(unknown))}; {READ}")
    if unknown:
        raise LoraFileError(
            f"{path} holds {len(unknown)} tensors that are not part of a pair, first {printable(first(unknown))}; "
            f"reading the rest would leave them out; {READ}"
        )
    return pairs


def _check(found: LoraFile, entries: Mapping[str, Entry]) -> None:
    """Raise LoraFileError if a pair is not whole or does not fit together."""
    path, pairs = found.path, found.pairs
    if not pairs:
        raise LoraFileError(f"{path} is empty: it holds no pair of a LoRA")
    for half, other in (("A", "B"), ("B", "A")):
        if not any(getattr(pair, other.lower()) for pair in pairs.values()):
            raise LoraFileError(
                f"{path} holds only the {half} of its {count(len(pairs), 'pair')}, every {other} is missing; export it "
                "again"
            )
    wrong = [text for stem, pair in pairs.items() if (text := _problem(found, entries, stem, pair))]
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise LoraFileError(f"{path}: {len(wrong)} of {len(pairs)} pairs are damaged: {'; '.join(wrong[:2])}{more}")
    strange = [stem.removeprefix(PEFT) for stem in pairs if not encoder_of(stem)]
    inside = {what for stem in strange for start, what in ELSEWHERE.items() if stem.startswith(start)}
    if inside:
        raise LoraFileError(
            f"{path} changes {' and '.join(sorted(inside))}, which is not trained here; reading the rest would leave "
            "that out. Give a file of the transformer alone"
        )


def _problem(found: LoraFile, entries: Mapping[str, Entry], stem: str, pair: Pair) -> str:
    """Problem of one pair, '' if there is none."""
    name = printable(stem, 200)
    if not (pair.a and pair.b):
        lost = "A and B" if not (pair.a or pair.b) else "A (lora_A, lora_down)" if not pair.a else "B (lora_B, lora_up)"
        return f"{name} has no {lost}"
    a, b = entries[pair.a], entries[pair.b]
    for key, entry in ((pair.a, a), (pair.b, b), *(((pair.alpha, entries[pair.alpha]),) if pair.alpha else ())):
        if entry.dtype not in FLOATS and not (key == pair.alpha and entry.dtype.startswith("I")):
            return f"{name} is stored as {entry.dtype}, not as floating-point numbers"
    if pair.alpha and math.prod(entries[pair.alpha].shape) != 1:
        return f"{name}: alpha has the shape {list(entries[pair.alpha].shape)}, it is one number"
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"{name}: A {list(a.shape)}, B {list(b.shape)}; only linear layers, with matrices, are read"
    if 0 in (*a.shape, *b.shape):
        return f"{name} is empty: A {list(a.shape)}, B {list(b.shape)}"
    if a.shape[0] != b.shape[1]:
        return f"{name}: A {list(a.shape)} is of rank {a.shape[0]}, B {list(b.shape)} of rank {b.shape[1]}"
    said = _setting(found.about, "r", "rank_pattern", stem)
    if said is not None and said != a.shape[0]:
        return f"{name} is of rank {a.shape[0]}, the settings of the file say {printable(said, 40)}"
    return ""


# -- alpha ------------------------------------------------------------------------------------------------------------


def _about(path: Path, layout: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Settings of peft: from the header of diffusers, or the file beside peft's."""
    if ABOUT in metadata:
        said, where = metadata[ABOUT], f"{path}: {ABOUT} in its header"
    elif layout == "peft":
        beside, where = path.with_name("adapter_config.json"), f"{path.with_name('adapter_config.json')}"
        try:
            said = beside.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            raise LoraFileError(f"{path} is in the peft layout, whose alpha is in {where}, which is missing") from None
    else:
        return {}
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        raise LoraFileError(f"{where} is not JSON; export the LoRA again") from None
    if not isinstance(found, dict):
        raise LoraFileError(f"{where} holds a {type(found).__name__}, not an object of settings")
    about = {str(key).removeprefix("transformer."): value for key, value in found.items()}
    if about.get("use_dora"):
        raise LoraFileError(f"{path} is not a plain LoRA: {_OTHERS['dora_scale']}; merge it where it was made")
    for name, value in about.items():
        what = name.removeprefix(f"{encoder_of(name)}.")
        if what in ("rank_pattern", "alpha_pattern"):
            _check_patterns(where, name, value or {})
        if what in ("r", "lora_alpha") and value is not None and not _positive(value):
            raise LoraFileError(f"{where}: {name} is {printable(value, 60)}, it should be a positive number")
    return about


def _check_patterns(where: str, name: str, patterns: Any) -> None:
    if not isinstance(patterns, dict):
        raise LoraFileError(f"{where}: {name} is {printable(patterns, 60)}, not an object")
    for pattern in patterns:
        if not _NAME.fullmatch(pattern):  # any expression could take for ever to match
            raise LoraFileError(f"{where}: {name} holds {printable(pattern, 80)!r}; only names of layers are read")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _setting(about: Mapping[str, Any], name: str, pattern: str, stem: str) -> Any:
    """A setting of one layer, as peft finds it: by the first pattern that its name ends with."""
    layer = stem.removeprefix(PEFT).removeprefix("transformer.")
    start = f"{encoder}." if (encoder := encoder_of(stem)) else ""
    for key, value in (about.get(start + pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer.removeprefix(start)):
            return value
    return about.get(start + name)


def scale_of(found: LoraFile, stem: str, alpha: float | None) -> float:
    """``alpha / rank`` of one pair; ``alpha`` where a tensor beside the pair says it.

    Raises:
        LoraFileError: alpha is not a positive number.
    """
    rank = found.rank(stem)
    value: Any = _setting(found.about, "lora_alpha", "alpha_pattern", stem) if alpha is None else alpha
    if value is None:
        return 1.0
    if not _positive(value):
        raise LoraFileError(
            f"{found.path}: alpha of {printable(stem)} is {printable(value, 40)}, it should be positive"
        )
    return float(value) / (math.sqrt(rank) if found.about.get("use_rslora") else rank)


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensors(found: LoraFile, scaled: bool = True) -> dict[str, tuple[Any, Any]]:
    """Layer in the file -> (A ``[r, in]``, B ``[out, r]`` with the scale in it), float32 on the CPU. Imports torch.

    Args:
        scaled: False leaves the scale to the caller.

    Raises:
        LoraFileError: damaged, NaN or infinity in a pair, or an alpha that is not a positive number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(found.path)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise LoraFileError(f"{found.path} is not a whole safetensors file: {printable(error, 200)}") from None
    read, broken = {}, []
    for stem, pair in found.pairs.items():
        a, b = held[pair.a].float(), held[pair.b].float()
        scale = scale_of(found, stem, float(held[pair.alpha]) if pair.alpha else None)
        b = b * scale if scaled and scale != 1.0 else b
        broken += [stem] if not (is_finite(a) and is_finite(b)) else []
        read[stem] = (a.contiguous(), b.contiguous())
    if broken:
        raise LoraFileError(
            f"{found.path} holds NaN or infinity in {len(broken)} of {len(read)} pairs, first "
            f"{printable(broken[0])}; take another step of its training"
        )
    return read
