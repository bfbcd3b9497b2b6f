"""Rebuilds the embedded models from scratch: `python -m align.worlds.build [--out DIR] [--stage all] [--quick]`.

Hours on two CPU cores with the full budgets; `--quick` runs the same code in seconds and yields models that
load but draw nothing. Seeds are fixed; another version of torch or another processor gives other last digits.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline

from align.worlds import measure, train_flux, train_wan
from align.worlds.train_clip import train_clip
from align.worlds.train_common import Log, Plan
from align.worlds.train_judge import train_judge
from align.worlds.train_rewriter import train_rewriter
from align.worlds.train_sd3 import fit, new_pipeline
from align.worlds.train_vae import Autoencoder, encode, harden_decoder, new_vae, new_video_vae, train_vae
from alignflow.worlds import shapes
from alignflow.worlds.shapes import edits, motion, world

# in this order: all need the autoencoder, clip and judge are measured on sd3's images, the inpainter begins as the
# editor; video has its own autoencoder
STAGES = ("vae", "sd3", "clip", "judge", "edit", "fill", "video", "rewriter")
SPLITS = ("train", "heldout")
HERE = Path(shapes.__file__).parent / "weights"


Rounds: TypeAlias = tuple[tuple[int, int], ...]
"""Steps of an autoencoder, then of its decoder alone, and that again: each round begins at a high learning rate."""


@dataclass(frozen=True)
class Budget:
    """Size of a build: scenes to draw, optimizer steps and batch sizes, prompts to measure on."""

    vae_scenes: int = 8_000
    vae_rounds: Rounds = ((5_000, 1_500), (3_000, 1_200), (2_000, 800))
    vae_batch: int = 16
    sd3_plans: tuple[Plan, ...] = (Plan(100_000, 6_500, 96, 1.5e-3), Plan(60_000, 450, 96, 6e-4, wrong=0.6))
    clip_scenes: int = 24_000
    clip_steps: int = 1_100
    clip_batch: int = 128
    judge_plans: tuple[Plan, ...] = (
        Plan(16_000, 300, 64, 2e-3),
        Plan(16_000, 1_700, 32, 2e-3),
        Plan(8_000, 520, 32, 1.2e-3),
        Plan(14_000, 1_600, 32, 1.6e-3),
    )
    edit_plans: tuple[Plan, ...] = (
        Plan(40_000, 500, 64, 2e-3),
        Plan(14_000, 2_400, 32, 1.6e-3),
        Plan(20_000, 4_600, 32, 1.4e-3),
        Plan(8_000, 300, 32, 6e-4, wrong=0.5),
    )
    fill_plans: tuple[Plan, ...] = (Plan(7_000, 800, 32, 1.6e-3), Plan(6_000, 250, 32, 6e-4, wrong=0.5))
    video_vae_scenes: int = 5_000
    video_vae_rounds: Rounds = ((2_500, 0), (1_500, 0), (3_000, 0))
    video_plans: tuple[Plan, ...] = (Plan(16_000, 1_600, 64, 2e-3), Plan(16_000, 2_600, 64, 1.6e-3))
    rewriter_plans: tuple[Plan, ...] = (Plan(0, 600, 64, 3e-3),)
    measured: int = 96


_BRIEF = (Plan(48, 1, 4, 1e-3), Plan(48, 1, 4, 1e-3, wrong=0.6))
QUICK = Budget(48, ((2, 2), (1, 1)), 4, _BRIEF, 48, 2, 4, _BRIEF, _BRIEF, _BRIEF, 12, ((3, 1),), _BRIEF, _BRIEF[:1], 6)


def save_half(model: Any, folder: Path) -> None:
    """Writes `model` in float16; a plain `from_pretrained` gives float32 all the same.

    diffusers loads float32 unless told otherwise, transformers what a config names, so the configs name float32. Where
    a part was loaded from is not written down.
    """
    model.to(torch.float16)
    model.save_pretrained(folder)
    for path in [folder / "config.json", folder / "model_index.json", *folder.glob("*/config.json")]:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if '"_name_or_path"' not in line]
            path.write_text("\n".join(kept).replace('"dtype": "float16"', '"dtype": "float32"') + "\n")
    model.to(torch.float32)


def build_vae(out: Path, budget: Budget, log: Log) -> None:
    """Trains the autoencoder and keeps it where the pipeline will have it."""
    rng = np.random.default_rng(0)
    images = np.stack([world.render(world.crowd(rng)) for _ in range(budget.vae_scenes)])
    scenes, _ = world.dataset("train", budget.vae_scenes, seed=0)  # as many without a crowd
    images = np.concatenate([images, scenes])
    vae = new_vae()
    _rounds(vae, images, budget.vae_rounds, budget.vae_batch, log)
    save_half(vae, out / "sd3" / "vae")


def _rounds(vae: Autoencoder, images: np.ndarray, rounds: Rounds, batch: int, log: Log) -> None:
    for number, (steps, decoder_steps) in enumerate(rounds):
        train_vae(vae, images, steps, batch, number, log, again=number > 0)
        if decoder_steps:
            harden_decoder(vae, images[::2], decoder_steps, batch, number, log)


def encoded(world: ModuleType, vae: Autoencoder, plan: Plan, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Latents [scenes, ...] and captions of a world's training split, rendered in parts to save memory."""
    sizes = [min(10_000, plan.scenes - i) for i in range(0, plan.scenes, 10_000)]
    latents, texts = [], []
    for part, size in enumerate(sizes):
        images, captions = world.dataset("train", size, 1000 * seed + part, plan.wrong)
        latents.append(encode(vae, images))
        texts += captions
    return torch.cat(latents), texts


def build_sd3(out: Path, budget: Budget, log: Log) -> None:
    """Trains transformer and text encoders around the autoencoder in `out`."""
    vae = AutoencoderKL.from_pretrained(out / "sd3" / "vae").eval()
    pipe = new_pipeline(vae)
    for seed, plan in enumerate(budget.sd3_plans, 1):
        fit(pipe, *encoded(world, vae, plan, seed), plan, seed, log)
    save_half(pipe, out / "sd3")


def build_clip(out: Path, budget: Budget, log: Log) -> None:
    """Trains the learned proxy reward."""
    model, processor = train_clip(budget.clip_scenes, budget.clip_steps, budget.clip_batch, seed=0, log=log)
    save_half(model, out / "clip")
    processor.save_pretrained(out / "clip")


def build_judge(out: Path, budget: Budget, log: Log) -> None:
    """Trains the judge, whose scenes have partly passed the autoencoder in `out`."""
    vae = AutoencoderKL.from_pretrained(out / "sd3" / "vae").eval()
    judge, pixels = train_judge(vae, *budget.judge_plans, seed=0, log=log)
    save_half(judge.model, out / "judge")
    judge.tokenizer.save_pretrained(out / "judge")
    pixels.save_pretrained(out / "judge")


def build_edit(out: Path, budget: Budget, log: Log) -> None:
    """Trains the editor around the autoencoder in `out`."""
    pipe = train_flux.new_pipeline("shapes-edit", AutoencoderKL.from_pretrained(out / "sd3" / "vae").eval())
    _build_flux(pipe, "shapes-edit", budget.edit_plans, log)
    save_half(pipe, out / "flux_kontext")


def build_fill(out: Path, budget: Budget, log: Log) -> None:
    """Trains the inpainter from the editor in `out`."""
    editor = FluxKontextPipeline.from_pretrained(out / "flux_kontext")
    pipe = train_flux.new_pipeline("shapes-fill", editor.vae.eval())
    train_flux.adopt(pipe, editor)
    _build_flux(pipe, "shapes-fill", budget.fill_plans, log)
    save_half(pipe, out / "flux_fill")


def _build_flux(pipe: Any, name: str, plans: tuple[Plan, ...], log: Log) -> None:
    for seed, plan in enumerate(plans, 1):
        tasks, texts = edits.dataset(name, "train", plan.scenes, 1000 * seed, plan.wrong, each=5)
        train_flux.fit(pipe, tasks, texts, plan, seed, log)


def build_video(out: Path, budget: Budget, log: Log) -> None:
    """Trains the autoencoder of videos, then transformer and text encoder around it."""
    videos = np.concatenate([motion.dataset(split, budget.video_vae_scenes // 2, seed=0)[0] for split in SPLITS])
    vae = new_video_vae()
    _rounds(vae, videos, budget.video_vae_rounds, budget.vae_batch, log)
    pipe = train_wan.new_pipeline(vae)
    for seed, plan in enumerate(budget.video_plans, 1):
        train_wan.fit(pipe, *encoded(motion, vae, plan, seed), plan, seed, log)
    save_half(pipe, out / "wan")


def build_rewriter(out: Path, budget: Budget, log: Log) -> None:
    """Trains the rewriter of prompts."""
    model, tokens = train_rewriter(budget.rewriter_plans[0], seed=0, log=log)
    save_half(model, out / "rewriter")
    tokens.save_pretrained(out / "rewriter")


def build(out: Path, stage: str = "all", budget: Budget | None = None) -> dict:
    """Runs one stage or all, measures what `out` then holds, and writes facts.json and README.md there."""
    budget = budget or Budget()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "facts.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    builders = {
        "vae": build_vae, "sd3": build_sd3, "clip": build_clip, "judge": build_judge, "edit": build_edit,
        "fill": build_fill, "video": build_video, "rewriter": build_rewriter,
    }  # fmt: skip
    for name in STAGES:
        if stage in (name, "all"):
            torch.manual_seed(0)
            log = Log()
            builders[name](out, budget, log)
            facts[name] = {"seconds": round(log.seconds)} | getattr(measure, name)(out, budget.measured)
    facts["budget"] = asdict(budget)
    path.write_text(json.dumps(facts, indent=2) + "\n")
    (out / "README.md").write_text(measure.card(facts))
    return facts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m align.worlds.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write; default: the package's own weights")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, in seconds")
    args = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(build(args.out, args.stage, QUICK if args.quick else None), indent=2))


if __name__ == "__main__":
    main()
