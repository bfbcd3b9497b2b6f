"""The benchmark of one card: random pipelines of the real classes, the driver's time, and the table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_cases import packed

from align.checking.architectures import KNOWN, on_meta
from align.config.sampling import Sampler
from align.data.files import write_json
from align.rollout.rollout import decode, draw
from benchmarks import card, roofline
from benchmarks.helpers import random_weights
from benchmarks.helpers.card_page import table


@pytest.mark.parametrize("model", card.MODELS)
def test_generator_and_pipeline_make_the_same_samples(model: str) -> None:
    config = card.config_of(model, "nft", True, ["generator.dtype=float32"])
    options, kind = config.generator, config.generator.kind
    guidance, prompts = config.rollout.sampler.guidance, ["one", "two"]
    ours = random_weights.generator(kind, options.path, dtype="float32", options=options)
    theirs = random_weights.pipeline(kind, options.path, "float32", "cpu")
    sampler = Sampler(kind="ode", steps=3, guidance=guidance)
    latents, _ = draw(ours, ours.encode(prompts), [1, 2], sampler, start=[3, 4])
    noise = ours.noise([3, 4])
    given = random_weights.call(kind, theirs, prompts, options, guidance)
    given["latents"] = packed(ours, noise) if kind in ("flux", "qwen_image") else noise
    found = theirs(**given, num_inference_steps=3, output_type="pt")[0]
    expected = torch.as_tensor(found).reshape(decode(ours, latents, 2).shape)
    torch.testing.assert_close(decode(ours, latents, 2), expected, atol=1e-4, rtol=0)


def test_the_random_reward_has_the_size_of_pickscore() -> None:
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**random_weights.clip_settings(False)))
    assert sum(value.numel() for value in model.parameters()) == 986_109_441


def test_a_random_network_has_the_dtypes_of_a_loaded_one() -> None:
    part = KNOWN[random_weights.smaller("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")]["transformer"]
    network = random_weights.network(part, "cpu", torch.bfloat16)
    assert {value.dtype for value in network.blocks[0].ffn.parameters()} == {torch.bfloat16}
    assert network.blocks[0].scale_shift_table.dtype == torch.float32  # _keep_in_fp32_modules of the class
    assert [value.shape for value in network.parameters()] == [value.shape for value in on_meta(part).parameters()]


def test_a_part_measures_a_step_and_its_gap() -> None:
    found = card.step("flux-dev", "grpo", True)
    assert found["samples"] == found["group"] == 2
    assert set(found["seconds"]) >= {"rollout", "decode", "reward", "update"}
    assert set(found["bare"]) == {"network", "decode", "reward"}
    assert found["gap"]["max"] < 0.05  # bfloat16 and the same batches
    assert found["mfu"] == {}  # no card, no peak


def test_samples_and_mfu_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "work", lambda config: roofline.Work(1.0, 2e12, 5e12, 0))
    config: Any = SimpleNamespace(rollout=SimpleNamespace(group=16))
    peak = 7e12 / (card.STEP * card.USE)  # one sample fits
    assert [card.samples_of(config, value) for value in (None, peak, 5.5 * peak, 100 * peak)] == [16, 2, 5, 16]
    shares = card._mfu(config, {"rollout": 4.0, "update": 5.0}, 8, 1e13)
    assert shares == pytest.approx({"rollout": 0.4, "update": 0.8})


def test_parts_are_kept_dropped_and_told(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("a", "nft"), ("a", "grpo"), ("b", "nft"), ("b", "grpo")]
    write_json(tmp_path / "a.nft.json", {})
    asked: list[tuple[str, str, float]] = []
    clock = [1000.0]
    monkeypatch.setattr(card, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(model: str, part: str, seconds: float) -> str:
        asked.append((model, part, seconds))
        clock[0] += seconds
        return "stopped" if model == "a" else ""

    missing = card.run_all(tmp_path, parts, run, total=200 + card.LONGEST)
    assert asked == [("a", "grpo", card.LONGEST), ("b", "nft", card.LONGEST)]  # a.nft is there
    assert missing == ["a grpo: stopped", "b grpo: dropped, 20 s are left; run the command again"]


def test_the_table(tmp_path: Any) -> None:
    seconds = {"rollout": 2.0, "decode": 1.0, "reward": 0.5, "update": 4.0, "other": 0.5}
    found = {
        "card": "X", "torch": "2", "samples": 6, "group": 24, "seconds": seconds, "images_per_second": 0.75,
        "bare": {"network": 5.0, "decode": 1.0, "reward": 0.4}, "mfu": {"rollout": 0.4, "update": 0.35},
        "memory_gb": 20.04, "check_gb": 21.5, "gap": {},
    }  # fmt: skip
    write_json(tmp_path / "flux-dev.nft.json", found)
    write_json(tmp_path / "flux-dev.grpo.json", {**found, "gap": {"mean": 1e-3, "p99": 2e-3, "max": 3e-3}})
    write_json(tmp_path / "flux-dev.pipeline.json", {"images_per_second": 1.5})
    lines = table(tmp_path, card.MODELS).splitlines()
    start = "6 of 24 | 0.75 | 2.00 | 1.00 | 0.50 | 4.00 | 40 %, 35 % | +25 % | 20.0, 21.5"
    assert lines[2] == f"| `flux-dev/nft` | {start} | 2, 1.5 |  |"
    assert lines[3] == f"| `flux-dev/grpo` | {start} |  | 0.001, 0.002 |"
    assert lines[5].startswith("X, torch 2. Weights are random")
