"""Pairs of the embedded world with the verifier's labels and with written critiques, for rewards and judges.

    python -m benchmarks.judged_pairs --out runs/judged --train 512 --heldout 128

Writes ``train.jsonl`` and ``heldout.jsonl`` with their images. The chosen image of a pair shows its prompt, and the
rejected one shows a caption with one thing changed. Columns: ``prompt``, ``chosen``, ``rejected``; ``chosen_critique``
and ``rejected_critique``, which say whether an image shows the prompt and what it shows; ``chosen_score.NAME`` and
``rejected_score.NAME`` for the criteria objects, count, relation and background and for the aspects content and layout,
empty if the prompt does not ask.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.worlds.judge_data import draw_pairs
from alignflow.worlds.shapes.world import Scene, Spec, caption
from rewards.worlds.shapes import best_match, likeness

ASPECTS = {"content": ["objects", "count"], "layout": ["relation", "background"]}
"""Aspect -> criteria."""


def labels(scene: Scene, spec: Spec) -> dict[str, float | None]:
    """Scores 0 to 1 of a scene by the criteria and aspects of :data:`ASPECTS`, None if the prompt does not ask."""
    wanted = [want for want in spec.wants for _ in range(want.count)]
    likes = np.array([[likeness(want, one) for one in scene.objects] for want in wanted])
    total, relation = best_match(likes, spec, scene.objects)
    found: dict[str, float | None] = {
        "objects": total / len(wanted),
        "count": float(len(wanted) == len(scene.objects)),
        "relation": relation if spec.relation else None,
        "background": float(spec.background == scene.background) if spec.background else None,
    }
    for aspect, names in ASPECTS.items():
        known = [value for name in names if (value := found[name]) is not None]
        found[aspect] = sum(known) / len(known) if known else None
    return found


def write(folder: Path, split: str, count: int, seed: int) -> Path:
    """A table of ``count`` pairs or a few less: two to a pair of scenes, each of which is chosen once."""
    pairs, rows = draw_pairs(split, (count + 1) // 2, seed), []
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{split}-{number:05d}.png" for number in range(len(pairs.images))]
    for file, image in zip(files, pairs.images, strict=True):
        Image.fromarray(image).save(folder / file)
    for chosen, spec in enumerate(pairs.specs[:count]):
        sides = {"chosen": chosen, "rejected": chosen ^ 1}
        row: dict[str, Any] = {"prompt": caption(spec), **{side: files[number] for side, number in sides.items()}}
        for side, number in sides.items():
            row[f"{side}_critique"] = f"{'Yes' if side == 'chosen' else 'No'}, {caption(pairs.specs[number])}"
            row |= {f"{side}_score.{name}": value for name, value in labels(pairs.scenes[number], spec).items()}
        rows.append(row)
    table = folder / f"{split}.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/judged"))
    parser.add_argument("--train", type=int, default=512, help="pairs")
    parser.add_argument("--heldout", type=int, default=128, help="pairs of held-out captions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for number, split in enumerate(("train", "heldout")):
        print(write(options.out, split, getattr(options, split), options.seed + number))


if __name__ == "__main__":
    main()
