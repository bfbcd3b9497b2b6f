"""Samples in trackers: TensorBoard's own files are read back, W&B and trackio are stand-ins that keep what they get."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from align.config.load import load_config
from align.data.grids import save_samples
from align.training.tracking import log_samples, samples_of, sent_config


def tracker(name: str, inner: Any) -> Any:
    """As accelerate's trackers look from outside."""
    return types.SimpleNamespace(name=name, tracker=inner)


def images(folder: Path) -> Path:
    pixels = [np.full((8, 12, 3), 40 * row, np.uint8) for row in range(2)]
    return save_samples(folder, pixels, ["a cat", "a dog"], [1, 2], {"gold": [0.25, None], "reward": [1.5, 2.0]})


def videos(folder: Path, kind: str = "webp") -> Path:
    frames = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (0, 120, 240)])
    return save_samples(folder, [frames], ["a ball falls"], [1], fps=4, video=kind)


def read(folder: Path) -> dict[str, list[tuple[int, Image.Image]]]:
    """Tag -> (step, image) of TensorBoard's files."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    found = {tag: events.Images(tag) for tag in events.Tags()["images"]}
    return {
        tag: [(one.step, Image.open(io.BytesIO(one.encoded_image_string))) for one in rows]
        for tag, rows in found.items()
    }


class Service:
    """Stands for the module and the run of a service."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []

    def Image(self, file: str, caption: str) -> tuple[str, str, bytes]:  # noqa: N802 - the name of both modules
        return "image", caption, Path(file).read_bytes()

    def Video(self, file: str, caption: str) -> tuple[str, str, bytes]:  # noqa: N802 - the name of both modules
        return f"video{Path(file).suffix}", caption, Path(file).read_bytes()

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))


@pytest.fixture(params=["wandb", "trackio"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Service]:
    made = Service()
    monkeypatch.setitem(sys.modules, request.param, made)
    return request.param, made


def test_tensorboard_has_every_sample_at_every_step(tmp_path):
    writer = SummaryWriter(str(tmp_path / "log"))
    for step in (0, 5):
        assert log_samples([tracker("tensorboard", writer)], images(tmp_path / f"step-{step}"), step) == []
    found = read(tmp_path / "log")
    assert {tag: [step for step, _ in rows] for tag, rows in found.items()} == {
        "samples/000": [0, 5], "samples/001": [0, 5],
    }  # fmt: skip
    assert np.array_equal(np.asarray(found["samples/001"][0][1]), np.full((8, 12, 3), 40))


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_tensorboard_plays_videos(tmp_path, kind):
    writer = SummaryWriter(str(tmp_path / "log"))
    assert log_samples([tracker("tensorboard", writer)], videos(tmp_path / "step", kind), 3) == []
    ((step, image),) = read(tmp_path / "log")["samples/000"]
    assert (step, image.format, image.n_frames, image.size) == (3, "GIF", 3, (16, 16))
    assert image.info["duration"] == 250


def test_services_get_images_with_prompt_and_scores(tmp_path, service):
    name, made = service
    assert log_samples([tracker(name, made)], images(tmp_path / "step"), 5) == []
    ((values, step),) = made.logged
    assert step == 5
    sent = values["samples"] if name == "wandb" else list(values.values())
    assert [(kind, caption) for kind, caption, _ in sent] == [
        ("image", "a cat\ngold 0.25, reward 1.5"), ("image", "a dog\nreward 2"),
    ]  # fmt: skip
    assert sent[0][2] == (tmp_path / "step" / "000.png").read_bytes()
    assert name == "wandb" or list(values) == ["samples/000", "samples/001"]


@pytest.mark.parametrize(("kind", "expected"), [("webp", "video.gif"), ("gif", "video.gif"), ("mp4", "video.mp4")])
def test_services_get_videos_that_they_play(tmp_path, service, kind, expected):
    name, made = service
    folder = videos(tmp_path / "step", kind)
    assert log_samples([tracker(name, made)], folder, 5) == []
    sent = made.logged[0][0]["samples"][0] if name == "wandb" else made.logged[0][0]["samples/000"]
    assert sent[0] == expected
    if kind != "webp":
        assert sent[2] == (folder / f"000.{kind}").read_bytes()


def test_a_tracker_that_fails_costs_its_pictures_alone(tmp_path, service, monkeypatch):
    name, made = service
    writer = SummaryWriter(str(tmp_path / "log"))
    monkeypatch.setattr(made, "log", lambda values, step: 1 / 0)
    folder = images(tmp_path / "step")
    failed = log_samples([tracker(name, made), tracker("tensorboard", writer)], folder, 7)
    assert failed == [f"{name} has no samples of step 7: ZeroDivisionError: division by zero"]
    assert [step for step, _ in read(tmp_path / "log")["samples/000"]] == [7]


def test_other_trackers_get_numbers_only(tmp_path):
    assert log_samples([tracker("mlflow", None)], tmp_path / "not there", 1) == []


def test_prompts_are_shown_as_plain_text(tmp_path):
    pixels = [np.zeros((8, 8, 3), np.uint8)]
    folder = save_samples(tmp_path / "step", pixels, ["a \x1b[31mred\x00 cat"], [1])
    (sent,) = samples_of(folder, tmp_path)
    assert "\x1b" not in sent.caption
    assert "\x00" not in sent.caption


def test_a_tracker_gets_the_resolved_config(tmp_path):
    """Accelerate hands it to TensorBoard as hyperparameters, which are numbers, booleans and text alone."""
    shipped = Path(__file__).parent.parent / "configs/shapes/nft.yaml"
    sent = sent_config(load_config(shipped, ["train.lr=0.003", "trackers=[tensorboard]"]))
    assert (sent["train.lr"], sent["recipe.kind"], sent["trackers"]) == (0.003, "nft", '["tensorboard"]')
    assert {type(value) for value in sent.values()} <= {bool, int, float, str}
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("mine", config=sent)
    accelerator.end_training()
    (file,) = tmp_path.rglob("hparams.yml")
    assert "train.lr: 0.003" in file.read_text()
