"""Samples of SGLang-diffusion: their layouts, and runs on a stand-in that samples with a real generator."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from tiny import sd3_pipeline
from tiny_run import final_tensors, policy_gap, settings

pytest.importorskip("msgpack", reason="the client needs: pip install 'alignflow[sglang]'")

from standin import StandIn, serving, wire

from align.config.settings import Config
from align.maths.seeds import derive
from align.policy.build import add_trained, build_generator, parameters_of
from align.rollout import sources
from align.rollout.elsewhere import remote_of
from align.rollout.engine import Order
from align.rollout.paths import arranged
from align.rollout.rollout import draw
from align.rollout.servers import SEEDS
from align.rollout.sglang_engine import media_of, tensor
from align.training.trainer import train

# -- tensors and layouts ----------------------------------------------------------------------------------------------


def test_tensors_travel_as_bytes_or_base64() -> None:
    value = torch.randn(2, 3).bfloat16()
    sent = wire(value)
    assert torch.equal(tensor(sent), value)
    assert torch.equal(tensor(sent | {"data": base64.b64encode(sent["data"]).decode()}), value)
    for wrong in (None, {}, sent | {"data": "%"}, sent | {"data": 5}, sent | {"shape": [3, 2]}):
        with pytest.raises(ValueError, match="tensor"):
            tensor(wrong)


def test_images_and_videos_of_every_layout() -> None:
    image = torch.rand(3, 4, 6)
    expected = (image * 255).round().byte()
    for value in (image, image.movedim(0, -1), image[:, None], expected):
        found, lost = media_of(value, None)
        assert torch.equal(found, expected)
        assert not lost
    video = torch.rand(3, 5, 4, 6)
    found, _ = media_of(video, 5)
    assert torch.equal(found, (video.movedim(0, 1) * 255).round().byte())
    assert torch.equal(media_of(video.movedim(0, -1), 5)[0], found)
    assert media_of(torch.full((3, 2, 2), torch.nan), None)[1]
    for wrong, frames in ((torch.rand(4, 4), None), (torch.rand(5, 4, 6), None), (video, None)):
        with pytest.raises(ValueError, match=r"shape|frames"):
            media_of(wrong, frames)


def test_packed_latents_are_unpacked() -> None:
    from diffusers import FluxPipeline

    latents = torch.arange(16 * 4 * 6.0).reshape(1, 16, 4, 6)
    packed = FluxPipeline._pack_latents(latents, 1, 16, 4, 6)[0]
    assert torch.equal(arranged(packed, (16, 4, 6)), latents[0])
    assert torch.equal(arranged(latents[0][:, None], (16, 4, 6)), latents[0])
    assert torch.equal(arranged(latents[0], (16, 4, 6)), latents[0])
    assert arranged(torch.zeros(5, 5), (16, 4, 6)).shape == (5, 5)  # refused as another shape


# -- with a real generator --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd3"
    sd3_pipeline(t5=False).save_pretrained(folder)
    return folder


def tiny(folder: Path, model: Path, url: str, recipe: str = "nft", **rollout: Any) -> Config:
    engine = {"kind": "sglang", "url": url, "folder": str(folder / "policies"), "retries": 0, "backoff": 0.0}
    return settings(
        folder, model, recipe, prompts={"heldout": None}, evaluate={"rewards": {}}, train={"unscored": 9, "steps": 2},
        rollout={"engine": engine, "group": 2, **rollout},
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "guidance"), [("ode", 1.0), ("flow_sde", 2.0), ("cps", 1.0)])
def test_samples_are_those_of_the_policy(model: Path, tmp_path: Path, kind: str, guidance: float) -> None:
    plain = build_generator(settings(tmp_path, model).generator, settings(tmp_path, model).memory, "cpu")
    with serving(StandIn(plain)) as url:
        config = tiny(tmp_path, model, url, sampler={"kind": kind, "steps": 3, "guidance": guidance})
        generator = build_generator(config.generator, config.memory, "cpu")
        add_trained(config, generator)
        for index, (_, value) in enumerate(parameters_of(config, generator)):
            value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) / 4
        made = remote_of(config, generator)
        assert made is not None
        steps = () if kind == "ode" else (0, 1)
        order = Order(["a cat", "two dogs"], [11, 12], [1, 2], steps, keep=bool(steps))
        [reply] = made([order], made.weights())
    assert reply.lost == {}
    sampler = config.rollout.sampler  # type: ignore[union-attr]
    ours, path = draw(generator, generator.encode(order.prompts), order.seeds, sampler, steps=steps, keep=bool(steps))
    torch.testing.assert_close(reply.latents, ours, atol=2e-5, rtol=1e-4)
    base = build_generator(config.generator, config.memory, "cpu")
    first, _ = draw(base, generator.encode(order.prompts), order.seeds, sampler, steps=steps)
    assert (reply.latents - first).abs().max() > 1e-2  # the LoRA arrived
    if path is not None:
        assert reply.states is not None
        torch.testing.assert_close(reply.states[:, 1:], path.x_next, atol=2e-5, rtol=1e-4)


def trained_rows(config: Config) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["nft", "grpo"])
def test_a_run_on_the_engine_is_the_run_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(sources, "derive", lambda *parts: derive(*parts) % SEEDS)  # the seeds that the engine is sent
    plain = build_generator(settings(tmp_path, model).generator, settings(tmp_path, model).memory, "cpu")
    server, found = StandIn(plain), {}
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
        with serving(server) as url:
            engine = {} if name == "there" else {"engine": None}
            config = tiny(tmp_path / name, model, url, recipe, recompute=recipe == "grpo", **engine)
            train(config)
        found[name] = config
    rows = trained_rows(found["there"])
    assert [row["missing"] for row in rows] == [0, 0]
    assert [row["engine/stale"] + row["engine/wrong"] for row in rows] == [0, 0]
    assert [path for path, _ in server.asked].count("/rollout/generate") == 2 * 4
    assert [row["reward"] for row in rows] == pytest.approx(
        [row["reward"] for row in trained_rows(found["here"])], abs=1e-5
    )
    assert policy_gap(*map(final_tensors, found.values())) < 1e-3
    if recipe == "grpo":
        assert [row["ratio"] for row in rows] == [1, 1]
        assert rows[0]["logp_gap/max"] == 0


TRAIN = """
import sys
from pathlib import Path
from align.config.load import load_config
from align.training.trainer import train
train(load_config(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_two_processes_share_a_server(model: Path, tmp_path: Path) -> None:
    plain = build_generator(settings(tmp_path, model).generator, settings(tmp_path, model).memory, "cpu")
    server = StandIn(plain)
    with serving(server) as url:
        config = tiny(tmp_path, model, url, "grpo", recompute=True)
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config.model_dump(mode="json")))
        launch(2, tmp_path, TRAIN, str(file))
    rows = trained_rows(config)
    assert [row["samples"] for row in rows] == [4, 4]
    assert [row["missing"] + row["engine/stale"] + row["engine/wrong"] for row in rows] == [0, 0]
    policies = {body["lora_path"] for path, body in server.asked if path == "/v1/set_lora"}
    assert len(policies) == 2  # one for each rollout, the same from both processes
