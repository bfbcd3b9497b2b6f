"""The client of vLLM-Omni against a stand-in that speaks its protocol: images become latents here."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save
from standin import Fake, description, serving
from tiny import sd3_pipeline
from tiny_run import final_tensors, settings

from align.config.engines import VllmOmniEngine
from align.config.load import load_config
from align.config.sampling import Sampler
from align.config.settings import Config
from align.data.media import encode, to_pixels
from align.policy.build import add_trained, build_generator, parameters_of
from align.rollout.elsewhere import remote_of
from align.rollout.engine import Order, Remote
from align.rollout.lora_folder import PeftFolder
from align.rollout.rollout import decode_to_cpu, draw
from align.rollout.servers import VLLM_OMNI
from align.rollout.vllm_omni_engine import VllmOmni
from align.training.trainer import train
from alignflow.errors import ConfigError, TrainingError
from generators.base import Generator

ORDER = Order(["a cat", "a dog"], [1, 2], [3, 4], ())


class StandIn(Fake):
    """vLLM-Omni's server.

    Args:
        generator: samples; None = images are grey, and another grey with a LoRA.
        ignores: LoRAs are ignored.
    """

    protocol = VLLM_OMNI

    def __init__(self, generator: Generator | None = None, ignores: bool = False) -> None:
        super().__init__()
        self.generator, self.ignores = generator, ignores
        self.plain = copy.deepcopy(generator.backbone) if generator is not None else None

    def routes(self, body: Any) -> dict[str, Any]:
        return {**super().routes(body), f"POST {VLLM_OMNI.path}": lambda: self.image(body)}

    @torch.no_grad()
    def image(self, body: dict[str, Any]) -> bytes:
        lora = None if self.ignores else body.get("lora")
        width, height = map(int, body["size"].split("x"))
        if self.generator is None:
            media = torch.full((1, 3, height, width), 0.4 if lora else 0.6)
        else:
            with self.lock:
                network = copy.deepcopy(self.plain)
                if lora:
                    network = PeftModel.from_pretrained(network, lora["path"]).merge_and_unload()
                self.generator.backbone.load_state_dict(network.state_dict())
                sampler = Sampler(kind="ode", steps=body["num_inference_steps"], guidance=body["guidance_scale"])
                latents, _ = draw(self.generator, self.generator.encode([body["prompt"]]), [body["seed"]], sampler)
                media = decode_to_cpu(self.generator, latents, 1)[0].float() / 255
        return encode(to_pixels(media)[0], ".png")

    def sent(self, found: bytes, fault: str) -> tuple[str, bytes]:
        if fault == "jpeg":
            found = b"\xff\xd8\xff"
        if fault == "cut":
            found = found[:60]
        rows = [] if fault == "none" else [{"b64_json": base64.b64encode(found).decode()}]
        rows = [{"url": "x"}] if fault == "url" else rows
        body = json.dumps({"created": 1, "data": rows}).encode()
        return "application/json", body[:40] if fault == "truncated" else body


def weights(b: float = 0.5) -> bytes:
    name = "pytorch_lora_weights.safetensors/transformer.blocks.0.attn.to_q.lora_{}.weight"
    return save({name.format("A"): torch.ones(2, 4), name.format("B"): torch.full((4, 2), b)})


def remote(url: str, folder: Path, **changes: Any) -> Remote:
    quick = {"retries": 0, "backoff": 0.0, "timeout": 5.0, "start_timeout": 2.0}
    engine = VllmOmniEngine(url=url, folder=str(folder), **{**quick, **changes})
    generator: Any = SimpleNamespace(
        network_calls=0, size=(16, 24), options=SimpleNamespace(negative_prompt="blurry"), device="cpu",
        latent_shape=lambda: (3, 2, 3), encode_media=lambda media: torch.nn.functional.avg_pool2d(media, 8),
    )  # fmt: skip
    config: Any = SimpleNamespace(rollout=SimpleNamespace(sampler=Sampler(steps=3, guidance=2.0), engine=engine))
    return Remote(VllmOmni(engine, config, generator), generator, {}, engine.retries, engine.backoff)


def test_images_become_latents(tmp_path: Path) -> None:
    server = StandIn()
    with serving(server) as url:
        made = remote(url, tmp_path)
        [reply] = made([ORDER], weights())
        assert made([ORDER], weights(0.7))[0].lost == {}
    assert (reply.lost, reply.seeds) == ({}, [1, 2])
    assert reply.media.shape == (2, 3, 16, 24)
    assert reply.media.unique().tolist() == [102]
    torch.testing.assert_close(reply.latents, torch.full((2, 3, 2, 3), 0.4))
    assert made.generator.network_calls == 24
    bodies = [body for path, body in server.asked if path == VLLM_OMNI.path]
    assert ["lora" in body for body in bodies] == [True, False, True, True, True]  # compared once without
    first = bodies[0]
    assert (first["size"], first["seed"], first["num_inference_steps"], first["guidance_scale"]) == ("24x16", 1, 3, 2.0)
    assert (first["n"], first["output_format"], first["negative_prompt"]) == (1, "png", "blurry")
    assert first["lora"]["path"].startswith(str(tmp_path))
    assert first["lora"]["path"] != bodies[3]["lora"]["path"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("jpeg", "the image is not a PNG, whose pixels are exact"),
        ("cut", "is not an image that can be read"),
        ("none", "it does not hold one image"),
        ("url", "'b64_json' is missing"),
        ("truncated", "did not reply with a JSON object"),
        ("dead", "cannot be reached"),
        ("refused", "Invalid sampling params: width"),
    ],
)
def test_replies_that_are_not_used(tmp_path: Path, fault: str, says: str) -> None:
    server = StandIn()
    with serving(server) as url:
        made = remote(url, tmp_path)
        server.faults = [fault]
        lost = made([Order(["a"], [1], [2], ())], weights())[0].lost
    assert says in lost[0], lost
    assert made.take()["lost"] == 1


def test_a_server_that_ignores_loras(tmp_path: Path) -> None:
    with serving(StandIn(ignores=True)) as url:
        made = remote(url, tmp_path)
        assert made([ORDER], weights(0.0))[0].lost == {}  # a new LoRA changes nothing
        lost = made([ORDER], weights())[0].lost
    assert "the image is the same with the policy's LoRA as without" in lost[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"without": "lora"}, "has no field lora"),
        ({"words": "a registered name"}, "the field lora of /v1/images/generations has no path"),
        ({"without": "/v1/images/generations"}, "it has no /v1/images/generations"),
    ],
)
def test_another_version_is_an_error(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    server = StandIn()
    server.spec = description(VLLM_OMNI, **changes)
    with serving(server) as url, pytest.raises(TrainingError, match=f"{says}; it should be started with: vllm serve"):
        remote(url, tmp_path)


@pytest.mark.parametrize(
    ("file", "words", "says"),
    [
        ("grpo", ["rollout.recompute=true"], "grpo needs the latents of the sampler's steps, and vllm_omni returns"),
        ("nft", ["rollout.sampler.kind=flow_sde"], "vllm_omni has no sampler flow_sde: use one of ode"),
        ("nft", ["rollout.sampler.steps=201"], "is at most 200 with vllm_omni"),
        ("nft", ["rollout.sampler.guidance=21"], "is 0 to 20 with vllm_omni"),
        ("nft", ["generator.kind=wan"], "wan makes videos, and vllm_omni is used for images alone: use pool or sglang"),
    ],
)
def test_settings_that_are_refused(file: str, words: list[str], says: str) -> None:
    engine = "rollout.engine={kind: vllm_omni, url: 'http://127.0.0.1:8000', folder: /tmp/policies}"
    with pytest.raises(ConfigError, match=says):
        load_config(f"configs/shapes/{file}.yaml", [engine, *words])


def test_the_folder_in_pefts_layout(tmp_path: Path) -> None:
    folder = PeftFolder(str(tmp_path), None)
    folder.write(weights(), "abc")
    assert folder.paths("abc") == {"transformer": str(tmp_path / "abc")}
    about = json.loads((tmp_path / "abc" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["target_modules"]) == (2, 2, ["blocks.0.attn.to_q"])


# -- with a real generator --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    return folder


def tiny(folder: Path, model: Path, url: str, recipe: str = "nft") -> Config:
    engine = {"kind": "vllm_omni", "url": url, "folder": str(folder / "policies"), "retries": 0, "backoff": 0.0}
    return settings(
        folder, model, recipe, prompts={"heldout": None}, evaluate={"rewards": {}}, train={"unscored": 9, "steps": 2},
        rollout={"engine": engine, "group": 2},
    )  # fmt: skip


def plain(folder: Path, model: Path) -> Generator:
    config = settings(folder, model)
    return build_generator(config.generator, config.memory, "cpu")


def test_images_are_those_of_the_policy(model: Path, tmp_path: Path) -> None:
    with serving(StandIn(plain(tmp_path, model))) as url:
        config = tiny(tmp_path, model, url)
        generator = build_generator(config.generator, config.memory, "cpu")
        add_trained(config, generator)
        for index, (_, value) in enumerate(parameters_of(config, generator)):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) / 4
        made = remote_of(config, generator)
        assert made is not None
        [reply] = made([ORDER], made.weights())
    assert reply.lost == {}
    sampler = config.rollout.sampler  # type: ignore[union-attr]
    latents, _ = draw(generator, generator.encode(ORDER.prompts), ORDER.seeds, sampler)
    ours, _ = decode_to_cpu(generator, latents, 2)
    assert (reply.media.int() - ours.int()).abs().max() <= 1
    with torch.no_grad():
        again = generator.encode_media(reply.media.float() / 255)
    torch.testing.assert_close(reply.latents, again, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nft", "flow_dpo"])
def test_a_run_trains_on_images(model: Path, tmp_path: Path, recipe: str) -> None:
    with serving(StandIn(plain(tmp_path, model))) as url:
        config = tiny(tmp_path, model, url, recipe)
        train(config)
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows if row["event"] == "train"] == [0, 0]
    assert all(value.isfinite().all() for value in final_tensors(config).values())
