"""Settings of a pipeline and of how it is kept in memory: read from configs, used by the adapters. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from alignflow.settings import Settings

Side = Annotated[int, Field(ge=8, le=16_384, multiple_of=8)]
"""Pixels. Most pipelines need larger multiples than 8; they are checked with the pipeline."""


class Options(Settings):
    """Settings of a pipeline that a model may or may not have; an adapter lists those it ``accepts``."""

    renamed: ClassVar[dict[str, str]] = {"frame_rate": "fps"}
    size: tuple[Side, Side] | None = Field(None, description="[height, width] in pixels; null = the pipeline's default")
    frames: int | None = Field(None, ge=1, le=100_000, description="frames per video; null = the pipeline's default")
    text_length: int | None = Field(
        None, ge=1, description="maximum number of prompt tokens; null = the pipeline's default"
    )
    embedded_guidance: float | None = Field(
        None,
        ge=0,
        description="guidance scale passed as an input to a guidance-distilled network; null = the pipeline's default",
    )
    negative_prompt: str = Field("", description="negative prompt of classifier-free guidance")
    guidance_rescale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="guidance rescale: fraction of the added standard deviation that is removed again; 0 = off",
    )
    fps: int | None = Field(
        None, ge=1, description="frames per second passed to the network; null = the pipeline's default"
    )


class Memory(Settings):
    """Memory settings of a run, described in docs/memory.md. A preset name such as ``24gb`` may stand here instead."""

    cache_prompts: Literal["none", "memory", "disk"] = Field(
        "none",
        description="encode every prompt once, cache the text conditioning on the CPU (memory) or in the run "
        "folder (disk), and free the text encoders; none = encode at every rollout",
    )
    cache_latents: Literal["none", "memory", "disk"] = Field(
        "none",
        description="encode every stored image or video once and keep its latents on the CPU (memory) or in the run "
        "folder (disk); none = encode at every step that uses it",
    )
    offload: Literal["none", "model", "group"] = Field(
        "none",
        description="CPU offload of the text encoders: model = moved to the GPU whole | group = layer by layer; "
        "none = stay on the GPU",
    )
    swap_blocks: int = Field(
        0,
        ge=0,
        description="blocks of each trained network whose frozen weights stay in pinned CPU memory and are copied to "
        "the card when the block computes; LoRA with train.gradient_checkpointing only",
    )
    roles: Literal["device", "cpu"] = Field(
        "device",
        description="where copies of the trained weights are kept (behaviour, reference, ema, ...): device | cpu = "
        "pinned memory, from which a role is copied whenever it computes",
    )
    trajectories: Literal["device", "cpu"] = Field(
        "device",
        description="where the stochastic steps of a rollout are kept until the updates: device | cpu = pinned memory, "
        "from which each chunk of the loss copies its steps",
    )
    rewards: Literal["device", "cpu"] = Field(
        "device",
        description="where rewards compute: device | cpu, except a reward whose gradient is used; a reward of kind "
        "placed stays on its own device",
    )
    quantise: Literal["none", "nf4", "int8", "fp8"] = Field(
        "none", description="storage format of the frozen base weights under a LoRA; none = generator.dtype"
    )
    compute: Literal["dtype", "fp8"] = Field(
        "dtype",
        description="products of the frozen layers in the network's blocks, with quantise: fp8: dtype = dequantised "
        "weights, in train.precision or generator.dtype | fp8 = inputs are rounded to float8 e4m3 too",
    )
    attention: Literal[
        "auto", "native", "xformers", "flash", "flash3", "sage", "flash_hub", "flash3_hub", "flash4_hub", "sage_hub"
    ] = Field(
        "auto",
        description="attention backend of the trained network; those ending in _hub are compiled kernels that the "
        "package kernels downloads; sage works for sampling only, because it has no gradient",
    )
    compile: Literal["none", "blocks", "full"] = Field(
        "none",
        description="torch.compile of the trained network: blocks = each repeated block, with the same graph in "
        "rollouts and updates | full = as a whole",
    )
    vae_tiling: bool = Field(
        False, description="encode and decode large images tile by tile; tiles are blended, so results differ slightly"
    )
    vae_slicing: bool = Field(False, description="encode and decode images one at a time")
