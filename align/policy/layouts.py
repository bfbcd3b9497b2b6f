"""Published LoRA layouts of each model family: key names, and layers that are fused there but separate in diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from align.policy.layers import CLIP, Lora
from alignflow.errors import AlignflowError
from alignflow.files.lora_encoders import PUBLISHED

FORMATS = ("diffusers", "comfyui", "kohya", "merged")


class ExportError(AlignflowError, ValueError):
    """A policy that cannot be written as asked, or a file that does not read back as what was trained."""

    exit_code = 2


@dataclass(frozen=True)
class Blocks:
    """A list of blocks: diffusers' name of it, the published one, and which of our layers are in each of theirs.

    Several of ours in one of theirs are one fused weight, stacked along its outputs. Without layers, names are alike.

    Args:
        most: blocks that diffusers' reader goes through; None = all of them.
        fixed: published layer -> outputs of its first part, with which alone diffusers' reader can divide it.
    """

    ours: str
    theirs: str
    layers: Mapping[str, tuple[str, ...]] | None = None
    most: int | None = None
    fixed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A family's published layout.

    Args:
        formats: what of ``comfyui`` and ``kohya`` diffusers can read back, so that it can be checked.
        parts: what a ``comfyui`` file calls A and B.
        converter: diffusers' reader of published *weights* that is used if its LoRA reader cannot read such a file.
        whole: the reader of ``kohya`` files wants every layer of every block.
        text: whether LoRAs of its CLIP text encoders have published names in these formats, see
            :mod:`alignflow.files.lora_encoders`.
    """

    blocks: tuple[Blocks, ...]
    formats: tuple[str, ...] = ("comfyui", "kohya")
    parts: tuple[str, str] = ("lora_A", "lora_B")
    converter: str | None = None
    whole: bool = False
    text: bool = False


def _qkv(prefix: str = "to_", suffix: str = "") -> tuple[str, ...]:
    return tuple(f"attn.{prefix}{name}{suffix}" for name in "qkv")


def _double(qkv: str, proj: str) -> dict[str, tuple[str, ...]]:
    """Attention of blocks with a stream of tokens for the image and one for the text."""
    return {
        f"img_{qkv}": _qkv(),
        f"img_{proj}": ("attn.to_out.0",),
        f"txt_{qkv}": _qkv("add_", "_proj"),
        f"txt_{proj}": ("attn.to_add_out",),
    }


def _named(**layers: str) -> dict[str, tuple[str, ...]]:
    """One of ours in each of theirs; ``__`` stands for a dot."""
    return {theirs.replace("__", "."): (ours,) for theirs, ours in layers.items()}


FLUX = Layout(
    (
        Blocks(
            "transformer_blocks",
            "double_blocks",
            {
                **_double("attn.qkv", "attn.proj"),
                **_named(img_mlp__0="ff.net.0.proj", img_mlp__2="ff.net.2", img_mod__lin="norm1.linear"),
                **_named(txt_mlp__0="ff_context.net.0.proj", txt_mlp__2="ff_context.net.2"),
                **_named(txt_mod__lin="norm1_context.linear"),
            },
            most=19,
        ),
        Blocks(
            "single_transformer_blocks",
            "single_blocks",
            {"linear1": (*_qkv(), "proj_mlp"), **_named(linear2="proj_out", modulation__lin="norm.linear")},
            most=38,
            fixed={"linear1": 3072},
        ),
    ),
    parts=("lora_down", "lora_up"),
    text=True,
)
FLUX2 = Layout(
    (
        Blocks(
            "transformer_blocks",
            "double_blocks",
            {
                **_double("attn.qkv", "attn.proj"),
                **_named(img_mlp__0="ff.linear_in", img_mlp__2="ff.linear_out"),
                **_named(txt_mlp__0="ff_context.linear_in", txt_mlp__2="ff_context.linear_out"),
            },
        ),
        Blocks(
            "single_transformer_blocks",
            "single_blocks",
            _named(linear1="attn.to_qkv_mlp_proj", linear2="attn.to_out"),
        ),
    )
)
SD3 = Layout(
    (
        Blocks(
            "transformer_blocks",
            "joint_blocks",
            {
                "x_block.attn.qkv": _qkv(),
                "x_block.attn2.qkv": tuple(name.replace("attn", "attn2") for name in _qkv()),
                "context_block.attn.qkv": _qkv("add_", "_proj"),
                **_named(x_block__attn__proj="attn.to_out.0", x_block__attn2__proj="attn2.to_out.0"),
                **_named(x_block__mlp__fc1="ff.net.0.proj", x_block__mlp__fc2="ff.net.2"),
                **_named(context_block__attn__proj="attn.to_add_out"),
                **_named(context_block__mlp__fc1="ff_context.net.0.proj", context_block__mlp__fc2="ff_context.net.2"),
            },
        ),
    ),
    converter="convert_sd3_transformer_checkpoint_to_diffusers",
    text=True,
)
HUNYUAN = Layout(
    (
        Blocks(
            "transformer_blocks",
            "double_blocks",
            {
                **_double("attn_qkv", "attn_proj"),
                **_named(img_mlp__fc1="ff.net.0.proj", img_mlp__fc2="ff.net.2"),
                **_named(txt_mlp__fc1="ff_context.net.0.proj", txt_mlp__fc2="ff_context.net.2"),
            },
        ),
        Blocks(
            "single_transformer_blocks",
            "single_blocks",
            {"linear1": (*_qkv(), "proj_mlp"), **_named(linear2="proj_out")},
            fixed={"linear1": 3072},
        ),
        Blocks(
            "context_embedder.token_refiner.refiner_blocks",
            "txt_in.individual_token_refiner.blocks",
            {"self_attn_qkv": _qkv(), **_named(self_attn_proj="attn.to_out.0")},
        ),
    ),
    formats=("comfyui",),
    converter="convert_hunyuan_video_transformer_to_diffusers",
)
WAN = Layout(
    (
        Blocks(
            "blocks",
            "blocks",
            {
                **{f"self_attn.{name}": (f"attn1.to_{name}",) for name in "qkv"},
                **{f"cross_attn.{name}": (f"attn2.to_{name}",) for name in "qkv"},
                **_named(self_attn__o="attn1.to_out.0", cross_attn__o="attn2.to_out.0"),
                **_named(cross_attn__k_img="attn2.add_k_proj", cross_attn__v_img="attn2.add_v_proj"),
                **_named(ffn__0="ffn.net.0.proj", ffn__2="ffn.net.2"),
            },
        ),
    ),
    whole=True,
)
LAYOUTS = {
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "SD3Transformer2DModel": SD3,
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "WanTransformer3DModel": WAN,
    "LTXVideoTransformer3DModel": Layout((Blocks("transformer_blocks", "transformer_blocks"),), formats=("comfyui",)),
    "QwenImageTransformer2DModel": Layout((Blocks("transformer_blocks", "transformer_blocks"),)),
    "ZImageTransformer2DModel": Layout(
        tuple(Blocks(name, name) for name in ("layers", "noise_refiner", "context_refiner"))
    ),
}


def layout_of(network: str, to: str) -> Layout:
    """The layout of a network class for ``comfyui`` or ``kohya``.

    Raises:
        ExportError: no published layout is known for it, or none that could be checked.
    """
    layout = LAYOUTS.get(network)
    if layout is not None and to in layout.formats:
        return layout
    other = [name for name in FORMATS if name in ("diffusers", "merged") or (layout and name in layout.formats)]
    reason = "diffusers reads no such file of it" if layout else "no such layout of it is known"
    raise ExportError(f"--to {to}: {reason} ({network}), so it could not be checked; there are {', '.join(other)}")


def check_sizes(lora: Lora, rows: Mapping[str, int], network: str, to: str) -> None:
    """Refuse a LoRA that diffusers' reader would divide wrongly, because it only knows the published model's sizes.

    Args:
        lora: by diffusers' names.
        rows: outputs of every linear layer of the network, by diffusers' names.

    Raises:
        ExportError: names the first layer, the size it has and the one that diffusers knows.
    """
    for blocks in layout_of(network, to).blocks:
        for name in lora:
            found = re.fullmatch(rf"{re.escape(blocks.ours)}\.(\d+)\.(.+)", name)
            if found is None:
                continue
            if blocks.most is not None and int(found[1]) >= blocks.most:
                _refuse(name, f"block {found[1]} of {blocks.ours}", f"{blocks.most} of them", network, to)
            for theirs, width in blocks.fixed.items():
                ours = (blocks.layers or {})[theirs]
                own = rows[f"{blocks.ours}.{found[1]}.{ours[0]}"]
                if found[2] in ours and own != width:
                    _refuse(name, f"a width of {own}", f"the width {width} of the published model", network, to)


def _refuse(name: str, own: str, known: str, network: str, to: str) -> None:
    raise ExportError(
        f"--to {to}: diffusers' converter for {network}, which reads the file back to check it, only knows {known}, "
        f"and {name} has {own}; nothing was written. Use --to diffusers or merged, which have no such limit"
    )


def published(lora: Lora, rows: Mapping[str, int], layout: Layout) -> Lora:
    """A LoRA in the published names, fused where the published layers are.

    Args:
        lora: by diffusers' names.
        rows: outputs of every linear layer of the network, by diffusers' names.

    Raises:
        ExportError: a layer for which the layout has no name.
    """
    fused: dict[str, tuple[str, ...]] = {}
    unknown = []
    for name in lora:
        found = place(name, layout)
        if found is None:
            unknown.append(name)
        else:
            fused[found[0]] = found[1]
    if unknown:
        raise ExportError(
            f"{len(unknown)} trained layers have no name in this layout, first {', '.join(unknown[:3])}; "
            "use --to diffusers or merged, or train other policy.targets"
        )
    return {theirs: fuse([(rows[name], lora.get(name)) for name in ours]) for theirs, ours in fused.items()}


def fuse(parts: Sequence[tuple[int, tuple[Tensor, Tensor] | None]]) -> tuple[Tensor, Tensor]:
    """The LoRA of weights stacked along their outputs: A stacked, B block-diagonal, so ``B A`` is exactly theirs.

    Args:
        parts: (outputs, (A, B)) of each weight in order; None for one that was not trained.
    """
    present = [pair for _, pair in parts if pair is not None]
    if len(parts) == 1:
        return present[0]
    a = torch.cat([pair[0] for pair in present])
    b = a.new_zeros(sum(outputs for outputs, _ in parts), len(a))
    row = column = 0
    for outputs, pair in parts:
        if pair is not None:
            rank = pair[1].shape[1]
            b[row : row + outputs, column : column + rank] = pair[1]
            column += rank
        row += outputs
    return a, b


def place(name: str, layout: Layout) -> tuple[str, tuple[str, ...]] | None:
    """Published layer of one of ours, and all of ours that are in it."""
    for blocks in layout.blocks:
        found = re.fullmatch(rf"{re.escape(blocks.ours)}\.(\d+)\.(.+)", name)
        if found is None:
            continue
        if blocks.layers is None:
            return f"{blocks.theirs}.{found[1]}.{found[2]}", (name,)
        for theirs, ours in blocks.layers.items():
            if found[2] in ours:
                return f"{blocks.theirs}.{found[1]}.{theirs}", tuple(f"{blocks.ours}.{found[1]}.{o}" for o in ours)
    return None


def whole(lora: Lora, shapes: Mapping[str, tuple[int, int]], layout: Layout) -> Lora:
    """``lora`` with zeros of rank 1 for every layer of the layout's blocks that was not trained.

    Args:
        shapes: (outputs, inputs) of every linear layer of the network.
    """
    some = next(iter(lora.values()))[0]
    idle = {
        name: (some.new_zeros(1, columns), some.new_zeros(rows, 1))
        for name, (rows, columns) in shapes.items()
        if name not in lora and place(name, layout)
    }
    return {**lora, **idle}


def comfyui(lora: Lora, layout: Layout, start: str = "diffusion_model.") -> dict[str, Tensor]:
    """Tensors of a ComfyUI file; it has no alpha, which ComfyUI then takes to be the rank.

    Args:
        start: of every key.
    """
    first, second = layout.parts
    return {
        f"{start}{name}.{part}.weight": value
        for name, pair in lora.items()
        for part, value in zip((first, second), pair, strict=True)
    }


def kohya(lora: Lora, start: str = "lora_unet_") -> dict[str, Tensor]:
    """Tensors of a kohya file (sd-scripts, musubi-tuner): flat names, alpha equal to the rank.

    Args:
        start: of every key.
    """
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in lora.items():
        key = start + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        tensors[f"{key}.alpha"] = torch.tensor(float(len(a)), dtype=a.dtype)
    return tensors


def encoder(lora: Lora, component: str, layout: Layout, to: str) -> dict[str, Tensor]:
    """Tensors of a text encoder's LoRA in a ``comfyui`` or ``kohya`` file.

    Args:
        component: of the pipeline, a key of :data:`alignflow.files.lora_encoders.PUBLISHED`.
    """
    flat, dotted = PUBLISHED[component]
    named = {CLIP + name.removeprefix(CLIP): pair for name, pair in lora.items()}
    return comfyui(named, layout, dotted) if to == "comfyui" else kohya(named, flat)
