"""HPSv3 and VideoReward against their authors' own code, on identical tiny random weights in the published layouts.

As in reward_parity.py each side runs in its own environment and the two meet in a folder (about 160 MB). Nothing
is downloaded but the code; what it imports and no score passes through is replaced in :func:`stand_in`:

    python3 -m venv upstream && upstream/bin/pip install torch==2.13.0 transformers==4.45.2 peft==0.10.0 \
        accelerate==0.34.0 "numpy<2" "pandas<3" pillow requests omegaconf
    upstream/bin/pip install --no-deps hpsv3==1.0.0
    git clone https://github.com/KwaiVGI/VideoAlign
    upstream/bin/python -m benchmarks.qwen2_vl_parity upstream OUT --video-align VideoAlign
    python -m benchmarks.qwen2_vl_parity native OUT          # exits 1 above 1e-4

Upstream, ``HPSv3RewardInferencer`` and ``VideoVLMRewardInference`` are built and score by their own methods. The native
side scores twice: as users do, and from the authors' own patches, so that pixels and network are told apart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.reward_parity import PROMPTS, TOLERANCE, sample_images, widen

SIZES = ((448, 448), (224, 224), (720, 1280), (333, 200), (97, 61))  # height, width: as it is, larger, smaller, odd
LENGTHS = ((16, 8.0), (81, 16.0), (5, 16.0), (33, 24.0), (24, 8.0))  # frames of a video, frames a second
MARKS = ("VQ", "MQ", "TA")
NORM = {"VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121}
CHAT = (  # what the hub's template makes of one question
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<|vision_start|>"
    "<|{{ c.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]


# -- upstream ---------------------------------------------------------------------------------------------------------


def stand_in() -> None:
    """Modules that the authors' code imports: empty, but for torchvision's resize and decord's reader.

    Transformers and PEFT must be imported before, as they look for some of them.
    """
    names = "torchvision torchvision.io torchvision.transforms torchvision.transforms.functional decord trl datasets"
    names += " fire matplotlib matplotlib.pyplot matplotlib.patches torch.utils.tensorboard"
    for name in names.split():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["__getattr__"] = _nothing
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    vision: dict[str, Any] = sys.modules["torchvision.transforms"].__dict__
    vision["InterpolationMode"] = type("InterpolationMode", (), {"BICUBIC": "bicubic"})
    vision["functional"].resize = resize
    sys.modules["decord"].__dict__["VideoReader"] = Frames
    sys.modules["trl"].__dict__.update(get_kbit_device_map=lambda: None, get_quantization_config=lambda config: None)


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def resize(images: torch.Tensor, size: list[int], interpolation: str, antialias: bool) -> torch.Tensor:
    """``torchvision.transforms.functional.resize`` of tensors: eight bits stay eight bits."""
    found = torch.nn.functional.interpolate(images.float(), size, mode=interpolation, antialias=antialias)
    return found if images.is_floating_point() else found.clamp(0, 255).round().to(images.dtype)


class Frames:
    """``decord.VideoReader`` of a .npy file ``[F, H, W, 3]``, the frames a second in its name."""

    def __init__(self, path: str) -> None:
        file = Path(path.removeprefix("file://"))
        self.frames, self.rate = np.load(file), float(file.stem.split("_")[-1])

    def __len__(self) -> int:
        return len(self.frames)

    def get_avg_fps(self) -> float:
        return self.rate

    def get_batch(self, index: list[int]) -> Any:
        return type("Batch", (), {"asnumpy": lambda _: self.frames[index]})()


def write_base(folder: Path, tied: bool, corpus: Sequence[str]) -> None:
    """A tiny Qwen2-VL as the hub keeps it: flat config, weights, byte-level tokenizer, processor, chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import (
        Qwen2TokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    folder.mkdir(exist_ok=True)
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(corpus, vocab_size=600, min_frequency=2, show_progress=False)
    words.save_model(str(folder))
    tokenizer = Qwen2TokenizerFast(
        str(folder / "vocab.json"), str(folder / "merges.txt"), eos_token="<|im_end|>", chat_template=CHAT
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    pixels = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    Qwen2VLProcessor(pixels, tokenizer, chat_template=CHAT).save_pretrained(folder)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    vision = {"depth": 2, "embed_dim": 160, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3, "hidden_size": 256}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2}
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"], "hidden_act": "silu",
              "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
              "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": tied,
              "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2, "vision_config": vision,
              "vocab_size": 32 * (len(tokenizer) // 32 + 1), "bos_token_id": ids["<|endoftext|>"],
              "eos_token_id": ids["<|im_end|>"], "vision_token_id": ids["<|vision_pad|>"]}  # fmt: skip
    config |= {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    config |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    (folder / "config.json").write_text(json.dumps(config))
    Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


def upstream_hpsv3(out: Path) -> dict[str, list[float]]:
    """``HPSv3RewardInferencer.reward`` of five images at once."""
    yaml: Any = importlib.import_module("yaml")
    inference: Any = importlib.import_module("hpsv3.inference")
    question: Any = importlib.import_module("hpsv3.dataset.data_collator_qwen")
    shutil.copy(question.__file__, out)
    write_base(out / "base-7b", False, [question.INSTRUCTION, question.prompt_with_special_token, *PROMPTS])
    settings = yaml.safe_load((Path(inference.__file__).parent / "config" / "HPSv3_7B.yaml").read_text())
    settings |= {"model_name_or_path": str(out / "base-7b"), "torch_dtype": "float32", "bf16": False}
    config, file = str(out / "HPSv3.yaml"), str(out / "HPSv3.safetensors")
    Path(config).write_text(yaml.safe_dump(settings | {"report_to": "none", "output_dir": str(out / "nothing")}))
    kinds = (inference.TrainingConfig, inference.ModelConfig, inference.PEFTLoraConfig)
    (training, model, lora), _ = inference.parse_args_with_yaml(kinds, config, is_train=False)
    network = widen(inference.create_model_and_processor(model, lora, training)[0], 0)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    judge = inference.HPSv3RewardInferencer(config, file, device="cpu")
    images = sample_images(SIZES)
    for i, image in enumerate(images):
        image.save(out / f"image_{i}.png")
        batch = judge.prepare_batch([image], [PROMPTS[i]])
        save_file({"patches": batch["pixel_values"], "grid": batch["image_grid_thw"]}, out / f"image_{i}.safetensors")
    with torch.no_grad():
        scores = judge.reward(images, list(PROMPTS))
    return {"hpsv3": scores[:, 0].tolist(), "hpsv3 deviation": scores[:, 1].exp().tolist()}


def videos() -> Iterator[tuple[np.ndarray, float]]:
    """Frames ``[F, H, W, 3]`` and how many of a second, an image that moves and brightens."""
    for image, (length, rate) in zip(sample_images(SIZES), LENGTHS, strict=True):
        first = np.asarray(image).astype(np.float32)
        moved = [np.roll(first, 3 * f, axis=1) * (0.7 + 0.4 * f / length) for f in range(length)]
        yield np.stack(moved).clip(0, 255).astype(np.uint8), rate


def write_video_checkpoint(out: Path, module: Any, outputs: int) -> Path:
    """A folder of model_config.json and model.pth with its LoRA, as VideoAlign's inference reads it."""
    folder = out / f"video{outputs}"
    (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    model = {"model_name_or_path": str(out / "base-2b"), "output_dim": outputs, "use_special_tokens": True,
             "torch_dtype": "float32", "reward_token": "special", "loss_type": "btt"}  # fmt: skip
    lora = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "num_lora_modules": -1,
            "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"]}  # fmt: skip
    data = {"meta_data": "", "data_dir": "", "max_frame_pixels": 200704, "fps": 2.0, "eval_dim": list(MARKS),
            "prompt_template_type": "detailed_special", "sample_type": "uniform"}  # fmt: skip
    whole = {"data_config": data, "model_config": model, "peft_lora_config": lora, "inference_config": NORM}
    (folder / "model_config.json").write_text(json.dumps(whole))
    network, _, _ = module.create_model_and_processor(
        module.ModelConfig(**model),
        module.PEFTLoraConfig(**lora),
        module.TrainingConfig(output_dir=str(out), disable_flash_attn2=True),
    )
    for name, value in widen(network, outputs).named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    torch.save(network.state_dict(), folder / "checkpoint-1" / "model.pth")
    return folder


def upstream_video_reward(out: Path) -> dict[str, list[float]]:
    """``VideoVLMRewardInference.reward`` of five videos at once, from a head of three outputs and from one of one."""
    modules: list[Any] = [importlib.import_module(f) for f in ("inference", "prompt_template", "train_reward")]
    inference, template, training = modules
    shutil.copy(template.__file__, out)
    write_base(out / "base-2b", True, [template.DETAILED_PROMPT_WITH_SPECIAL_TOKEN, *PROMPTS])
    # its constructor asks for flash attention, which needs a GPU
    inference.TrainingConfig = lambda **given: training.TrainingConfig(**given | {"disable_flash_attn2": True})
    paths = []
    for i, (frames, rate) in enumerate(videos()):
        paths.append(str(out / f"clip{i}_{rate}.npy"))
        np.save(paths[-1], frames)
    found: dict[str, list[float]] = {}
    for outputs in (3, 1):
        folder = write_video_checkpoint(out, training, outputs)
        judge = inference.VideoVLMRewardInference(str(folder), device="cpu", dtype=torch.float32)
        with torch.no_grad():
            raw = judge.reward(paths, list(PROMPTS), use_norm=False)
            whole = judge.reward(paths, list(PROMPTS))
        found |= {f"video{outputs} {mark}": [marks[mark] for marks in raw] for mark in MARKS}
        found[f"video{outputs} Overall"] = [marks["Overall"] for marks in whole]
    for i, path in enumerate(paths):
        batch = judge.prepare_batch([path], [PROMPTS[i]])
        patches = {"patches": batch["pixel_values_videos"], "grid": batch["video_grid_thw"]}
        save_file(patches, out / f"clip_{i}.safetensors")
    return found


def upstream(out: Path, video_align: Path) -> None:
    """Write weights, media, the authors' patches and their scores into ``out``."""
    for name in ("transformers.trainer", "peft", "accelerate"):
        importlib.import_module(name)
    stand_in()
    sys.path.insert(0, str(video_align))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (out / "scores.json").write_text(json.dumps(upstream_hpsv3(out) | upstream_video_reward(out), indent=1))


# -- native -----------------------------------------------------------------------------------------------------------


def native(out: Path) -> bool:
    """Print a row for every score; whether all differences are within the tolerance."""
    import rewards
    from rewards.networks import qwen2_vl

    expected = json.loads((out / "scores.json").read_text())
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in expected}
    for i, prompt in enumerate(PROMPTS):
        for kind, media, settings, names in natives(out, i):
            reward = rewards.parse({"dtype": "float32", **settings}).build()
            seen = load_file(out / f"{kind}_{i}.safetensors")
            with torch.no_grad():
                own = reward(media, [prompt])
                with mock.patch.object(qwen2_vl, "patched", lambda *_, s=seen, **__: (s["patches"], s["grid"])):
                    given = reward(media, [prompt])
            for name, part in names.items():
                pair = [(scores.parts[part] if part else scores.values).item() for scores in (own, given)]
                rows[name].append((abs(pair[0] - expected[name][i]), abs(pair[1] - expected[name][i])))
    print("| score | upstream from .. to | largest difference | from the authors' patches |\n|---|---|---|---|")
    for name, wrong in rows.items():
        largest = [f"{max(column):.1e}" for column in zip(*wrong, strict=True)]
        print(f"| `{name}` | {min(expected[name]):.4f} .. {max(expected[name]):.4f} | {' | '.join(largest)} |")
    return max(value for wrong in rows.values() for pair in wrong for value in pair) <= TOLERANCE


def natives(out: Path, i: int) -> Iterator[tuple[str, torch.Tensor, dict[str, Any], dict[str, str]]]:
    """Kind of medium ``i``, the medium, the settings of a reward, and the row of each of its parts."""
    image = torch.from_numpy(np.array(Image.open(out / f"image_{i}.png"))).permute(2, 0, 1)[None].float() / 255
    settings: dict[str, Any] = {"kind": "hpsv3", "template": str(out / "data_collator_qwen.py")}
    settings |= {"weights": str(out / "HPSv3.safetensors"), "base": str(out / "base-7b")}
    yield "image", image, settings, {"hpsv3": "", "hpsv3 deviation": "deviation"}
    rate = LENGTHS[i][1]
    video = torch.from_numpy(np.load(out / f"clip{i}_{rate}.npy")).permute(0, 3, 1, 2)[None].float() / 255
    for outputs in (3, 1):
        settings = {"kind": "video_reward", "template": str(out / "prompt_template.py"), "fps": rate}
        weights = str(out / f"video{outputs}" / "checkpoint-1" / "model.pth")
        settings |= {"weights": weights, "base": str(out / "base-2b"), "lora_alpha": 16}
        parts = zip(MARKS, ("visual_quality", "motion_quality", "text_alignment"), strict=True)
        names = {f"video{outputs} {mark}": part for mark, part in parts}
        yield "clip", video, settings | {"normalise": False}, names
        yield "clip", video, settings, {f"video{outputs} Overall": ""}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("upstream", "native"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--video-align", type=Path, help="upstream: a checkout of KwaiVGI/VideoAlign")
    asked = parser.parse_args()
    if asked.side == "native":
        raise SystemExit(0 if native(asked.out) else 1)
    upstream(asked.out, asked.video_align)


if __name__ == "__main__":
    main()
