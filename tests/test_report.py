"""The report page: made from files alone, whole at any moment of a run, safe, readable on a laptop and on a phone."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from align.errors import RunFolderError
from align.grids import save_samples
from align.report import write_report
from align.report.charts import GAP, MINUS, Chart, Series, draw, short, table, thin, ticks
from align.report.reading import read_run
from align.report.verdict import change, judge

PROMPTS = [
    "a red circle above a blue square",
    "three small green triangles",
    "a large yellow star left of a purple circle",
    "two blue squares and one red triangle",
    "a <script>alert('x')</script> & \"quoted\" cross",
    "a tiny white circle inside a long caption that goes on and on until it has to be wrapped onto several lines",
]
COLOURS = ["#d33", "#36c", "#2a8", "#da2", "#93c"]
CONFIG = """\
name: shapes-nft
recipe:
  kind: nft
  beta: 1.0
generator:
  kind: sd3
  path: shapes
rollout:
  prompts: 16
reward:
  kind: clip
train:
  steps: 60
  lr: 3e-4
evaluate:
  gold: gold
"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ENDS = {"honest": (0.61, 0.72), "hacked": (0.24, 0.81), "two-scales": (0.61, 27.3)}


def draw_scene(row: int, quality: float, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), "#20242c")
    pen, rng = ImageDraw.Draw(image), random.Random(row)
    for k in range(1 + row % 3):
        x, y = (rng.uniform(0.05, 0.55) * side for _ in range(2))
        size = rng.uniform(0.2, 0.4) * side
        wrong = rng.random() > quality
        pen.ellipse((x, y, x + size, y + size), fill=COLOURS[(row + k + 2 * wrong) % 5])
    noise = np.random.default_rng(row).normal(0, 26 * (1 - quality), (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def train_row(step: int, steps: int, end: float, start: float) -> dict:
    rng = random.Random(step)
    p = 1 - math.exp(-3 * step / steps)
    reward = start + (end - start) * p
    spread = abs(end - start) * 0.5
    return {
        "event": "train", "step": step, "seconds": 4.0 * step, "reward": reward + rng.gauss(0, spread / 8),
        "reward_std": spread * (1 - 0.4 * p), "missing": 0,
        "zero_variance_groups": rng.randint(0, 2 + round(2 * p)),
        "loss": 0.9 - 0.1 * p + rng.gauss(0, 0.02), "grad_norm": 0.3 + abs(rng.gauss(0, 0.1)), "lr": 3e-4,
        "kl_velocity": 0.02 * p, "contrast": 0.15 * (1 - p) + 0.02, "ratio": 1.0, "diversity": 0.4 - 0.1 * p,
        "images_per_second": 48 + rng.gauss(0, 2), "network_calls": 1920,
        "time": {"rollout": 1.3 + rng.gauss(0, 0.05), "decode": 0.3, "reward": 0.4, "update": 1.9, "other": 0.1},
    }  # fmt: skip


def eval_row(step: int, steps: int, gold: float, reward: float, start: float) -> dict:
    p = 1 - math.exp(-3 * step / steps)
    scores = {"gold": 0.352 + (gold - 0.352) * p, "reward": start + (reward - start) * p}
    stderr = {"gold": 0.018, "reward": abs(reward - start) * 0.03}
    return {
        "event": "eval", "step": step, "role": "ema", "prompts": 256, "seconds": 5.1,
        "scores": scores, "stderr": stderr, "missing": {"gold": 0, "reward": 0}, "diversity": 0.41 - 0.1 * p,
    }  # fmt: skip


def build_run(folder: Path, kind: str = "honest", steps: int = 60, side: int = 64, visits: int = 4) -> Path:
    """A run folder as a finished training leaves it."""
    folder.mkdir(parents=True)
    gold, reward = ENDS[kind]
    start = 21.0 if kind == "two-scales" else 0.44
    evals = {step: eval_row(step, steps, gold, reward, start) for step in range(0, steps + 1, steps // 6)}
    rows = [evals[0]]
    for step in range(1, steps + 1):
        rows += [train_row(step, steps, reward, start), *([evals[step]] if step in evals else [])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "name": f"shapes-nft-{kind}", "recipe": "nft", "generator": "sd3: shapes", "status": "finished", "seed": 7,
        "steps": steps, "seconds": 268.4, "network_calls": 1920 * steps, "images": 192 * steps,
    }  # fmt: skip
    for end, row in (("before", rows[0]), ("after", rows[-1])):
        summary |= {f"gold_{end}": row["scores"]["gold"], f"reward_{end}": row["scores"]["reward"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(CONFIG)
    environment = {
        "python": "3.11.9",
        "machine": "Linux x86_64, 2 cores",
        "packages": {"torch": "2.13.0", "peft": "0.21.2"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(bytes(250_000))
    (folder / "checkpoints" / f"step-{steps:06d}").mkdir(parents=True)
    for visit in range(visits):
        p = visit / max(1, visits - 1)
        images = [draw_scene(row, 0.3 + 0.7 * p, side) for row in range(len(PROMPTS))]
        golds = [round(min(1.0, 0.2 + 0.13 * row * p + 0.3 * p), 2) for row in range(len(PROMPTS))]
        scores = {"gold": [*golds[:-1], float("nan")], "reward": [0.4 + 0.3 * p] * len(PROMPTS)}
        save_samples(folder / "samples" / f"step-{round(p * steps):06d}", images, PROMPTS, list(range(6)), scores)
    return folder


class Page(HTMLParser):
    """Tags, their attributes and all text of a page; checks that every tag is closed."""

    VOID = frozenset({"meta", "img", "link", "br", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


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
        "Load the LoRA",
    ):
        assert text in page.text
    assert "hacking" not in page.text.replace("reward rising alone is reward hacking", "")
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
    assert gold.interval[1] - gold.delta == pytest.approx(1.96 * math.hypot(0.018, 0.018))


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
        ({"missing": 3}, "Scores were missing"),
    ],
)
def test_warnings(tmp_path: Path, values: dict[str, float], title: str) -> None:
    folder = build_run(tmp_path / "run", visits=0)
    assert edit_rows(folder) == []
    assert [warning for warning, _ in edit_rows(folder, **values)] == [title]


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
    for text in ("running", "steps so far", "of 60", "no image", "No LoRA was exported yet"):
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
        save_samples(folder, images, ["a", "b", "c"], [1, 2, 3], {"gold": [1.0, float("nan"), 0.5]})
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000000"]
    assert sorted(p.name for p in folder.iterdir()) == ["000.png", "001.png", "002.png", "grid.png", "prompts.json"]
    assert json.loads((folder / "prompts.json").read_text())["scores"] == {"gold": [1.0, None, 0.5]}
    assert Image.open(folder / "grid.png").width >= 2 * 128
    with pytest.raises(ValueError, match="2 prompts"):
        save_samples(folder, images, ["a", "b"], [1, 2, 3])


def test_report_imports_no_torch() -> None:
    code = "import sys, align.report, align.grids; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def open_page(*arguments: str) -> str:
    """Run the browser once without a window."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine")
@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (390, 844)])
def test_browser_shows_it_without_sideways_scrolling(
    pages: dict[str, Path], tmp_path: Path, width: int, height: int
) -> None:
    # A window is never narrower than about 500 px, so the page is opened in a frame of the wanted width.
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<body style="margin:0"><iframe id="f" width="{width}" height="{height}" style="border:0"></iframe><script>'
        'f.onload = () => { const e = f.contentDocument.documentElement; document.title = "w" + e.scrollWidth };'
        "f.srcdoc = " + json.dumps(pages["honest"].read_text()).replace("</", "<\\/") + "</script>"
    )
    picture = tmp_path / "page.png"
    dom = open_page("--dump-dom", f"--window-size={width},{height}", "--virtual-time-budget=4000", probe.as_uri())
    assert f"<title>w{width}</title>" in dom
    open_page(
        f"--screenshot={picture}", f"--window-size={width},{height}", "--virtual-time-budget=4000", probe.as_uri()
    )
    pixels = np.asarray(Image.open(picture).convert("L"))[:, :width]
    assert pixels.shape[1] == width
    assert len(np.unique(pixels)) > 40
    assert pixels.std() > 8
