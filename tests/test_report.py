"""The report page: made from files alone, whole at any moment of a run, safe, readable on a laptop and on a phone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_run import ENDS, Page, build_run

from align.data.grids import save_samples
from align.report import write_report
from align.report.changes import Change, change
from align.report.charts import GAP, MINUS, Chart, Series, draw, short, table, thin, ticks
from align.report.images import gallery
from align.report.intervals import t95
from align.report.reading import read_run
from align.report.using import snippet
from align.report.verdict import judge
from alignflow.errors import RunFolderError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: build_run(root / kind, kind) for kind in ENDS}


@pytest.fixture(scope="module")
def pages(runs: dict[str, Path]) -> dict[str, Path]:
    return {kind: write_report(folder) for kind, folder in runs.items()}


def test_page_says_what_happened(pages: dict[str, Path]) -> None:
    page = Page(pages["honest"])
    for text in (
        "shapes-nft-honest",
        "Gold rose from 0.352 to 0.597",
        "95 % interval",
        "4 min 28 s",
        "115,200",
        "11,520",
        "Load the LoRA",
    ):
        assert text in page.text
    assert "hacking" not in page.text.replace("If the reward rises and gold does not, that is reward hacking.", "")
    for title in (
        "Held-out scores",
        "Training reward",
        "KL in velocity",
        "Ratio",
        "Time by phase",
        "Throughput",
        "Diversity",
    ):
        assert title in page.text


def test_page_needs_nothing_but_itself(pages: dict[str, Path]) -> None:
    for path in pages.values():
        page = Page(path)
        assert not page.all("link")
        assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.all("img"))
        assert all("src" not in script for script in page.all("script"))
        assert "url(" not in path.read_text()
        assert path.stat().st_size < 3_000_000


def test_page_escapes_prompts(pages: dict[str, Path]) -> None:
    text = pages["honest"].read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert len(Page(pages["honest"]).all("script")) == 1


def test_every_chart_has_words_and_a_table(pages: dict[str, Path]) -> None:
    page = Page(pages["honest"])
    charts = page.all("svg")
    assert len(charts) > 10
    assert all(chart["role"] == "img" and "from" in chart["aria-label"] for chart in charts)
    assert len(page.all("table")) >= len(charts) - 1  # the lead chart is drawn twice, for wide and for narrow
    points = [shape["points"] for kind in ("polyline", "polygon") for shape in page.all(kind)]
    assert points
    assert all(re.fullmatch(r"[\d., ]+", one) for one in points)
    assert not re.search(r"\b(nan|None)\b", page.text)


def test_gold_shares_the_axis_only_on_one_scale(runs: dict[str, Path], pages: dict[str, Path]) -> None:
    assert pages["honest"].read_text().count('class="wide"') == 1
    assert pages["two-scales"].read_text().count('class="wide"') == 2


def test_hacking_is_named(pages: dict[str, Path]) -> None:
    page = Page(pages["hacked"])
    assert "The trained reward rose, but gold fell from 0.352" in page.text
    assert any("verdict bad" in (section.get("class") or "") for section in page.all("section"))
    assert "Reward hacking" in page.text


def test_change_has_the_interval_of_a_difference(runs: dict[str, Path]) -> None:
    gold = change(read_run(runs["honest"]), "gold")
    assert gold is not None
    assert gold.interval is not None
    assert gold.interval[1] - gold.delta == pytest.approx(t95(510) * math.hypot(0.018, 0.018))


def edit_rows(folder: Path, **values: float) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | (values if row["event"] == "train" else {}) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return judge(read_run(folder)).warnings


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({"zero_variance_groups": 10}, "Many groups without contrast"),
        ({"ratio": 1.02}, "Off policy from the start"),
        ({"missing": 3}, "Scores were missing in training"),
    ],
)
def test_warnings(tmp_path: Path, values: dict[str, float], title: str) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    assert edit_rows(folder) == []
    assert [warning for warning, _ in edit_rows(folder, **values)] == [title]


def test_trained_on_gold_is_said(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for part in ("scores", "stderr") if row["event"] == "eval" else ():
            row[part]["reward"] = row[part]["gold"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder))
    assert "trained on gold itself" in page.text
    assert sum((block.get("class") or "").startswith("change ") for block in page.all("div")) == 1


def test_what_else_a_recipe_logs_is_drawn(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    edit_rows(folder, **{"clipped_share": 0.25, "reward/my.judge:score": 0.5, "reward/ocr": 0.1})
    text = Page(write_report(folder)).text
    assert "clipped share" in text
    assert "my.judge:score 0.5" in text


def code_of(run) -> str:
    found = snippet(run)
    assert found is not None
    compile(found.code, "snippet", "exec")
    return found.code


def test_how_to_load_the_lora(runs: dict[str, Path]) -> None:
    run = read_run(runs["honest"])
    assert 'from_pretrained(weights("sd3"))' in code_of(run)
    hub = code_of(replace(run, config={"generator": {"kind": "sd3", "path": "owner/name", "dtype": "bfloat16"}}))
    assert 'from_pretrained("owner/name", torch_dtype=torch.bfloat16)' in hub
    assert 'load_lora_weights("honest/lora")' in hub
    editor = code_of(replace(run, config={"generator": {"kind": "flux_fill", "path": "shapes-fill"}}))
    assert 'image=load_image("image.png"),\n    mask=load_image("mask.png")' in editor


def test_how_to_load_the_lora_of_a_clip_drawn_smaller_than_the_pipeline_would(runs: dict[str, Path]) -> None:
    generator = {"kind": "wan", "path": "shapes-video", "size": [32, 48], "frames": 9, "text_length": 16}
    found = code_of(replace(read_run(runs["honest"]), config={"generator": generator}))
    assert 'from_pretrained(weights("wan"))' in found
    assert "height=32,\n    width=48,\n    num_frames=9,\n    max_sequence_length=16,\n" in found


def test_how_to_load_the_lora_of_two_experts(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    (folder / "lora" / "pytorch_lora_weights_transformer_2.safetensors").write_bytes(b"0")
    found = code_of(read_run(folder))
    assert 'weight_name="pytorch_lora_weights_transformer_2.safetensors", load_into_transformer_2=True)' in found


def test_a_better_earlier_checkpoint_is_named(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["event"] == "eval" and row["step"] == 30:
            row["scores"]["gold"] = 0.9
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Gold was best at step 30" in Page(write_report(folder)).text


def test_a_run_in_progress_with_a_torn_line(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=2)
    for name in ("summary.json", "environment.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "lora")
    (folder / "samples" / "step-000060" / "002.png").write_bytes(b"\x89PNG torn")
    (folder / "samples" / "step-000061").mkdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:40]
    (folder / "metrics.jsonl").write_text("\n".join(lines)[:-25])
    page = Page(write_report(folder))
    for text in ("not finished", "had not ended", "of 60 steps", "no image", "Nothing trained is on disk yet"):
        assert text in page.text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_hardly_anything_is_enough(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("recipe: {kind: nft" if name == "config.yaml" else '{"event": "tr')
    assert "No metrics yet" in Page(write_report(tmp_path)).text


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_a_step_run_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    rows = [
        {"event": "train", "step": step, "reward": reward} for step, reward in [(1, 0.1), (2, 0.2), (3, 9), (3, 0.3)]
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(tmp_path).curve("reward") == ([1, 2, 3], [0.1, 0.2, 0.3])


def test_missing_numbers_break_the_line() -> None:
    chart = Chart("t", "", [Series("a", [1, 2, 3, 4], [1.0, None, 3.0, 4.0], [0.1, None, 0.1, 0.1])], band="std")
    assert draw(chart).count("<polyline") == 2
    assert table(chart)[1][1] == ["2", GAP, GAP]


def test_long_runs_are_pooled() -> None:
    chart = thin(Chart("t", "", [Series("a", list(range(1, 1001)), [float(i) for i in range(1, 1001)])]))
    assert chart.pooled == 5
    assert chart.series[0].y[0] == 3.0
    assert chart.series[0].x[-1] == 1000


def test_numbers_read_well() -> None:
    shown = [short(value) for value in (0.0, 0.35214, 12.0, 1234.6, 0.0003, -0.5)]
    assert shown == ["0", "0.352", "12", "1,235", f"3e{MINUS}4", f"{MINUS}0.5"]
    assert ticks(0.3, 0.71) == [0.2, 0.4, 0.6, 0.8]
    assert short(None) == GAP


def test_save_samples(tmp_path: Path) -> None:
    images = [np.full((16, 24, 3), 40 * i, np.uint8) for i in range(3)]
    folder = tmp_path / "samples" / "step-000000"
    for _ in range(2):  # a second visit replaces the first
        save_samples(folder, images, ["a", "b", "c"], [1, 2, 3], {"gold": [1.0, float("nan"), 0.5]}, replaces=True)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000000"]
    assert sorted(p.name for p in folder.iterdir()) == ["000.png", "001.png", "002.png", "grid.png", "prompts.json"]
    assert json.loads((folder / "prompts.json").read_text())["scores"] == {"gold": [1.0, None, 0.5]}
    assert Image.open(folder / "grid.png").width >= 2 * 128
    with pytest.raises(ValueError, match="2 prompts"):
        save_samples(folder, images, ["a", "b"], [1, 2, 3])


def test_edits_are_shown_beside_their_sources(tmp_path: Path) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    source, *edits = (np.full((16, 16, 3), value, np.uint8) for value in (10, 80, 160))
    for step, edit in zip((0, 45), edits, strict=True):
        save_samples(folder / "samples" / f"step-{step:06d}", [edit], ["make it blue"], [1], sources=[source])
    samples = folder / "samples" / "step-000045"
    assert (np.asarray(Image.open(samples / "000-source.png")) == 10).all()
    grid = np.asarray(Image.open(samples / "grid.png").convert("L"))
    assert (grid[70, 70], grid[70, 210]) == (10, 160)  # cells of 128 pixels
    run = read_run(folder)
    pair = gallery(run).pairs[0]
    assert pair.source is not None
    assert len({pair.source.uri, pair.before.uri, pair.after.uri}) == 3
    page = Page(write_report(folder)).text
    assert "left the source, then before training (step 0), right step 45" in page
    with pytest.raises(ValueError, match="1 images, but 2 sources"):
        save_samples(samples, [source], ["a"], [1], sources=[source, source])


def test_report_imports_no_torch() -> None:
    code = "import sys, align.report, align.data.grids; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(("count", "direction"), [(3, "unsure"), (64, "down")])
def test_a_few_equal_differences_are_not_certain(count, direction):
    change = Change.of_pairs("other", "strict", [(4 / 48, 3 / 48)] * count)
    assert change.interval is None
    assert change.direction == direction
    assert Change.of_pairs("other", "strict", [(0.5, 0.5)] * count).direction == "same"
