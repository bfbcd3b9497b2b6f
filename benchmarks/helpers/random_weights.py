"""Pipelines and a reward of the published shapes with random weights, for measurements without a download.

Text encoders are left out: a prompt's embeddings are random numbers of the shape and dtype that the network reads.
``smaller`` gives the same classes a few narrow layers, for tests on a CPU.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import diffusers
import torch
from pydantic import Field
from torch import Tensor, nn

from align.checking.architectures import KNOWN, Part
from generators.base import Generator
from generators.load import DTYPES, adapter
from generators.settings import Options
from rewards.base import Reward, RewardSettings

SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd3": {"shift": 3.0},
    "flux": {"shift": 3.0, "use_dynamic_shifting": True},
    "qwen_image": {"shift": 1.0, "use_dynamic_shifting": True},
    "wan": {"shift": 3.0},
}
"""Adapter -> arguments of its flow-matching scheduler. Those that read a pipeline's size choose the times alone."""

SCALE = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
"""Scaling of SD3's latents, without which its pipeline and FLUX's do not decode."""

_HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
SMALLER: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        **_HEADS, "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "dual_attention_layers": [0], "sample_size": 8, "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        **_HEADS, "num_single_layers": 1, "joint_attention_dim": 32, "pooled_projection_dim": 32,
        "axes_dims_rope": [4, 4, 8],
    },
    "QwenImageTransformer2DModel": {**_HEADS, "joint_attention_dim": 32, "axes_dims_rope": [8, 4, 4]},
    "WanTransformer3DModel": {**_HEADS, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32},
    "AutoencoderKL": {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4},
    "AutoencoderKLWan": {"base_dim": 4, "num_res_blocks": 1},
    "AutoencoderKLQwenImage": {"base_dim": 4, "num_res_blocks": 1},
}  # fmt: skip
"""Class -> arguments that make it a test's size."""


def smaller(path: str) -> str:
    """A name in :data:`~align.checking.architectures.KNOWN` for the networks of ``path`` at a test's size."""
    name = f"smaller/{path.rpartition('/')[2]}"
    parts = {key: part for key, part in KNOWN[path].items() if part.name in SMALLER}
    KNOWN[name] = {key: replace(part, config={**part.config, **SMALLER[part.name]}) for key, part in parts.items()}
    return name


def network(part: Part, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A network with the random weights that its class begins with, made on ``device`` in ``dtype``.

    Modules that ``from_pretrained`` keeps in float32 are float32 here too.
    """
    cls, before = getattr(diffusers, part.name), torch.get_default_dtype()
    values = {key: value for key, value in part.config.items() if not key.startswith("_")}
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            found: nn.Module = cls.from_config(values)
    finally:
        torch.set_default_dtype(before)
    stored = found.state_dict(keep_vars=True)
    for name, value in found.named_buffers():
        if name in stored and value.is_floating_point():  # as from_pretrained does; classes make tables in float32
            value.data = value.data.to(dtype)
    kept = getattr(cls, "_keep_in_fp32_modules", None) or []
    for name, value in found.named_parameters():
        if any(word in name.split(".") for word in kept):
            value.data = value.data.float()
    return found.eval().requires_grad_(False)


def pipeline(kind: str, path: str, dtype: str, device: torch.device | str) -> Any:
    """The diffusers pipeline of an adapter with random networks of ``KNOWN[path]``, and no text encoder."""
    cls = getattr(diffusers, adapter(kind).pipeline_class)
    parts = {name: part for name, part in KNOWN[path].items() if part.library == "diffusers"}
    if parts["vae"].name == "AutoencoderKL":
        parts["vae"] = replace(parts["vae"], config={**parts["vae"].config, **SCALE})
    networks = {name: network(part, device, DTYPES[dtype]) for name, part in parts.items()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind])
    needed = [name for name, one in inspect.signature(cls).parameters.items() if one.default is one.empty]
    absent = dict.fromkeys(name for name in needed if name not in networks and name != "scheduler")
    found = cls(**networks, **absent, scheduler=scheduler)
    found.set_progress_bar_config(disable=True)
    return found


def generator(
    kind: str, path: str, *, dtype: str, options: Options, device: torch.device | str = "cpu", **_: Any
) -> Generator:
    """The result of ``generators.load.load``, from random weights; memory settings other than the dtype are ignored."""
    cls = adapter(kind)
    parts = pipeline(kind, path, dtype, device)
    text = {"encode_text": lambda self, prompts, inputs: embeddings(kind, self.pipeline, prompts, options.text_length)}
    found = type(f"Random{cls.__name__}", (cls,), text)(parts, options)
    if kind == "sd3":
        found.has_t5 = True  # its tokens are among the random embeddings
    return found


def embeddings(kind: str, pipeline: Any, prompts: Sequence[str], length: int | None) -> dict[str, Tensor]:
    """Random text conditioning of B prompts in the shapes of an adapter's ``encode_text``.

    Args:
        length: tokens of the longest text encoder; None = 512, of SD3 256.
    """
    settings, first = pipeline.transformer.config, next(pipeline.transformer.parameters())
    width = settings.get("joint_attention_dim") or settings["text_dim"]
    tokens = (length or (256 if kind == "sd3" else 512)) + (77 if kind == "sd3" else 0)

    def rows(*shape: int) -> Tensor:
        sources = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in prompts]
        drawn = torch.stack([torch.randn(shape, generator=source) for source in sources])
        return drawn.to(first.device, pipeline.transformer.dtype)

    found = {"embeds": rows(tokens, width)}
    if "pooled_projection_dim" in settings:
        found["pooled"] = rows(settings["pooled_projection_dim"])
    if kind == "qwen_image":
        found["mask"] = torch.ones(len(prompts), tokens, dtype=torch.bool, device=first.device)
    return found


def call(kind: str, pipeline: Any, prompts: Sequence[str], options: Options, guidance: float) -> dict[str, Any]:
    """Arguments of the pipeline's own call for the same random embeddings."""
    texts = {"": prompts, "negative_": [options.negative_prompt] * len(prompts)} if guidance != 1 else {"": prompts}
    names = {"embeds": "prompt_embeds", "pooled": "pooled_prompt_embeds", "mask": "prompt_embeds_mask"}
    found: dict[str, Any] = {"height": options.size[0], "width": options.size[1]} if options.size else {}
    for sign, some in texts.items():
        for name, value in embeddings(kind, pipeline, some, options.text_length).items():
            found[f"{sign}{names[name]}"] = value
    if kind == "wan":
        found["num_frames"] = options.frames
    if kind in ("sd3", "wan"):
        return {**found, "guidance_scale": guidance}
    scale = 3.5 if options.embedded_guidance is None else options.embedded_guidance
    return {**found, "true_cfg_scale": guidance, **({"guidance_scale": scale} if kind == "flux" else {})}


# -- the reward -------------------------------------------------------------------------------------------------------


class RandomClip(RewardSettings):
    """A CLIP of PickScore's shape with random weights; its scores mean nothing and cost what PickScore's cost"""

    kind: Literal["random_clip"] = Field("random_clip", description="CLIP ViT-H/14 with random weights")
    tiny: bool = Field(False, description="a test's size instead")
    chunk: int = Field(32, ge=1, description="images per network call")

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Make the network in bfloat16 on ``device``; a video's score is the mean over its frames."""
        from transformers import CLIPConfig, CLIPModel

        with torch.device(device):
            model = CLIPModel(CLIPConfig(**clip_settings(self.tiny))).to(torch.bfloat16).eval().requires_grad_(False)
        score = _scoring(model, self.chunk)
        return Reward("random_clip", score, range=(-1.0, 1.0), differentiable=False)


def clip_settings(tiny: bool) -> dict[str, Any]:
    """Settings of a ``CLIPModel``: laion's ViT-H/14, which PickScore was trained from, or two narrow layers."""
    text, vision = (32, 2, 2) if tiny else (1024, 24, 16), (32, 2, 2) if tiny else (1280, 32, 16)

    def tower(sizes: tuple[int, int, int]) -> dict[str, int]:
        width, layers, heads = sizes
        inner = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": 32 if tiny else 1024}
        return {**inner, "num_hidden_layers": layers, "num_attention_heads": heads}

    return {
        "projection_dim": 32 if tiny else 1024,
        "text_config": tower(text),
        "vision_config": {**tower(vision), "image_size": 224, "patch_size": 56 if tiny else 14},
    }


def _scoring(model: Any, chunk: int) -> Callable[..., Tensor]:
    @torch.no_grad()
    def score(media: Tensor, prompts: list[str], group: Tensor | None) -> Tensor:
        first = next(model.parameters())
        ids = torch.full((len(prompts), 77), 1, device=first.device)
        text = nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
        frames = media.unsqueeze(1) if media.ndim == 4 else media
        images = nn.functional.interpolate(frames.flatten(0, 1).float(), (224, 224), mode="bilinear", antialias=True)
        parts = [model.get_image_features(some.to(first.dtype)).pooler_output for some in images.split(chunk)]
        found = nn.functional.normalize(torch.cat(parts), dim=-1).unflatten(0, frames.shape[:2])
        return (found * text.unsqueeze(1)).sum(-1).mean(1).float()

    return score


def reward(tiny: bool) -> Mapping[str, Any]:
    """Settings of :class:`RandomClip` for a config."""
    return {"kind": "benchmarks.helpers.random_weights:RandomClip", "options": {"tiny": tiny}}
