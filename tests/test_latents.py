"""Stored media are encoded once; the latents are found again by the content of the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import final_tensors, policy_gap, settings
from torch import Tensor

from align.data.latents import Latents, key_of
from align.policy.build import build_generator
from align.training.trainer import train
from alignflow.errors import RunFolderError
from generators.base import Generator


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of media that the VAE encoded, call by call."""
    counts: list[int] = []
    plain = Generator.encode_media

    def counted(self: Generator, media: Tensor) -> Tensor:
        counts.append(len(media))
        return plain(self, media)

    monkeypatch.setattr(Generator, "encode_media", counted)
    return counts


def pairs(folder: Path) -> Path:
    rows = []
    for number in range(3):
        for name in ("chosen", "rejected"):
            shade = 80 * number + (40 if name == "chosen" else 0)
            Image.new("RGB", (32, 32), (shade, 10, 200)).save(folder / f"{name}{number}.png")
        rows.append({"prompt": "a cat", "chosen": f"chosen{number}.png", "rejected": f"rejected{number}.png"})
    table = folder / "pairs.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    return table


def run(folder: Path, model: Path, table: Path, cache: str, steps: int = 4, resume: bool = False) -> Any:
    folder.mkdir(exist_ok=True)
    config = settings(
        folder, model, "flow_dpo", rollout={"kind": "pairs", "file": str(table), "prompts": 2},
        reward=None, train={"steps": steps}, memory={"cache_latents": cache}, evaluate={"every": 0, "at_start": False},
        prompts={"heldout": None},
    )  # fmt: skip
    train(config, resume=resume)
    return config


@pytest.mark.slow
def test_every_file_is_encoded_once_and_trains_the_same_weights(
    model: Path, tmp_path: Path, encoded: list[int]
) -> None:
    table, found, counts = pairs(tmp_path), {}, {}
    for cache in ("none", "memory", "disk"):
        encoded.clear()
        found[cache] = final_tensors(run(tmp_path / cache, model, table, cache))
        counts[cache] = sum(encoded)
    assert counts == {"none": 4 * 4, "memory": 6, "disk": 6}
    assert policy_gap(found["memory"], found["disk"]) == 0
    assert len([*(tmp_path / "disk/run/latents").glob("*.safetensors")]) == 6


def test_a_resumed_run_reads_the_files_and_replaces_a_damaged_one(
    model: Path, tmp_path: Path, encoded: list[int]
) -> None:
    table = pairs(tmp_path)
    whole = run(tmp_path / "whole", model, table, "disk")
    run(tmp_path / "parts", model, table, "disk", steps=3)
    files = sorted((tmp_path / "parts/run/latents").glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:100])
    encoded.clear()
    parts = run(tmp_path / "parts", model, table, "disk", resume=True)
    assert sum(encoded) <= 1
    assert policy_gap(final_tensors(whole), final_tensors(parts)) == 0


def test_remembered_latents_are_those_of_the_encoder(model: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, model)
    generator = build_generator(config.generator, config.memory, "cpu")
    media = [*torch.rand(3, 3, 32, 32)]
    plain, kept = (Latents(generator, cache, tmp_path / "latents")(media) for cache in ("none", "memory"))
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-5)


def test_a_key_is_of_the_pixels_and_their_shape() -> None:
    media = torch.rand(3, 4, 6)
    assert key_of(media) == key_of(media.clone())
    assert key_of(media) != key_of(media.flip(0))
    assert key_of(media) != key_of(media.reshape(3, 6, 4))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file stands here")

    class Fake:
        device = torch.device("cpu")

        def encode_media(self, media: Tensor) -> Tensor:
            return media

    with pytest.raises(RunFolderError, match="latents"):
        Latents(Fake(), "disk", tmp_path / "latents")([torch.rand(3, 2, 2)])  # type: ignore[arg-type]
