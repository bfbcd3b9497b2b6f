"""Trains the world's editor (`FluxKontextPipeline`) and its inpainter (`FluxFillPipeline`).

Each has a transformer, a CLIP for the whole prompt and a T5 for its words, trained jointly by
flow matching. What is asked has one right result, so cells that change may count more in the loss than those that are
copied. The shipped editor is imperfect because half of its last instructions were wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from align.worlds import train_common
from align.worlds.tokenizer import clip_tokenizer, t5_tokenizer
from align.worlds.train_common import Batch, Log, Plan, TokenTable
from align.worlds.train_vae import LATENT_CHANNELS, decode, encode
from alignflow.worlds.shapes import edits
from alignflow.worlds.shapes.edits import Task
from alignflow.worlds.shapes.world import render
from generators.codec import pack, unpack

HEADS, HEAD_DIM, DOUBLE, SINGLE = 3, 32, 2, 4
TEXT_LENGTH = 12  # 'add a small orange triangle at the bottom right' has nine words; start and end make eleven
CLIP_WIDTH, T5_WIDTH = 48, 96
CHANGED_WEIGHT = 4.0  # loss weight of latent cells that differ from the source
PACKED = 4 * LATENT_CHANNELS  # channels of a token of 2 x 2 cells
MASK_CHANNELS = 4 * 64  # every mask pixel of a token of the inpainter
PIPELINES = {"shapes-edit": FluxKontextPipeline, "shapes-fill": FluxFillPipeline}


def text_encoders() -> dict[str, Any]:
    """Untrained CLIP and T5 with their tokenizers, by their names in the pipelines."""
    clip, t5 = clip_tokenizer(known=edits.words(), length=TEXT_LENGTH), t5_tokenizer(edits.words(), TEXT_LENGTH)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=CLIP_WIDTH, intermediate_size=4 * CLIP_WIDTH, projection_dim=CLIP_WIDTH,
        num_hidden_layers=2, num_attention_heads=CLIP_WIDTH // 16, max_position_embeddings=TEXT_LENGTH,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=T5_WIDTH, d_kv=16, d_ff=2 * T5_WIDTH, num_layers=2, num_heads=T5_WIDTH // 16,
        dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return {
        "tokenizer": clip, "text_encoder": CLIPTextModel(clip_config),
        "tokenizer_2": t5, "text_encoder_2": T5EncoderModel(t5_config),
    }  # fmt: skip


def new_transformer(world: str) -> FluxTransformer2DModel:
    """An untrained network; the inpainter's tokens carry the image around the hole and the mask besides."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=PACKED if world == "shapes-edit" else 2 * PACKED + MASK_CHANNELS,
        out_channels=PACKED,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def new_pipeline(world: str, vae: AutoencoderKL) -> Any:
    """An untrained pipeline of a world in PIPELINES around a trained `vae`."""
    return PIPELINES[world](
        transformer=new_transformer(world),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        **text_encoders(),
    )


def adopt(pipe: Any, editor: Any) -> None:
    """Gives an untrained pipeline the editor's weights, all but those that read its wider tokens."""
    kept = {k: v for k, v in editor.transformer.state_dict().items() if not k.startswith("x_embedder")}
    pipe.transformer.load_state_dict(kept, strict=False)
    pipe.text_encoder.load_state_dict(editor.text_encoder.state_dict())
    pipe.text_encoder_2.load_state_dict(editor.text_encoder_2.state_dict())


class Model(nn.Module):
    """The trained parts of a pipeline as one module: latents, times, conditions and token ids in, velocities out."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        self.editor = isinstance(pipe, FluxKontextPipeline)
        grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        where = [torch.cat([torch.full((16, 1), float(i)), grid], 1) for i in range(1 + self.editor)]
        self.register_buffer("positions", torch.cat(where), persistent=False)

    def forward(self, x: Tensor, t: Tensor, beside: Tensor, ids: Tensor, ids_2: Tensor) -> Tensor:
        """Velocity [n, 8, 8, 8] at noise level t [n] in [0, 1].

        Args:
            beside: the editor's source latents [n, 8, 8, 8]; of the inpainter the image around the hole and the
                mask, [n, 8 + 64, 8, 8].
        """
        if self.editor:
            tokens = torch.cat([pack(x), pack(beside)], 1)
        else:
            around, mask = beside[:, :LATENT_CHANNELS], beside[:, LATENT_CHANNELS:]
            tokens = torch.cat([pack(x), pack(around), pack(mask)], -1)
        out = self.transformer(
            hidden_states=tokens,
            timestep=t,
            encoder_hidden_states=self.t5(ids_2).last_hidden_state,
            pooled_projections=self.clip(ids).pooler_output,
            txt_ids=torch.zeros(ids_2.shape[1], 3),
            img_ids=self.positions,
            return_dict=False,
        )[0]
        return unpack(out[:, :16], 8, 8)


class Latents:
    """Latents of the scenes before and after every task; a scene that several tasks share is encoded once."""

    def __init__(self, vae: AutoencoderKL, tasks: list[Task]) -> None:
        sources = {id(task.source): task.source for task in tasks}
        order = {key: i for i, key in enumerate(sources)}
        self.row = np.array([order[id(task.source)] for task in tasks])
        self.sources = encode(vae, np.stack([render(scene) for scene in sources.values()]))
        self.targets = encode(vae, np.stack([render(task.target) for task in tasks]))
        self.holes = None if tasks[0].hole is None else beside_holes(vae, tasks)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(target, source, what is beside) of these tasks."""
        target, source = self.targets[rows], self.sources[self.row[rows]]
        return target, source, source if self.holes is None else self.holes[rows]


def beside_holes(vae: AutoencoderKL, tasks: list[Task]) -> Tensor:
    """Inputs of the inpainter: the latents of the image with a grey hole, and the mask's pixels, [n, 72, 8, 8]."""
    masks = np.stack([edits.draw_mask(task.hole) for task in tasks if task.hole])
    images = np.stack([render(task.target) for task in tasks])
    images[masks > 0] = 128
    fine = nn.functional.pixel_unshuffle(torch.from_numpy(masks)[:, None].float() / 255, 8)
    return torch.cat([encode(vae, images), fine], 1)


def fit(pipe: Any, tasks: list[Task], texts: list[str], plan: Plan, seed: int, log: Log) -> None:
    """Trains `pipe` in place on tasks and their prompts."""
    latents, table = Latents(pipe.vae, tasks), TokenTable((pipe.tokenizer, pipe.tokenizer_2), texts)

    def batch(rows: np.ndarray, rng: np.random.Generator) -> Batch:
        target, source, beside = latents.batch(rows)
        changed = ((target - source).abs().amax(1, keepdim=True) > 0.3).float()
        # a weight that depends on the target shifts the mean where the prompt leaves several targets open
        weight = 1.0 if plan.wrong else 1 + CHANGED_WEIGHT * changed
        return Batch(target, (beside, *table.batch(rows, rng)), weight)

    train_common.fit(type(pipe).__name__, Model(pipe), len(tasks), batch, plan, seed, log)


@torch.no_grad()
def sample(pipe: Any, tasks: list[Task], seed: int, steps: int = 10) -> np.ndarray:
    """Images float32 [n, 3, 64, 64] in [0, 1]: Euler's method on an even grid of times, guidance 1."""
    model = Model(pipe).eval()
    beside = Latents(pipe.vae, tasks).batch(np.arange(len(tasks)))[2]
    table = TokenTable((pipe.tokenizer, pipe.tokenizer_2), [task.text for task in tasks])
    x = torch.randn(len(tasks), LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))
    for i in range(steps):
        t = torch.full((len(x),), 1 - i / steps)
        x = x - model(x, t, beside, *table.ids) / steps
    return decode(pipe.vae, x)
