"""Aspect buckets: sizes and choices in closed form, batches of one size, runs on files of different shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from PIL import Image
from pydantic import ValidationError
from tiny_run import final_tensors, policy_gap, settings

from align.checking.commands import examine
from align.config.load import dump_config
from align.config.sources import Buckets
from align.data import buckets
from align.data.buckets import Batches, divided, nearest, sizes
from align.data.inputs import read_sample
from align.data.latents import key_of
from align.data.media import encode, size_of
from align.data.prompts import Prompt, read_stored
from align.rollout.sources import StoredSource
from align.runs.processes import Share
from align.training.trainer import train
from alignflow.errors import DataError
from generators.load import load

SHAPES = [(32, 32), (48, 20), (20, 48), (40, 40), (33, 50), (64, 16), (24, 12), (32, 31), (50, 33)]


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_sizes_in_closed_form() -> None:
    assert sizes((32, 32), 16, 2) == [(32, 32)]  # 16 x 64 is too long, and 16 x 32 lies within 32 x 32
    assert sizes((64, 64), 16, 2) == [(48, 80), (64, 64), (80, 48)]
    assert sizes((64, 64), 16, 4) == [(32, 128), (48, 80), (64, 64), (80, 48), (128, 32)]
    assert sizes((512, 512), 64, 1) == [(512, 512)]


@pytest.mark.parametrize("size", [(1024, 1024), (512, 512), (480, 832), (768, 1344)])
@pytest.mark.parametrize("unit", [16, 64])
@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_sizes_have_about_equal_pixels(size: tuple[int, int], unit: int, ratio: float) -> None:
    area, found = size[0] * size[1], sizes(size, unit, ratio)
    assert size in found
    assert len(found) == len(set(found)) >= 3
    for height, width in found:
        if (height, width) != size:
            assert height % unit == width % unit == 0
            assert max(height, width) <= ratio * min(height, width)
        assert area * (1 - unit / max(height, width)) < height * width <= area


def test_those_of_sdxl() -> None:
    """Sizes of SDXL's table (arXiv 2307.01952, appendix I) that have at most 1024 x 1024 pixels."""
    published = {(1024, 1024), (832, 1216), (1216, 832), (896, 1152), (1152, 896), (768, 1344), (1344, 768)}
    assert published <= set(sizes((1024, 1024), 64, 2))


def test_the_nearest_ratio_is_chosen() -> None:
    among = [(48, 80), (64, 64), (80, 48)]
    middle = 64 * math.sqrt(80 / 48)  # between 1 and 80 / 48, by the ratio of ratios
    assert [nearest(64, width, among) for width in (64, middle - 0.1, middle + 0.1, 500)] == [1, 1, 0, 0]
    assert nearest(500, 64, among) == 2
    assert nearest(1080, 1920, sizes((1024, 1024), 64, 2)) == sizes((1024, 1024), 64, 2).index((768, 1344))


# -- rows -------------------------------------------------------------------------------------------------------------


def table(folder: Path, columns: tuple[str, ...] = ("sample",), shapes: list[Any] = SHAPES) -> Path:
    """A row for each (height, width), or for each list of them."""
    rows = []
    for number, given in enumerate(shapes):
        row: dict[str, Any] = {"prompt": f"a cat {number}"}
        for n, (name, shape) in enumerate(
            zip(columns, given if isinstance(given[0], tuple) else [given] * len(columns), strict=True)
        ):
            file = folder / f"{name}{number}.png"
            Image.new("RGB", (shape[1], shape[0]), (25 * number % 256, 90 * n, 200)).save(file)
            row[name] = file.name
        rows.append(row)
    path = folder / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_are_divided_counted_and_said(tmp_path: Path) -> None:
    among = sizes((64, 64), 16, 2)
    shapes = [(64, 64), (640, 380), (30, 64), (64, 200)]
    rows = read_stored(str(table(tmp_path, shapes=shapes)), ["sample"])
    used, found = divided(rows, ["sample"], Buckets(step=16), among)
    assert used == [0, 1, 2, 3]
    assert [among[n] for n in found.bucket] == [(64, 64), (80, 48), (48, 80), (48, 80)]
    assert (found.enlarged, found.beyond, found.apart) == (1, 2, 0)
    assert found.said(2) == (
        "height x width (rows): 48 x 80 (2), 64 x 64 (1), 80 x 48 (1); 3 steps a pass; 2 rows in buckets of fewer rows "
        "than rollout.prompts 2, in smaller batches; 1 file smaller than the bucket, enlarged; 2 rows beyond "
        "rollout.buckets.ratio, cropped to the last bucket"
    )


def test_sides_of_different_shapes_share_the_bucket_between_them(tmp_path: Path) -> None:
    rows = read_stored(
        str(table(tmp_path, ("chosen", "rejected"), [[(64, 64), (40, 80)], [(40, 80), (80, 40)]])),
        ["chosen", "rejected"],
    )
    _, found = divided(rows, ["chosen", "rejected"], Buckets(step=16), sizes((64, 64), 16, 2))
    assert [found.sizes[n] for n in found.bucket] == [(48, 80), (64, 64)]  # of mean ratios sqrt(1/2) and 1
    assert found.apart == 2


def test_rows_beyond_the_ratio_stop_or_are_left_out(tmp_path: Path) -> None:
    rows, among = read_stored(str(table(tmp_path, shapes=[(64, 64), (64, 200)])), ["sample"]), sizes((64, 64), 16, 2)
    with pytest.raises(DataError, match=r"table.jsonl line 2: 64 x 200 pixels, more than rollout.buckets.ratio 2;"):
        divided(rows, ["sample"], Buckets(beyond="stop"), among)
    skipped: dict[str, str] = {}
    used, found = divided(rows, ["sample"], Buckets(beyond="stop"), among, skipped)
    assert (used, len(found.bucket), list(skipped)) == ([0], 1, [rows[1].place])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, shapes=[(64, 64)])
    (tmp_path / "sample0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"table.jsonl line 1: 'sample': .* is not an image that can be read"):
        divided(read_stored(str(path), ["sample"]), ["sample"], Buckets(), [(64, 64)])


def test_the_size_of_a_file_is_that_of_its_pixels(tmp_path: Path) -> None:
    lying = Image.new("RGB", (30, 20))
    turned = lying.getexif()
    turned[0x0112] = 6
    lying.save(tmp_path / "turned.jpg", exif=turned)
    assert size_of(tmp_path / "turned.jpg") == (30, 20)
    video = torch.zeros(3, 24, 40, 3, dtype=torch.uint8).numpy()
    assert size_of(encode(video, ".webp")) == (24, 40)
    with pytest.raises(DataError, match=r"no file .*none.png"):
        size_of(tmp_path / "none.png")


def test_the_size_of_a_container_is_that_of_its_first_frame() -> None:
    pytest.importorskip("imageio_ffmpeg")
    assert size_of(encode(torch.zeros(3, 24, 40, 3, dtype=torch.uint8).numpy(), ".mp4")) == (24, 40)


def test_media_cover_their_bucket_and_are_cropped_about_the_middle(tmp_path: Path) -> None:
    """Half red, half blue, twice as wide as the bucket: the middle is left, enlarged, and nothing is padded."""
    image = Image.new("RGB", (64, 16), "red")
    image.paste("blue", (32, 0, 64, 16))
    image.save(tmp_path / "a.png")
    found = read_sample(Prompt("a", {"sample": tmp_path / "a.png"}), "sample", (32, 64), None)
    assert found.shape == (3, 32, 64)
    assert float(found[0, :, :24].min()) > 0.99
    assert float(found[2, :, 40:].min()) > 0.99
    other = read_sample(Prompt("a", {"sample": tmp_path / "a.png"}), "sample", (48, 48), None)
    assert key_of(found) != key_of(other)  # a latent is remembered for one bucket


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_a_pass_has_every_row_once_in_batches_of_one_bucket(batch: int) -> None:
    bucket = [0] * 7 + [2] * 4 + [5]
    made = Batches(bucket, batch, seed=3)
    assert made.steps == sum(math.ceil(n / batch) for n in (7, 4, 1))
    passes = []
    for number in range(3):
        found = [made.at(step) for step in range(number * made.steps, (number + 1) * made.steps)]
        assert sorted(row for rows in found for row in rows) == list(range(12))
        for rows in found:
            assert len({bucket[row] for row in rows}) == 1
            assert 1 <= len(rows) <= batch
        lengths = sorted(len(rows) for rows in found if bucket[rows[0]] == 0)
        assert lengths[-1] - lengths[0] <= 1
        passes.append(found)
    assert batch == 100 or passes[0] != passes[1]
    again = Batches(bucket, batch, seed=3)
    assert again.at(2 * made.steps) == passes[2][0]  # a resumed run begins anywhere
    assert [made.at(step) for step in range(5)] != [Batches(bucket, batch, seed=4).at(step) for step in range(5)]


def stored(folder: Path, model: Path, recipe: Any, *, kind: str = "samples", file: Path, **sections: Any) -> Any:
    rollout = {"kind": kind, "file": str(file), "prompts": 4, "buckets": {"step": 16, "ratio": 4}}
    folder.mkdir(exist_ok=True)
    given = {"rollout": rollout, "reward": None, "prompts": {"heldout": None}, "evaluate": {"every": 0}} | sections
    given["train"] = {"steps": 4} | sections.get("train", {})
    given["generator"] = {"size": [64, 64]}
    return settings(folder, model, recipe, **given)


FLOW = {"kind": "flow_rwr", "control_variate": False, "timesteps": 2}


def test_processes_share_every_batch(model: Path, tmp_path: Path) -> None:
    """Of any number: all have the bucket of the step, and together its rows."""
    config = stored(tmp_path, model, FLOW, file=table(tmp_path))
    generator = load("sd3", str(model), options=config.generator)
    for step in range(6):
        one = StoredSource(config, generator, Share())(step)
        assert tuple(one.media.shape[-2:]) in sizes((64, 64), 16, 4)
        assert one.latents.shape[-2] * 8 == one.media.shape[-2]
        for world in (2, 3, 5):
            parts = [StoredSource(config, generator, Share(rank, world))(step) for rank in range(world)]
            assert [text for part in parts for text in part.prompts] == one.prompts
            assert [seed for part in parts for seed in part.seeds] == one.seeds
            assert {tuple(part.latents.shape[1:]) for part in parts if part.prompts} == {tuple(one.latents.shape[1:])}
            assert [number for part in parts for number in part.group.tolist()] == one.group.tolist()
    assert tuple(generator.size) == (64, 64)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["samples", "pairs"])
def test_runs_on_files_of_different_shapes(
    kind: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They learn, a resumed run continues to the bit, and the start says the buckets."""
    columns = ("chosen", "rejected") if kind == "pairs" else ("sample",)
    recipe = {"kind": "flow_dpo", "timesteps": 2, "pairs": 1} if kind == "pairs" else FLOW
    file = table(tmp_path, columns)
    config = stored(tmp_path / "whole", model, recipe, kind=kind, file=file, memory={"cache_latents": "memory"})
    rows: list[dict[str, Any]] = []
    train(config, on_step=lambda _, row: rows.append(row))
    assert (
        "buckets, height x width (rows): 48 x 80 (2), 64 x 64 (3), 80 x 48 (3), 128 x 32 (1); 4 "
        in capsys.readouterr().out
    )
    assert all(row["grad_norm"] > 0 for row in rows)
    part = stored(
        tmp_path / "part", model, recipe, kind=kind, file=file, train={"steps": 2}, memory={"cache_latents": "memory"}
    )
    train(part)
    longer = part.model_copy(update={"train": part.train.model_copy(update={"steps": 4})})
    train(longer, resume=True)
    assert policy_gap(final_tensors(config), final_tensors(longer)) == 0


def test_learning_rate_0_changes_nothing(model: Path, tmp_path: Path) -> None:
    config = stored(tmp_path, model, FLOW, file=table(tmp_path), train={"lr": 0.0})
    train(config)
    found = final_tensors(config)
    assert max(float(found[name].abs().max()) for name in found if "policy/" in name and "lora_B" in name) == 0


RUN = """
import sys
from pathlib import Path
from align.config.load import load_config
from align.training.trainer import train
train(load_config(Path(sys.argv[1]), []))
"""


@pytest.mark.slow
def test_two_processes_learn_as_one(model: Path, tmp_path: Path) -> None:
    file, found = table(tmp_path), []
    for count in (1, 2):
        folder = tmp_path / str(count)
        config = stored(folder, model, FLOW, file=file)
        written = folder / "config.yaml"
        written.write_text(dump_config(config))
        launch(count, folder, RUN, str(written))
        found.append(final_tensors(config))
    assert policy_gap(*found) < 2e-3


# -- before a run -----------------------------------------------------------------------------------------------------


def test_check_prints_the_buckets(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(stored(tmp_path, model, FLOW, file=table(tmp_path))))
    (line,) = [line for line in examine(config) if line.startswith("buckets")]
    assert "64 x 64 (3)" in line
    assert "beyond" not in line
    Image.new("RGB", (900, 30)).save(tmp_path / "sample0.png")
    buckets._of_file.cache_clear()
    (line,) = [line for line in examine(config) if line.startswith("buckets")]
    assert line.endswith("1 row beyond rollout.buckets.ratio, cropped to the last bucket")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generator": {"size": None}}, "is missing; rollout.buckets have about its number of pixels"),
        ({"rollout": {"buckets": {"step": 20}}}, "multiple of 8"),
        ({"rollout": {"buckets": {"ratio": 0.5}}}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_with_buckets(changes: Any, says: str, model: Path, tmp_path: Path) -> None:
    rollout = {"kind": "samples", "file": "a.jsonl", "prompts": 4, "buckets": {}}
    sections = {
        "rollout": rollout | changes.get("rollout", {}),
        "reward": None,
        "generator": changes.get("generator", {}),
    }
    with pytest.raises(ValidationError, match=says):
        settings(tmp_path, model, FLOW, **sections)


def test_editors_do_not_cache_prompts_of_several_sizes(model: Path, tmp_path: Path) -> None:
    rollout = {"kind": "pairs", "file": "a.jsonl", "prompts": 4, "buckets": {}}
    editor = {"kind": "flux_kontext", "path": str(model)}
    with pytest.raises(ValidationError, match="prompts of flux_kontext are cached with their images at one size"):
        settings(
            tmp_path, model, "flow_dpo", rollout=rollout, reward=None, memory={"cache_prompts": "memory"},
            generator={**editor, "device": "cpu", "size": [64, 64]},
        )  # fmt: skip
