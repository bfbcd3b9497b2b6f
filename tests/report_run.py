"""A run folder as a finished training leaves it, drawn from formulas: nothing is trained. And a parser of pages."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from align.data.grids import save_samples

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
        "samples": 192, "images_per_second": 48 + rng.gauss(0, 2), "network_calls": 1920,
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
        "steps": steps, "seconds": 268.4, "network_calls": 1920 * steps,
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
