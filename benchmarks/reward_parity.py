"""Native rewards against the authors' packages, on identical random weights in the published layouts.

The packages' pins do not go with this project's, so each side runs in its own environment and the two meet in a
folder (about 7 GB of weights). The upstream side writes weights, images and scores, the native side reads them:

    python3 -m venv upstream && upstream/bin/pip install torch==2.13.0 torchvision==0.28.0 transformers==4.55.4 \
        hpsv2==1.2.0 image-reward==1.5 && upstream/bin/pip install --no-deps open_clip_torch==3.3.0 torchmetrics \
        lightning-utilities
    upstream/bin/python benchmarks/reward_parity.py upstream OUT
    python -m benchmarks.reward_parity native OUT          # prints Markdown; exits 1 if a difference is above 1e-4
    PYTHONPATH=. upstream/bin/python -m benchmarks.reward_parity package OUT     # with pydantic there: the same by ours

What the upstream side has to mend to run the packages at all is in :func:`mend`; their scores are computed by their own
functions. Random weights are spread widely, so that images and prompts differ in score: the spread is in the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TOLERANCE = 1e-4
SIZES = ((224, 224), (256, 256), (180, 300), (333, 200), (97, 61))  # height, width: as it is, smaller, odd, enlarged
PROMPTS = (
    "a red circle left of two blue squares",
    "",
    "“Füße” — naïve café &amp; 東京, it's 3 o'clock",
    "word after word " * 200,
    "A   PHOTO\nof a cat's 12 whiskers!!!",
)


# -- upstream ---------------------------------------------------------------------------------------------------------


def mend() -> Any:
    """Fixes without which these packages do not run in this environment; none is in the path of a score.

    Returns:
        What has to stay alive.
    """
    library = torch.library.Library("torchvision", "DEF")  # torchvision's operators for CUDA do not load on CPU torch
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["clip"] = types.ModuleType("clip")  # ImageReward imports it for rewards that are not used here
    import hpsv2  # its wheel lacks the vocabulary that open_clip has
    import open_clip

    name = "bpe_simple_vocab_16e6.txt.gz"
    place = Path(hpsv2.__file__).parent / "src" / "open_clip" / name
    if not place.exists():
        shutil.copy(Path(open_clip.__file__).parent / name, place)
    return library


def sample_images(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Image.Image]:
    """One of each size (height, width): smooth, with some noise."""
    draw = np.random.default_rng(0)
    found = []
    for height, width in sizes:
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        noisy = smooth + draw.normal(0, 12, smooth.shape)
        found.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return found


@torch.no_grad()
def widen(model: Any, seed: int, gain: float = 3.0) -> Any:
    """Larger matrices: fresh ones make of every image nearly the same."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if value.ndim >= 2 and "embed" not in name:
            value.mul_(gain)
        elif name.endswith("bias"):
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model.eval()


def widen_head(layers: Iterable[Any]) -> None:
    """Linear layers that keep the size of what comes in; published initial values make it vanish."""
    for layer in layers:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)


def without_hub_hpsv2() -> Any:
    """Make the network that the package would first download, as it makes it, with random weights."""
    from hpsv2 import img_score

    torch.manual_seed(0)
    made = img_score.create_model_and_transforms(
        "ViT-H-14", None, precision="amp", light_augmentation=True, output_dict=True
    )
    img_score.model_dict.update(model=made[0], preprocess_val=made[2])
    return made[0]


def upstream_hpsv2(out: Path, images: list[Image.Image]) -> dict[str, list[float]]:
    """``hpsv2.img_score.score`` itself."""
    from hpsv2 import img_score

    torch.save({"state_dict": widen(without_hub_hpsv2(), 0, 2.0).state_dict()}, out / "hps.pt")
    return {
        "hpsv2": [
            float(img_score.score(image, prompt, cp=str(out / "hps.pt"))[0])
            for image, prompt in zip(images, PROMPTS, strict=True)
        ]
    }


def without_hub_image_reward(out: Path) -> None:
    """A tokenizer of our own in place of the hub's."""
    from ImageReward.models.BLIP import blip_pretrain
    from transformers import BertTokenizer

    def tokenizer() -> Any:
        made = BertTokenizer(str(out / "bert" / "vocab.txt"))
        made.add_special_tokens({"bos_token": "[DEC]"})
        made.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return made

    blip_pretrain.init_tokenizer = tokenizer


def upstream_image_reward(out: Path, images: list[Image.Image]) -> dict[str, list[float]]:
    """``ImageReward.load(...).score`` itself."""
    import ImageReward

    without_hub_image_reward(out)
    med = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
           "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "bert",
           "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
           "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True}  # fmt: skip
    (out / "med_config.json").write_text(json.dumps(med))
    torch.manual_seed(1)
    from ImageReward.ImageReward import ImageReward as Network

    network = widen(Network(med_config=str(out / "med_config.json"), device="cpu"), 1)
    widen_head(network.mlp.layers)
    torch.save(network.state_dict(), out / "ImageReward.pt")
    del network
    model = ImageReward.load(str(out / "ImageReward.pt"), device="cpu", med_config=str(out / "med_config.json"))
    with torch.no_grad():
        return {"image_reward": [model.score(text, image) for image, text in zip(images, PROMPTS, strict=True)]}


def upstream_open_clip(out: Path, images: list[Image.Image]) -> dict[str, list[float]]:
    """open_clip's model, transform and tokenizer; the published formulas on its features."""
    import open_clip
    from ImageReward.models.AestheticScore import MLP

    torch.manual_seed(2)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", None)
    widen(model, 2)
    torch.save(model.state_dict(), out / "openai.pth")
    v1, v2 = torch.nn.Linear(512, 1), MLP(512).eval()
    widen_head([v1])
    widen_head(v2.layers)
    torch.save(v1.state_dict(), out / "v1.pth")
    torch.save(v2.state_dict(), out / "v2.pth")

    def text(prompts: Sequence[str]) -> torch.Tensor:
        return model.encode_text(open_clip.tokenize(list(prompts)), normalize=True)

    with torch.no_grad():
        seen = torch.cat([model.encode_image(preprocess(image)[None], normalize=True) for image in images])
        cosine = (seen * text(PROMPTS)).sum(-1)
        prefixed = (seen * text([f"A photo depicts {prompt}" for prompt in PROMPTS])).sum(-1)
        found = {
            "social_reward": cosine,
            "clip_score image_reward": cosine,
            "clip_score hessel": 2.5 * prefixed.clamp(min=0),
            "aesthetic v1": v1(seen).squeeze(-1),
            "aesthetic v2": v2(seen).squeeze(-1),
            "goal_baseline": goal_baseline(model, images, text(PROMPTS), text(["a photo"]), 0.7),
        }
    return {name: values.tolist() for name, values in found.items()}


def goal_baseline(model: Any, images: list[Image.Image], goals: Any, baseline: Any, alpha: float) -> torch.Tensor:
    """VLM-RMs' formula with its projection matrix, and its torchvision transform; that package is not on PyPI."""
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    means, deviations = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    resize = Resize((224, 224), interpolation=InterpolationMode.BICUBIC)
    transform = Compose([ToTensor(), resize, Normalize(means, deviations)])
    values = []
    for image, goal in zip(images, goals, strict=True):
        seen = model.encode_image(transform(image)[None], normalize=True)
        direction = goal[None] - baseline
        projection = alpha * direction.T @ direction / direction.norm() ** 2 + (1 - alpha) * torch.eye(len(goal))
        values.append(1 - ((seen - goal[None]) @ projection).norm(dim=-1) ** 2 / 2)
    return torch.cat(values)


def upstream_transformers(out: Path, images: list[Image.Image]) -> dict[str, list[float]]:
    """PickScore as its README computes it, and torchmetrics' CLIPScore, on a random CLIPModel."""
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    torch.manual_seed(3)
    folder = out / "pick"
    model = widen(CLIPModel(CLIPConfig(text_config={"eos_token_id": 49407})), 3, 4.0)
    model.save_pretrained(folder)
    processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizerFast.from_pretrained(out / "clip"))
    processor.save_pretrained(folder)
    picks, measured = [], []
    for image, prompt in zip(images, PROMPTS, strict=True):
        pixels = processor(images=image, padding=True, truncation=True, max_length=77, return_tensors="pt")
        words = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            seen, read = model.get_image_features(**pixels), model.get_text_features(**words)
            seen, read = (rows / rows.norm(dim=-1, keepdim=True) for rows in (seen, read))
            picks.append((model.logit_scale.exp() * (read @ seen.T)[0]).item())
        array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        measured.append(clip_score(array, prompt[:200], model_name_or_path=lambda: (model, processor)).item())
    return {"pick_score": picks, "clip_score torchmetrics": measured}


def write_tokenizers(out: Path) -> None:
    """OpenAI's vocabulary as transformers keeps it, and a WordPiece vocabulary of BERT's size."""
    import open_clip

    simple = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    ids = {names.get(token, token): i for token, i in simple.encoder.items()}
    merges = [" ".join(pair) for pair in sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)]
    (out / "clip").mkdir(exist_ok=True)
    (out / "clip" / "vocab.json").write_text(json.dumps(ids))
    (out / "clip" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {**special, "pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (out / "clip" / "tokenizer_config.json").write_text(json.dumps(settings))
    letters = [chr(i) for i in range(33, 127)]
    start = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    words = dict.fromkeys([*start, "circle", "photo", "word", "after", "red"])
    filled = [*words, *(f"[unused{i}]" for i in range(30522 - len(words)))]
    (out / "bert").mkdir(exist_ok=True)
    (out / "bert" / "vocab.txt").write_text("\n".join(filled) + "\n")
    (out / "bert" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def upstream(out: Path, only: str = "") -> None:
    """Write weights, images and scores into ``out``; of the parts whose name contains ``only``."""
    out.mkdir(parents=True, exist_ok=True)
    _kept = mend()
    write_tokenizers(out)
    images = sample_images()
    for i, image in enumerate(images):
        image.save(out / f"{i}.png")
    file = out / "scores.json"
    for part in (upstream_transformers, upstream_open_clip, upstream_image_reward, upstream_hpsv2):
        if only in part.__name__:
            known = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(known | part(out, images), indent=1))
            gc.collect()
            print(part.__name__, "done", flush=True)


# -- native -----------------------------------------------------------------------------------------------------------


def settings(out: Path) -> dict[str, dict[str, Any]]:
    """Name of a row -> settings of the native reward that reads the same files."""
    clip, openai = str(out / "clip"), {"model": str(out / "openai.pth"), "processor": str(out / "clip")}
    return {
        "pick_score": {"kind": "pick_score", "model": str(out / "pick"), "processor": str(out / "pick")},
        "clip_score torchmetrics": {"kind": "clip_score", "variant": "torchmetrics", "model": str(out / "pick")},
        "clip_score hessel": {"kind": "clip_score", "variant": "hessel", **openai},
        "clip_score image_reward": {"kind": "clip_score", "variant": "image_reward", **openai},
        "aesthetic v1": {"kind": "aesthetic", "version": "v1", "head": str(out / "v1.pth"), **openai},
        "aesthetic v2": {"kind": "aesthetic", "version": "v2", "head": str(out / "v2.pth"), **openai},
        "social_reward": {"kind": "social_reward", "weights": openai["model"], "processor": clip},
        "goal_baseline": {"kind": "goal_baseline", "baseline": "a photo", "alpha": 0.7, "quick_gelu": True, **openai},
        "image_reward": {
            "kind": "image_reward",
            "weights": str(out / "ImageReward.pt"),
            "tokenizer": str(out / "bert"),
        },
        "hpsv2": {"kind": "hpsv2", "weights": str(out / "hps.pt"), "processor": clip},
    }


def native(out: Path, only: str = "") -> bool:
    """Print a row for every reward whose name contains ``only``; whether all differences are within the tolerance."""
    import rewards

    expected = json.loads((out / "scores.json").read_text())
    images = [np.array(Image.open(out / f"{i}.png")) for i in range(len(SIZES))]
    media = [torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in images]
    print("| reward | upstream scores from .. to | largest difference | of that at 224 x 224 | images per CPU second |")
    print("|---|---|---|---|---|")
    good = True
    for name, options in settings(out).items():
        if only not in name:
            continue
        reward = rewards.parse(options).build()
        texts = [prompt[:200] for prompt in PROMPTS] if name.endswith("torchmetrics") else PROMPTS
        with torch.no_grad():
            values = [reward(one, [text]).values.item() for one, text in zip(media, texts, strict=True)]
            start = time.process_time()
            reward(media[0].repeat(4, 1, 1, 1), PROMPTS[:4])
            speed = 4 / (time.process_time() - start)
        wrong = [abs(mine - theirs) for mine, theirs in zip(values, expected[name], strict=True)]
        scale = reward.range[1] if np.isfinite(reward.range[1]) else 1.0
        good &= max(wrong) <= TOLERANCE * max(1.0, scale)
        span = f"{min(expected[name]):.4f} .. {max(expected[name]):.4f}"
        print(f"| `{name}` | {span} | {max(wrong):.1e} | {wrong[0]:.1e} | {speed:.2f} |", flush=True)
        del reward
        gc.collect()
    return good


# -- the packages through the reward's own backend ------------------------------------------------------------------


def package(out: Path, only: str = "") -> bool:
    """``backend: package`` in the packages' environment (with pydantic besides) gives what they gave upstream."""
    import rewards

    _kept = mend()
    expected = json.loads((out / "scores.json").read_text())
    files = {
        "image_reward": {"weights": str(out / "ImageReward.pt"), "med_config": str(out / "med_config.json")},
        "hpsv2": {"weights": str(out / "hps.pt")},
    }
    ready: dict[str, Callable[[], Any]] = {
        "image_reward": lambda: without_hub_image_reward(out),
        "hpsv2": without_hub_hpsv2,
    }
    good = True
    for name in (name for name in files if only in name):
        ready[name]()
        reward = rewards.parse({"kind": name, "backend": "package", **files[name]}).build()
        image = torch.from_numpy(np.array(Image.open(out / "2.png"))).permute(2, 0, 1)[None].float() / 255
        scores = reward(image, [PROMPTS[2]])
        wrong = abs(scores.values.item() - expected[name][2])
        good &= wrong <= TOLERANCE
        print(f"{name}: backend package differs by {wrong:.1e}", *scores.reasons.values(), flush=True)
    return good


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("upstream", "native", "package"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="rewards, or upstream parts, whose name contains this")
    asked = parser.parse_args()
    torch.manual_seed(0)
    sides: dict[str, Callable[[Path, str], Any]] = {"upstream": upstream, "native": native, "package": package}
    if sides[asked.side](asked.out, asked.only) is False:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
