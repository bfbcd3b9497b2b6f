"""Measures the embedded models with the verifier, and writes their model card.

Part of the builder, not of any generator, and so the one place here that knows a reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, StableDiffusion3Pipeline, WanPipeline
from transformers import CLIPModel, CLIPProcessor, Qwen3VLForConditionalGeneration

from align.rewriting.settings import LocalWriter, Reply
from align.rewriting.words import EVOLVE, REWRITE, history, instruction
from align.rewriting.writer import LocalLM
from align.worlds import train_flux, train_wan
from align.worlds.train_clip import features
from align.worlds.train_sd3 import sample
from align.worlds.train_vae import decode, encode
from alignflow.worlds.shapes import edits, motion, wordings, world
from rewards.base import Reward
from rewards.judges.models import Local
from rewards.questions.digit_judge import DigitJudge
from rewards.questions.pairwise import Pairwise
from rewards.questions.reward_dance import RewardDance
from rewards.questions.yes_probability import YesProbability
from rewards.worlds import shapes_video
from rewards.worlds.shapes import score_batch
from rewards.worlds.shapes_edit import score_edits, score_fills

SAMPLES = 12  # images a prompt


def _round(values: dict) -> dict:
    return {k: round(float(v), 3) for k, v in values.items()}


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def vae(out: Path, n: int) -> dict:
    """Strict and dense score of rendered scenes before and after the autoencoder, and its mean absolute error."""
    model = AutoencoderKL.from_pretrained(out / "sd3" / "vae").eval()
    images, captions = world.dataset("heldout", 6 * n, seed=2)
    back = decode(model, encode(model, images))
    before, after = score_batch(images.transpose(0, 3, 1, 2) / 255, captions), score_batch(back, captions)
    error = np.abs(back - images.transpose(0, 3, 1, 2) / 255).mean()
    return {"parameters": _parameters(model)} | _round(
        {"strict_rendered": before["strict"].mean(), "strict": after["strict"].mean(), "dense": after["dense"].mean(),
         "absolute_error": error}
    )  # fmt: skip


@torch.no_grad()
def base_samples(out: Path, split: str, n: int) -> tuple[np.ndarray, list[str], dict]:
    """SAMPLES images [n, SAMPLES, 3, 64, 64] of each of `n` prompts from the base, the prompts, the gold scores."""
    pipe = StableDiffusion3Pipeline.from_pretrained(out / "sd3")
    prompts = world.prompts(split, n, seed=3)
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    images = np.concatenate([sample(pipe, repeated[i : i + 192], seed=i) for i in range(0, len(repeated), 192)])
    gold = score_batch(images, repeated)
    scores = {k: gold[k].reshape(n, SAMPLES) for k in ("strict", "dense")}
    return images.reshape(n, SAMPLES, *images.shape[1:]), prompts, scores


def sd3(out: Path, n: int) -> dict:
    """The base's gold: mean and best of SAMPLES on held-out prompts, mean on train prompts, dense by task."""
    start = time.perf_counter()
    _, prompts, held = base_samples(out, "heldout", n)
    seconds = (time.perf_counter() - start) * 192 / (n * SAMPLES)
    train = base_samples(out, "train", n)[2]
    tasks = [world.parse_caption(p).task for p in prompts]
    pipe = StableDiffusion3Pipeline.from_pretrained(out / "sd3")
    parts = (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
    return {"parameters": sum(_parameters(p) for p in parts)} | _round(
        {"dense": held["dense"].mean(), "strict": held["strict"].mean(), "dense_train": train["dense"].mean(),
         "strict_train": train["strict"].mean(), "best_dense": held["dense"].max(1).mean(),
         "best_strict": held["strict"].max(1).mean(), "spread_within_prompt": held["dense"].std(1).mean(),
         "seconds_per_192": seconds}
        | {f"dense_{task}": held["dense"][[t == task for t in tasks]].mean() for task in world.TASKS}
    )  # fmt: skip


def clip_scores(out: Path, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The proxy reward: cosine of each image [N, 3, 64, 64] in [0, 1] with its prompt, [N]."""
    model, processor = CLIPModel.from_pretrained(out / "clip").eval(), CLIPProcessor.from_pretrained(out / "clip")
    mean, std = (torch.tensor(getattr(processor.image_processor, k)).view(3, 1, 1) for k in ("image_mean", "image_std"))
    ids = processor.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = features(model, (torch.from_numpy(images) - mean) / std, None), features(model, None, ids)
    return (a * b).sum(-1).numpy()


def clip(out: Path, n: int) -> dict:
    """How often the proxy prefers the true caption to one with one thing changed, and how it agrees with gold."""
    images, texts, wrong = captioned(6 * n)
    right, other = clip_scores(out, images, texts), clip_scores(out, images, wrong)
    result = {"caption_accuracy": (right > other).mean()} | agreement(out, n, proxy=partial(clip_scores, out))
    return {"parameters": _parameters(CLIPModel.from_pretrained(out / "clip"))} | _round(result)


def captioned(n: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Held-out renders [n, 3, 64, 64] in [0, 1], their captions, and captions with one thing changed."""
    rng = np.random.default_rng(4)
    specs = world.sample_specs("heldout", n, seed=4)
    images = np.stack([world.render(world.sample_scene(s, rng)) for s in specs]).transpose(0, 3, 1, 2) / np.float32(255)
    return images, [world.caption(s) for s in specs], [world.caption(world.corrupt(s, rng)) for s in specs]


Proxy = Callable[[np.ndarray, list[str]], np.ndarray]
"""(images [N, 3, H, W] in [0, 1], their prompts) -> scores [N]."""


def agreement(out: Path, n: int, **proxies: Proxy) -> dict:
    """How proxies agree with gold over the base's images of `n` held-out prompts, where there is a base.

    Within a prompt: Pearson's correlation, and the share of pairs of different gold whose order it gets right; prompts
    whose images all have one gold score have neither. A proxy's name is before its facts, but for `proxy`.
    """
    if not (out / "sd3" / "model_index.json").exists():
        return {}
    images, prompts, gold = base_samples(out, "heldout", n)
    flat = images.reshape(-1, *images.shape[2:])
    dense, facts = gold["dense"], {}
    varied = dense.std(1) > 1e-3
    upper, lower = np.triu_indices(SAMPLES, 1)
    gap = dense[:, upper] - dense[:, lower]
    for name, proxy in proxies.items():
        scores = proxy(flat, [p for p in prompts for _ in range(SAMPLES)]).reshape(n, SAMPLES)
        correlation = [np.corrcoef(p, g)[0, 1] for p, g in zip(scores[varied], dense[varied], strict=True)]
        right = gap * (scores[:, upper] - scores[:, lower]) > 0
        prefix = "" if name == "proxy" else f"{name}_"
        facts[f"{prefix}within_prompt_correlation"] = np.mean(correlation)
        facts[f"{prefix}pairwise_accuracy"] = right[np.abs(gap) > 0.05].mean()
    return facts


def _relation(caption: str) -> str | None:
    return world.parse_caption(caption).relation


def judge(out: Path, n: int) -> dict:
    """How often the judge's yes and no are right, and how its answers agree with gold.

    `accuracy` is of yes to the true caption and no to one with one thing changed, half and half. `refused_relations`
    and `refused_others` are the shares of the latter with a no, where a relation was turned round and where it was
    not. `caption_accuracy` is how often the true one is the likelier, `digit_error` the mean distance of the expected
    digit, 0 to 1, from gold. `compared` is the pairwise judge's win rate, `beats` RewardDance's.
    """
    local = Local(model=str(out / "judge"), dtype="float32", chunk=64)
    yes, digit = (build(judge=local).build() for build in (YesProbability, DigitJudge))
    compared = {"compared": Pairwise(judge=local).build(), "beats": RewardDance(judge=local).build()}

    def ask(reward: Reward, images: np.ndarray, texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            return reward(torch.from_numpy(images), texts).values.numpy()

    images, texts, wrong = captioned(6 * n)
    right, other = ask(yes, images, texts), ask(yes, images, wrong)
    gold = np.concatenate([score_batch(images, said)["dense"] for said in (texts, wrong)])
    digits = np.concatenate([ask(digit, images, said) for said in (texts, wrong)])
    turned = np.array([_relation(a) != _relation(b) for a, b in zip(texts, wrong, strict=True)])
    no = other <= 0.5
    result = {
        "refused_relations": no[turned].mean(), "refused_others": no[~turned].mean(),
        "accuracy": ((right > 0.5).mean() + no.mean()) / 2, "caption_accuracy": (right > other).mean(),
        "digit_error": np.abs(digits - gold).mean(),
    } | agreement(out, n, proxy=partial(ask, yes), digit=partial(ask, digit))  # fmt: skip
    few = -(-n // 4)  # every two of a prompt's images are shown, in both orders
    result |= agreement(out, few, **{name: partial(ask, reward) for name, reward in compared.items()})
    start = time.perf_counter()
    ask(yes, np.resize(images, (192, *images.shape[1:])), [texts[i % len(texts)] for i in range(192)])
    result["seconds_per_192"] = time.perf_counter() - start
    model = Qwen3VLForConditionalGeneration.from_pretrained(out / "judge")
    return {"parameters": _parameters(model)} | _round(result)


def edit(out: Path, n: int) -> dict:
    """The editor's gold, as `sd3`, dense by kind of edit."""
    return _changes(out / "flux_kontext", "shapes-edit", n)


def fill(out: Path, n: int) -> dict:
    """The inpainter's gold, as `sd3`."""
    return _changes(out / "flux_fill", "shapes-fill", n)


def score_tasks(images: np.ndarray, tasks: list[edits.Task]) -> dict:
    """Scores of images [N, 3, H, W] in [0, 1], one task each; see `rewards.worlds.shapes_edit`."""
    sources = np.stack([world.render(task.source) for task in tasks]).transpose(0, 3, 1, 2) / np.float32(255)
    texts = [task.text for task in tasks]
    if tasks[0].hole is None:
        return score_edits(images, sources, texts)
    masks = np.stack([edits.draw_mask(task.hole) for task in tasks if task.hole])[:, None] / np.float32(255)
    return score_fills(images, sources, masks, texts)


def _changes(folder: Path, name: str, n: int) -> dict:
    """Gold of SAMPLES images of each of `n` tasks a split: mean and best on held-out tasks, mean on train tasks."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    gold, start = {}, time.perf_counter()
    for split in ("heldout", "train"):
        tasks, _ = edits.dataset(name, split, n, seed=3)
        repeated = [task for task in tasks for _ in range(SAMPLES)]
        parts = [train_flux.sample(pipe, repeated[i : i + 192], i) for i in range(0, len(repeated), 192)]
        found = score_tasks(np.concatenate(parts), repeated)
        gold[split] = {k: found[k].reshape(n, SAMPLES) for k in ("strict", "dense", "done", "kept")}
    seconds = (time.perf_counter() - start) * 192 / (2 * n * SAMPLES)
    held = gold["heldout"]
    kinds = [task.edit.kind for task in edits.dataset(name, "heldout", n, seed=3)[0]]
    size = sum(_parameters(part) for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2))
    return {"parameters": size} | _round(
        {k: held[k].mean() for k in ("dense", "strict", "done", "kept")}
        | {"dense_train": gold["train"]["dense"].mean(), "strict_train": gold["train"]["strict"].mean(),
           "best_dense": held["dense"].max(1).mean(), "best_strict": held["strict"].max(1).mean(),
           "spread_within_prompt": held["dense"].std(1).mean(), "seconds_per_192": seconds}
        | {f"dense_{kind}": held["dense"][[k == kind for k in kinds]].mean() for kind in dict.fromkeys(kinds)}
    )  # fmt: skip


@torch.no_grad()
def video(out: Path, n: int) -> dict:
    """Strict score of rendered videos before and after the autoencoder, the base's gold, dense by task."""
    model = AutoencoderKLWan.from_pretrained(out / "wan" / "vae").eval()
    videos, captions = motion.dataset("heldout", 2 * n, seed=2)
    rendered = videos.transpose(0, 1, 4, 2, 3) / np.float32(255)
    back = decode(model, encode(model, videos))
    before, after = (shapes_video.score_batch(media, captions) for media in (rendered, back))
    prompts, held = base_videos(out, "heldout", n)
    tasks = [motion.parse_caption(p).task for p in prompts]
    train, dense, strict = base_videos(out, "train", n)[1], held["dense"], held["strict"]
    pipe = WanPipeline.from_pretrained(out / "wan")
    size = _parameters(pipe.transformer) + _parameters(pipe.text_encoder)
    return {"parameters": size, "parameters_vae": _parameters(model)} | _round(
        {"strict_rendered": before["strict"].mean(), "strict_vae": after["strict"].mean(),
         "dense_vae": after["dense"].mean(), "absolute_error_vae": np.abs(back - rendered).mean()}
        | {name: held[name].mean() for name in shapes_video.PARTS}
        | {"dense_train": train["dense"].mean(), "strict_train": train["strict"].mean(),
           "best_dense": dense.max(1).mean(), "best_strict": strict.max(1).mean(),
           "spread_within_prompt": dense.std(1).mean()}
        | {f"dense_{task}": dense[[t == task for t in tasks]].mean() for task in motion.TASKS}
    )  # fmt: skip


def rewriter(out: Path, n: int) -> dict:
    """How often a sampled rewrite of a held-out prompt in a user's wording keeps what it means.

    `kept` says all that the prompt says, `inside` the grammar; `noted_kept` is `kept` where earlier rewrites are shown.
    """
    local = LocalLM.load(LocalWriter(model=str(out / "rewriter"), dtype="float32", chunk=64), "cpu")
    tasks = wordings.prompts("heldout", n, 5)
    asked = {
        "": [instruction(REWRITE, text) for _, text in tasks],
        "noted_": [instruction(EVOLVE, text, history=history([(text, 0.5)])) for _, text in tasks],
    }
    found: dict[str, float] = {"parameters": _parameters(local.model)}
    for name, some in asked.items():
        texts = local.write(some, range(n), Reply(longest=24))
        found[f"{name}kept"] = float(np.mean([wordings.keeps(s, t) for (s, _), t in zip(tasks, texts, strict=True)]))
    return _round(found)


def base_videos(out: Path, split: str, n: int) -> tuple[list[str], dict]:
    """`n` prompts, and the scores [n, SAMPLES] of the base's videos of them, by part."""
    pipe = WanPipeline.from_pretrained(out / "wan")
    prompts = motion.prompts(split, n, seed=3)
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    videos = np.concatenate([train_wan.sample(pipe, repeated[i : i + 192], i) for i in range(0, len(repeated), 192)])
    gold = shapes_video.score_batch(videos, repeated)
    return prompts, {name: gold[name].reshape(n, SAMPLES) for name in shapes_video.PARTS}


def card(facts: dict) -> str:
    """The model card: what there is, and every measured fact as a table row."""
    rows = "\n".join(
        f"| {part} | {name} | {value:,} |"
        for part in ("vae", "sd3", "clip", "judge", "edit", "fill", "video", "rewriter")
        for name, value in facts.get(part, {}).items()
    )
    length = train_flux.TEXT_LENGTH
    return f"""# The embedded models

Small models of the real classes, trained on the world of `alignflow/worlds/shapes/world.py` (64x64 images of flat
coloured shapes with captions) on one CPU core. `python -m align.worlds.build` rebuilds them with fixed seeds.

- `sd3/`: a `StableDiffusion3Pipeline` (latents 8x8x8, 16 image tokens). Its T5 returns zeros, so pass
  `max_sequence_length=1`: the default of 256 gives equally good images at five times the cost. Its last training
  captions deliberately contain one or two mistakes (see `align/worlds/train_sd3.py`), so it follows prompts
  imperfectly. No training image with a correct caption had a held-out combination (`world.is_held_out`).
- `clip/`: a `CLIPModel` with its processor, a learned proxy reward, contrastively trained on clean captions.
- `judge/`: a `Qwen3VLForConditionalGeneration` with tokenizer and image processor, which answers the questions of
  `yes_probability`, `digit_judge`, `prompt_echo`, `pairwise` and `reward_dance` as they are worded in `rewards/`. It
  was trained on renders, blurred and noisy, half of them passed through the autoencoder, with the verifier's answers.
  It was taught to answer yes where the strict score is 1; its probability of a no is lower where the dense score is
  higher.
- `flux_kontext/`: a `FluxKontextPipeline` that edits such images by instruction, on the same autoencoder. Its T5 has
  one token per word and was trained on {length} tokens: pass `max_sequence_length={length}`, `max_area=64 * 64` and
  `_auto_resize=False`.
- `flux_fill/`: a `FluxFillPipeline` that paints one object into a hole; its training started from the editor. Pass
  `max_sequence_length={length}`.
- `wan/`: a `WanPipeline` that generates the videos of `alignflow/worlds/shapes/motion.py`: pass `height=32, width=32,
  num_frames=9, max_sequence_length=16`. All its captions were correct; it is imperfect because it is small.
- `rewriter/`: a `Qwen2ForCausalLM` with tokenizer and chat template, which paraphrases a prompt at random, or changes
  the best of earlier rewrites slightly (`align/rewriting/words.py` has the instructions). It was trained without `sd3`.

The files hold float16; `from_pretrained` without a dtype gives float32.

The verifiers in `rewards/worlds/` measured these facts. `sd3`, `edit`, `fill` and `video`: 10 Euler steps, guidance 1,
{SAMPLES} images per prompt; `best_` is the best of them. `vae` and `_vae`: held-out renders, encoded and decoded.
`clip` and `judge`: held-out renders, and the base model's images of held-out prompts. `seconds` is the training time.
{facts.get("note", "")}

| part | fact | value |
|---|---|---|
{rows}
"""
