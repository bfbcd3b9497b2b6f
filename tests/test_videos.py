"""Videos of video generators: written moving, played on the page, scored from files, learned from in pairs."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import tiny_video
import torch
import written
from PIL import Image
from report_run import build_run

from align.config.sections import Samples
from align.config.settings import Config
from align.data import video
from align.data.grids import save_samples
from align.data.inputs import read_sample
from align.data.media import encode, read_pixels
from align.data.prompts import Prompt
from align.evaluation.evaluate import Evaluation, save_grid
from align.maths.seeds import derive
from align.report import write_report
from align.training.trainer import train
from alignflow.errors import DataError

run = written.run
REWARD = "tests.test_videos:motion"
VIDEOS = np.random.default_rng(2).integers(0, 256, (2, 5, 32, 48, 3), dtype=np.uint8)


def motion(media, prompts):
    """Mean change from frame to frame."""
    return media.diff(dim=1).abs().flatten(1).mean(dim=1)


def embedded(page: str) -> list[bytes]:
    """The webp files inside a page, in their order."""
    return [base64.b64decode(data) for data in re.findall(r'<img src="data:image/webp;base64,([^"]+)"', page)]


def config_of(folder: Path, **sections) -> Config:
    model = folder / "model"
    if not model.is_dir():
        tiny_video.wan().save_pretrained(model)
    tree = {"kind": "wan", "path": str(model), "size": [32, 48], "frames": 5, "text_length": 40, "device": "cpu"}
    few = {"prompts": 2, "group": 2, "sampler": {"steps": 2}}
    base = {"rollout": few, "reward": {"kind": REWARD}, "train": {"steps": 1}}
    looks = {"every": 0, "prompts": 2, "sampler": {"steps": 2}}
    return tiny_run.settings(folder, model, generator=tree, evaluate=looks, **{**base, **sections})


def test_a_run_of_videos_is_seen_moving(tmp_path):
    config = config_of(tmp_path)
    assert train(config)["status"] == "finished"
    folder = config.run_dir / "samples" / "step-000000"
    names = ["000.png", "000.webp", "001.png", "001.webp", "grid.png", "prompts.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    video = read_pixels(folder / "000.webp")
    assert video.shape == (5, 32, 48, 3)
    assert np.array_equal(read_pixels(folder / "000.png"), video[2])
    after = read_pixels(config.run_dir / "samples" / "step-000001" / "000.webp")
    shown = embedded((config.run_dir / "report.html").read_text())
    assert len(shown) == 4
    assert np.array_equal(read_pixels(shown[0]), video)  # small ones are embedded pixel by pixel
    assert np.array_equal(read_pixels(shown[1]), after)


@pytest.mark.parametrize("video", ["webp", "gif", "mp4"])
def test_samples_are_written_as_asked(tmp_path, video):
    if video == "mp4":
        pytest.importorskip("imageio_ffmpeg", reason="mp4 needs imageio-ffmpeg")
    folder = save_samples(tmp_path / "samples", list(VIDEOS), ["a", "b"], [1, 2], fps=10, video=video)
    assert read_pixels(folder / f"001.{video}").shape == VIDEOS[1].shape
    assert np.array_equal(read_pixels(folder / "001.png"), VIDEOS[1, 2])
    index = json.loads((folder / "prompts.json").read_text())
    assert (index["clips"], index["fps"]) == (video, 10)


def test_settings_say_how_samples_are_written(tmp_path):
    media = torch.from_numpy(VIDEOS).movedim(-1, -3).float() / 255
    result = Evaluation(["a", "b"], [1, 2], {"gold": torch.tensor([0.5, 0.25])}, media, 0.0, 0.0)
    save_grid(tmp_path / "samples", result, Samples(count=1, video="gif", fps=8))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "000.gif", "000.png", "grid.png", "prompts.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "samples/prompts.json").read_text())
    noise = {"noise_seeds": [derive(1, "start")]}
    assert index == {"prompts": ["a"], "seeds": [1], **noise, "clips": "gif", "fps": 8, "scores": {"gold": [0.5]}}


def test_large_videos_are_written_small(tmp_path):
    y, x = np.mgrid[:144, :208]
    video = np.stack([np.dstack([y, x, (x + 4 * frame) % 256]) for frame in range(3)]).astype(np.uint8)
    folder = save_samples(tmp_path / "samples", [video], ["a"], [1])
    back = read_pixels(folder / "000.webp")
    assert back.shape == video.shape
    assert 0 < np.abs(back.astype(int) - video).mean() < 6


def test_a_folder_of_samples_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"\.mp4 needs a codec"):
        save_samples(tmp_path / "samples", list(VIDEOS), ["a", "b"], [1, 2], video="mp4")
    assert list(tmp_path.iterdir()) == []


# -- the page ---------------------------------------------------------------------------------------------------------


def page_of(folder: Path, frames: np.ndarray, video: str = "webp") -> str:
    """The page of a run whose only two visits are ``frames`` and their negative."""
    build_run(folder, visits=0)
    for step, one in ((0, frames), (60, 255 - frames)):
        save_samples(folder / "samples" / f"step-{step:06d}", [one], ["a <b>"], [1], fps=10, video=video)
    return write_report(folder).read_text()


def test_the_page_plays_before_and_after(tmp_path):
    page = page_of(tmp_path / "run", VIDEOS[0])
    before, after = (read_pixels(data) for data in embedded(page))
    assert np.array_equal(before, VIDEOS[0])
    assert np.array_equal(after, 255 - VIDEOS[0])
    with Image.open(io.BytesIO(embedded(page)[0])) as image:
        image.load()
        assert image.info["duration"] == 100
    stills = re.findall(r'<source srcset="data:image/png;base64,([^"]+)" media="\(prefers-reduced-motion', page)
    assert [read_pixels(base64.b64decode(data)).shape for data in stills] == [(32, 48, 3)] * 2
    assert 'alt="Before training (step 0): a &lt;b&gt;"' in page
    assert re.search(r"video = pipeline\(\n.*\n\)\.frames\[0\]", page, re.DOTALL)


def test_long_large_videos_keep_the_page_small(tmp_path):
    y, x = np.mgrid[:120, :480]
    frames = np.linspace(0, 200, 50).astype(int)
    video = np.stack([np.dstack([y, x // 2, (x + frame) % 256]) for frame in frames]).astype(np.uint8)
    shown = [read_pixels(data) for data in embedded(page_of(tmp_path / "run", video))]
    assert [one.shape for one in shown] == [(17, 96, 384, 3)] * 2  # every third frame, no wider than a pair's image
    with Image.open(io.BytesIO(embedded((tmp_path / "run/report.html").read_text())[0])) as image:
        image.load()
        assert image.info["duration"] == 300


def test_a_gif_plays_and_a_torn_video_is_still(tmp_path):
    page_of(tmp_path / "run", VIDEOS[0] // 86 * 86, video="gif")
    torn = tmp_path / "run/samples/step-000060/000.gif"
    torn.write_bytes(torn.read_bytes()[:300])
    page = write_report(tmp_path / "run").read_text()
    assert [read_pixels(data).shape for data in embedded(page)] == [VIDEOS[0].shape]
    assert len(re.findall('<img src="data:image/png', page)) == 1


# -- files in ---------------------------------------------------------------------------------------------------------


def test_score_reads_videos(tmp_path, run):
    still = np.repeat(VIDEOS[0, :1], 5, 0)
    still[-1, 0, 0] ^= 1  # a video that never moves would be an image
    for name, frames in (("moves", VIDEOS[0]), ("rests", still)):
        (tmp_path / f"{name}.webp").write_bytes(encode(frames, ".webp"))
    files = [str(tmp_path / f"{name}.webp") for name in ("moves", "rests")]
    code, out, _ = run("score", *files, "--prompt", "a", "--reward", REWARD, "--json")
    rows = json.loads(out)
    assert code == 0
    expected = np.abs(np.diff(VIDEOS[0].astype(float) / 255, axis=0)).mean()
    assert rows[0]["scores"][REWARD] == pytest.approx(expected, abs=1e-6)
    assert rows[1]["scores"][REWARD] < 1e-4


def test_a_video_generator_learns_from_pairs_of_videos(tmp_path):
    for name, frames in zip(("good", "bad"), VIDEOS, strict=True):
        (tmp_path / f"{name}.webp").write_bytes(encode(frames, ".webp"))
    rows = [{"prompt": f"video {i}", "chosen": "good.webp", "rejected": "bad.webp"} for i in range(2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(tmp_path)
    rollout = {"kind": "pairs", "file": str(tmp_path / "pairs.jsonl"), "prompts": 2}
    recipe = {"kind": "flow_dpo", "timesteps": 2, "beta": 100}
    tree = {**config.model_dump(mode="json"), "rollout": rollout, "recipe": recipe, "reward": None}
    config = Config.model_validate({**tree, "prompts": {**tree["prompts"], "heldout": None}})
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})}))
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


def test_stored_samples_must_be_what_the_generator_draws(tmp_path):
    (tmp_path / "clip.webp").write_bytes(encode(VIDEOS[0], ".webp"))
    (tmp_path / "image.png").write_bytes(encode(VIDEOS[0, 0], ".png"))
    pair = Prompt("x", {name: tmp_path / file for name, file in (("chosen", "clip.webp"), ("rejected", "image.png"))})
    assert read_sample(pair, "chosen", (16, 16), 5).shape == (5, 3, 16, 16)
    assert read_sample(pair, "rejected", (16, 16), None).shape == (3, 16, 16)
    for name, frames, says in (
        ("chosen", 9, "'chosen' is a video of 5 frames, the generator makes a video of 9 frames; set generator.frames"),
        ("chosen", None, "'chosen' is a video of 5 frames, the generator makes an image$"),
        ("rejected", 9, "'rejected' is an image, the generator makes a video of 9 frames$"),
    ):
        with pytest.raises(DataError, match=says):
            read_sample(pair, name, (16, 16), frames)
