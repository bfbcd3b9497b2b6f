"""What notebooks call: generators, rewards, samples and steps without a run."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_run import final_tensors, settings

import alignflow
from align.config.load import load_config
from align.evaluation.evaluate import sample_media

ROOT = Path(__file__).parent.parent


def test_a_generator_by_kind_is_that_of_the_config_and_samples_alike() -> None:
    config = load_config(ROOT / "configs/shapes/nft.yaml")
    prompts = ["two red circles", "a green cross"]
    by_kind, by_config = alignflow.load_generator("sd3", "shapes", device="cpu"), alignflow.load_generator(config)
    media = alignflow.sample(by_kind, prompts)
    assert media.shape == (2, 3, 64, 64)
    assert torch.equal(media, alignflow.sample(by_config, prompts, [0, 1], steps=10))
    assert torch.equal(media, sample_media(by_config, prompts, [0, 1], config.evaluate.sampler))
    assert torch.allclose(media[1:], alignflow.sample(by_kind, prompts[1:], [1]), atol=1e-5)  # not of its batch
    scores = alignflow.load_reward({"kind": "shapes", "score": "strict"}, "cpu")(media, prompts).values
    assert set(scores.tolist()) <= {0.0, 1.0}
    assert torch.equal(alignflow.load_reward("{kind: shapes, score: strict}", "cpu")(media, prompts).values, scores)
    assert alignflow.grid(media, prompts).width > 128


def test_the_adapter_is_found_from_the_model() -> None:
    weights = ROOT / "alignflow/worlds/shapes/weights/sd3"
    found = [alignflow.load_generator(path=path, device="cpu") for path in ("shapes", weights, "shapes-video")]
    assert [generator.pipeline_class for generator in found] == 2 * ["StableDiffusion3Pipeline"] + ["WanPipeline"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: alignflow.load_generator("sd33", "shapes"), "no such generator 'sd33'; did you mean 'sd3'"),
        (lambda: alignflow.load_generator("sd3", "shapes", dtipe="float32"), "dtipe"),
        (
            lambda: alignflow.load_generator(path="owner/name"),
            "its pipeline is unknown: give its kind, one of cogvideox",
        ),
        (lambda: alignflow.load_generator(), "path"),
        (lambda: alignflow.load_reward({"kind": "shapes", "skore": "strict"}), "skore"),
        (lambda: alignflow.sample(None, ["a", "b"], [1]), "2 prompts need as many seeds, given 1"),  # type: ignore[arg-type]
        (lambda: alignflow.sample(None, ["a"], kind="euler"), "kind"),  # type: ignore[arg-type]
        (lambda: alignflow.animation(torch.zeros(2, 3, 8)), r"given \[2, 3, 8\]"),
        (lambda: alignflow.grid(torch.zeros(2, 3, 8, 8), ["a"]), "2 samples need as many captions, given 1"),
    ],
)
def test_mistakes_are_said_in_words(call: Any, says: str) -> None:
    with pytest.raises((alignflow.ConfigError, ValueError), match=says):
        call()


def test_steps_by_hand_are_those_of_a_run(model: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    for name in ("run", "hand"):
        (tmp_path / name).mkdir()
    whole = settings(tmp_path / "run", model, evaluate={"every": 0}, train={"steps": 2})
    alignflow.train(whole, on_step=lambda trainer, row: seen.append(row | {"at": str(trainer.run.path)}))
    assert [row["step"] for row in seen] == [1, 2]
    assert seen[0]["at"] == str(whole.run_dir)
    logged = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in logged if row["event"] == "train"] == [row["loss"] for row in seen]

    mine = settings(tmp_path / "hand", model, evaluate={"every": 0}, train={"steps": 2})
    with alignflow.training(mine) as trainer:
        rows = [trainer.step(n) for n in range(2)]
        trained = {f"{name}": value.detach().clone() for name, value in trainer.roles.parameters}
    assert [row["loss"] for row in rows] == [row["loss"] for row in seen]
    stored = final_tensors(whole)
    assert trained.keys() == {key.removeprefix("policy/") for key in stored if key.startswith("policy/")}
    assert all(torch.equal(value, stored[f"policy/{name}"]) for name, value in trained.items())


def test_an_animation_has_the_frames_of_the_video_enlarged() -> None:
    video = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    made = Image.open(BytesIO(alignflow.animation(video, fps=8, width=24)))
    assert (made.size, made.n_frames) == ((24, 16), 5)
