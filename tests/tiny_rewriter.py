"""A rewriter of random weights, configs around it, and a writer that needs no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from align.rewriting.words import cleaned
from align.worlds.train_rewriter import new_rewriter
from alignflow.worlds.shapes import wordings
from alignflow.worlds.shapes.world import caption, parse_caption

PROMPTS = ("a photo of the red circle", "two squares on a gray background", "a picture of a small cross")
COMMON = """\
writer: {{kind: local, model: {model}, dtype: float32, chunk: 4}}
generator: {{kind: sd3, path: shapes, device: cpu}}
reward: {{kind: shapes}}
gold: {{strict: {{kind: shapes, score: strict}}}}
rendering: {{sampler: {{kind: ode, steps: 2}}, samples: 2, chunk: 8}}
out: {out}
"""
EVOLVE = "prompts: {{source: {prompts}}}\nrounds: 2\nproposals: 2\nbatch: 2\nreply: {{longest: 5}}\n"
TRAIN = (
    "prompts: {{train: {prompts}, heldout: {prompts}}}\nlora: {{rank: 2, alpha: 4}}\ncandidates: 3\ncheckpoint: 1\n"
    "reply: {{longest: 5}}\n"
)
METHODS = {
    "sft": "method: {kind: sft, steps: 3, batch: 2, lr: 1e-2}\n",
    "dpo": "method: {kind: dpo, steps: 3, batch: 2, lr: 1e-2, gap: 0}\n",
    "grpo": "method: {kind: grpo, steps: 3, batch: 2, rewrites: 3, lr: 1e-2, invalid: 0.0, kl: 0.1, updates: 2}\n",
}


def save(folder: Path) -> Path:
    """Model and tokenizer; the model is so sure of its random wishes that its replies differ little."""
    torch.manual_seed(0)
    model, tokens = new_rewriter()
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def config(folder: Path, model: Path, text: str, name: str = "run.yaml", out: str = "out") -> Path:
    """A config file in ``folder``."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    path = folder / name
    path.write_text((COMMON + text).format(model=model, out=folder / out, prompts=prompts))
    return path


def training(folder: Path, model: Path, method: str, out: str = "out") -> Path:
    """A config of ``prompts train``."""
    path = config(folder, model, TRAIN, f"{method}.yaml", out)
    path.write_text(path.read_text() + METHODS[method])
    return path


class Paraphraser:
    """Words the prompt, the second line of an instruction, in a random style that follows from the seed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def write(self, asked, seeds, reply):
        self.asked += asked
        specs = [parse_caption(text.splitlines()[1]) for text in asked]
        styles = [wordings.rewriters(np.random.default_rng(seed)) for seed in seeds]
        return [cleaned(wordings.worded(spec, style)) for spec, style in zip(specs, styles, strict=True)]


class Echo:
    """Writes the prompt itself."""

    def write(self, asked, seeds, reply):
        return [text.splitlines()[1] for text in asked]


def canonical(text: str) -> str:
    """The canonical caption of any wording."""
    return caption(parse_caption(text))
