"""Damaged LoRA files, weight files and pipeline folders: every one is read, or refused in words."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from harness import failures

from align.checking.check import generator_problems
from align.checking.folder_check import lora_problems, scheduler_line, target_problems
from align.config.model import GeneratorConfig
from align.policy import layouts
from align.policy.layers import LoraError, linear_layers
from align.policy.lora import as_diffusers, load_lora, lora_of
from alignflow.errors import ConfigError
from generators.adapters.sd3 import SD3
from generators.base import GeneratorError, Options
from generators.load import load
from rewards.base import RewardError
from rewards.networks.state_dicts import read_state_dict

TOTAL = 500
LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")
VALUES: tuple[Any, ...] = (None, [], {}, "", "x", 0, -1, 1.5, True, 10**30, float("nan"), [[]], {"a": {}}, "\x1b[31m")
SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
EXPLAINED = (LoraError, GeneratorError, RewardError, ConfigError)


@pytest.fixture(scope="module")
def seed_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder, and its LoRA in every layout."""
    from align.policy.lora import add_lora

    folder = tmp_path_factory.mktemp("seeds")
    pipeline = tiny.sd3_pipeline(t5=False)
    pipeline.save_pretrained(folder / "model")
    generator = SD3(pipeline, Options(size=(32, 32)))
    for _, value in add_lora(generator, 2, 4):
        value.data += 0.1
    lora, network = lora_of(generator.backbone), generator.backbone
    rows = {name: shape[0] for name, shape in linear_layers(network).items()}
    layout = layouts.LAYOUTS[type(network).__name__]
    theirs = layouts.published(lora, rows, layout)
    mine, header = as_diffusers(lora)
    peft = {key.replace("transformer.", "base_model.model.", 1): value for key, value in mine.items()}
    for name, tensors in (
        ("diffusers", mine),
        ("peft", peft),
        ("kohya", layouts.kohya(theirs)),
        ("comfyui", layouts.comfyui(theirs, layout)),
    ):
        (folder / name).mkdir()
        about = header if name == "diffusers" else None
        save_file(
            {key: value.contiguous().numpy() for key, value in tensors.items()},
            folder / name / "lora.safetensors",
            about,
        )
    (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    return folder


def spoil_bytes(file: Path, rng: random.Random) -> str:
    """Flip bits of the header or the body, cut, lengthen, or claim another length."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(("header", "body", "cut", "longer", "length", "json"))
    size = struct.unpack("<Q", data[:8])[0]
    if kind in ("header", "body"):
        for _ in range(rng.choice((1, 1, 3, 20))):
            low, high = (0, 8 + size) if kind == "header" else (8 + size, len(data))
            data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "longer":
        data += rng.randbytes(rng.randrange(1, 50))
    elif kind == "length":
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 7, size - 1, size + 1, 2**31, 2**63, rng.getrandbits(64))))
    else:
        header = json.loads(data[8 : 8 + size])
        key = rng.choice(list(header))
        entry = header[key]
        if isinstance(entry, dict) and rng.random() < 0.7:
            entry[rng.choice(list(entry))] = rng.choice((*VALUES, [0, 2**62], ["4", 2], "F8_E5M2", "I64", "C64"))
        else:
            header[key] = rng.choice(VALUES)
        text = json.dumps(header).encode()
        data[: 8 + size] = struct.pack("<Q", len(text)) + text
    file.write_bytes(bytes(data))
    return kind


def spoil_tensors(file: Path, rng: random.Random) -> str:
    """Drop, rename, reshape, retype or poison tensors."""
    tensors = load_file(file)
    kind = rng.choice(("drop", "rename", "shape", "dtype", "nan", "half", "extra", "layout", "about"))
    keys = rng.sample(sorted(tensors), min(len(tensors), rng.choice((1, 1, 2, 5))))
    about: dict[str, str] = {}
    for key in keys:
        value = tensors[key]
        if kind == "drop":
            del tensors[key]
        elif kind == "rename":
            place = rng.randrange(len(key))
            tensors[rng.choice((key[:place] + key[place + 1 :], key + ".x", "", "\x1b[31m" + key, key.upper()))] = (
                tensors.pop(key)
            )
        elif kind == "shape":
            some = np.atleast_1d(value)
            tensors[key] = rng.choice(
                (some.T, some[:1], some[:0], some.ravel(), some[None], np.ones(1, "f4"), np.ones((7, 9), "f4"))
            ).copy()
        elif kind == "dtype":
            tensors[key] = value.astype(rng.choice(("i1", "u1", "i8", "f2", "f8", "?")))
        elif kind == "nan":
            tensors[key] = np.full_like(value, rng.choice((np.nan, np.inf, -np.inf, 3e38)))
        elif kind == "extra":
            end = rng.choice(("alpha", "dora_scale", "diff", "lokr_w1", "lora_mid.weight", "bias", "lora_A.weight"))
            tensors[f"{key.split('.lora_')[0]}.{end}"] = np.ones(rng.choice(((), (1,), (2, 2))), "f4")
        elif kind == "layout":
            tensors[rng.choice(("text_encoder.", "unet.", "lora_te_", "base_model.model.", "x.")) + key] = tensors.pop(
                key
            )
    if kind == "half":
        tensors = {key: value for key, value in tensors.items() if rng.choice(("lora_A", "down")) not in key}
    if kind == "about":
        value = rng.choice((*VALUES, {"(a+)+$": 1}, {"to_q": "x"}))
        about = {"lora_adapter_metadata": json.dumps({f"transformer.{rng.choice(SETTINGS)}": value})}
    save_file(tensors, file, about or None)
    return kind


def spoil_json(file: Path, rng: random.Random) -> str:
    """Another value, another type, not JSON, not UTF-8, too deep."""
    kind = rng.choice(("value", "value", "value", "drop", "add", "bytes", "deep", "whole"))
    found = json.loads(file.read_text())
    key = rng.choice(list(found) or ["x"])
    if kind == "value":
        found[key] = rng.choice(
            (*VALUES, [None, None], ["os", "system"], ["builtins", "exec"], ["diffusers", "nothing"])
        )
    elif kind == "drop":
        found.pop(key, None)
    elif kind == "add":
        found[rng.choice(("../x", "a b", "auto_map", "_x", "vae2", "quantization_config"))] = rng.choice(
            (*VALUES, ["diffusers", "AutoencoderKL"])
        )
    text = json.dumps(found)
    if kind == "bytes":
        file.write_bytes(text.encode()[: rng.randrange(len(text))] + rng.choice((b"\xff", b"\0", b"", b"}")))
    elif kind == "deep":
        file.write_text(rng.choice(("[", '{"a":')) * 100_000)
    else:
        file.write_text(rng.choice(("[]", "null", "1", '"x"', "")) if kind == "whole" else text)
    return kind


def lora_case(seeds: Path, folder: Path, rng: random.Random, target: SD3) -> tuple[str, Callable[[], object]]:
    layout = rng.choice(LAYOUTS)
    shutil.copytree(seeds / layout, folder)
    file = folder / "lora.safetensors"
    if layout == "peft" and rng.random() < 0.3:
        kind = spoil_json(folder / "adapter_config.json", rng)
    else:
        kind = rng.choice((spoil_bytes, spoil_tensors, spoil_tensors))(file, rng)

    def call() -> None:
        said = lora_problems(str(folder), "policy.init")
        assert all(isinstance(problem.message, str) and "\x1b" not in problem.message for problem in said)
        try:
            load_lora(target, folder)
            with torch.no_grad():
                velocity = target.velocity(target.noise([0]), torch.tensor(0.5), target.encode(["a"]))
            huge = any(float(value.abs().max()) > 1e18 for pair in lora_of(target.backbone).values() for value in pair)
            assert bool(velocity.isfinite().all()) or huge
        finally:
            if getattr(target.backbone, "peft_config", {}):
                target.backbone.unload_lora()
                target.backbone.peft_config = {}

    return f"{layout} {kind}", call


def pipeline_case(seeds: Path, folder: Path, rng: random.Random) -> tuple[str, Callable[[], object]]:
    shutil.copytree(seeds / "model", folder)
    weights, configs = sorted(folder.glob("*/*.safetensors")), sorted(folder.rglob("*.json"))
    configs = [file for file in configs if file.name in ("model_index.json", "config.json", "scheduler_config.json")]
    file = rng.choice((folder / "model_index.json", rng.choice(configs), rng.choice(weights), rng.choice(weights)))
    spoil = spoil_json if file.suffix == ".json" else rng.choice((spoil_bytes, spoil_tensors))
    kind = spoil(file, rng)
    settings = GeneratorConfig(kind="sd3", path=str(folder), device="cpu", size=(32, 32))

    def call() -> None:
        said = [*generator_problems(settings), *target_problems(settings, ["to_q"])]
        assert all(isinstance(problem.message, str) and "\x1b" not in problem.message for problem in said)
        assert isinstance(scheduler_line(settings), str)
        generator = load("sd3", str(folder), options=Options(size=(32, 32)))
        generator.times(3)

    return f"{file.relative_to(folder)} {kind}", call


def state_case(seeds: Path, folder: Path, rng: random.Random) -> tuple[str, Callable[[], object]]:
    folder.mkdir()
    file = Path(shutil.copy(seeds / "diffusers" / "lora.safetensors", folder / "weights.safetensors"))
    if rng.random() < 0.5:
        state = {key: torch.from_numpy(value) for key, value in load_file(file).items()}
        file = folder / "weights.pt"
        torch.save(rng.choice((state, {"state_dict": state}, [state], {"a": 1}, state | {"b": object})), file)
        data = bytearray(file.read_bytes())
        for _ in range(rng.choice((0, 1, 10))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
        kind = "pt"
    else:
        kind = rng.choice((spoil_bytes, spoil_tensors))(file, rng)
    return f"reward {kind}", lambda: read_state_dict(file)


def cases(seeds: Path, scratch: Path, count: int, target: SD3, seed: int) -> Iterator[tuple[str, Callable[[], object]]]:
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        folder = scratch / str(index)
        kind = rng.choice(("lora", "lora", "pipeline", "pipeline", "state"))
        if kind == "lora":
            label, call = lora_case(seeds, folder, rng, target)
        elif kind == "pipeline":
            label, call = pipeline_case(seeds, folder, rng)
        else:
            label, call = state_case(seeds, folder, rng)
        yield f"case {index}: {label}", call
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(900)
def test_damaged_weights_are_read_or_refused_in_words(seed_files: Path, tmp_path: Path, share: float) -> None:
    target = SD3(tiny.sd3_pipeline(t5=False), Options(size=(32, 32)))
    wanted = int(TOTAL * share)
    count, found = failures(cases(seed_files, tmp_path, wanted, target, seed=16), EXPLAINED)
    assert count == wanted
    assert not found, "\n".join(found)
