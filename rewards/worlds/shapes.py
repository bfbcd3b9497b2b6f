"""The embedded world's gold reward: GenEval's rules on the scene parsed from an image. No model.

This module knows `alignflow.worlds.shapes` because the world's definition lives there, and that holds no model; it is
the one exception to "rewards import no generator".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from alignflow.worlds.shapes.parse import parse_image
from alignflow.worlds.shapes.world import CANVAS, RELATIONS, Obj, Scene, Spec, Want, parse_caption, relation_of

_spec = lru_cache(4096)(parse_caption)  # a group of samples shares its prompt


def score(image: np.ndarray, prompt: str) -> tuple[float, float]:
    """(strict, dense) of an image [h, w, 3], uint8 or float in [0, 1]; see `judge`.

    Raises ValueError where `prompt` is outside the world's grammar.
    """
    return judge(parse_image(image), _spec(prompt))


def score_batch(images: Any, prompts: list[str]) -> dict[str, Any]:
    """'strict' and 'dense' of images [N, 3, H, W] in [0, 1], one prompt each; see `score_each`."""
    return score_each(images, prompts, score, ("strict", "dense"))


def score_each(
    media: Any, prompts: Sequence[Any], score: Callable[[np.ndarray, Any], tuple[float, ...]], names: Sequence[str]
) -> dict[str, Any]:
    """Scores media [N, ..., 3, H, W] in [0, 1] (array or CPU tensor), one prompt each.

    Args:
        score: of one [..., H, W, 3] and its prompt (with what came with it), as many numbers as there are `names`.

    Returns {name: float32 [N], 'reasons': {i: why}}; all scores are NaN, with a reason, where a prompt is outside the
    grammar or an image holds numbers that are not finite.
    """
    pixels = np.moveaxis(np.asarray(media, np.float32), -3, -1)
    if len(pixels) != len(prompts):
        raise ValueError(f"{len(pixels)} media for {len(prompts)} prompts")
    out = np.full((len(names), len(prompts)), np.nan, np.float32)
    reasons: dict[int, str] = {}
    for i, (one, prompt) in enumerate(zip(pixels, prompts, strict=True)):
        if not np.isfinite(one).all():
            reasons[i] = f"the {'image' if one.ndim == 3 else 'video'} holds NaN or infinity"
            continue
        try:
            out[:, i] = score(one.clip(0, 1), prompt)
        except ValueError as error:
            reasons[i] = str(error)
    return dict(zip(names, out, strict=True)) | {"reasons": reasons}


def regions(images: Any, prompts: Sequence[str]) -> np.ndarray:
    """How well the object in each box fits, [N, 1, H, W] in [-1, 1]; NaN outside boxes and for an invalid caption.

    1 is an object with all that is asked of the one it stands for in the best matching, -1 one that nothing asks for.
    Where boxes overlap, the lower score counts.

    Args:
        images: [N, 3, H, W] in [0, 1] (array or CPU tensor).
    """
    pixels = np.moveaxis(np.asarray(images, np.float32), -3, -1)
    maps = np.full((len(pixels), 1, *pixels.shape[1:3]), np.nan, np.float32)
    for one, image, prompt in zip(maps, pixels, prompts, strict=True):
        try:
            spec = _spec(prompt)
        except ValueError:
            continue
        objects = parse_image(image.clip(0, 1)).objects
        wanted = [w for w in spec.wants for _ in range(w.count)]
        likes = np.array([[likeness(w, o) for o in objects] for w in wanted]).reshape(len(wanted), -1)
        matched = dict(zip(*(side.tolist() for side in linear_sum_assignment(likes, maximize=True)[::-1]), strict=True))
        for number, found in enumerate(objects):
            like = likes[matched[number], number] if number in matched else 0.0
            left, top, right, bottom = (side * image.shape[0] / CANVAS for side in found.box)
            box = one[0, int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
            box[:] = np.fmin(box, 2 * like - 1)
    return maps


def judge(scene: Scene, spec: Spec) -> tuple[float, float]:
    """(strict, dense) of a scene: strict is 1 if all that `spec` asks for holds and nothing else is there, or 0.

    Dense is objects * relation * background: `objects` the mean likeness of wanted and found objects in their
    best matching, with every missing or additional object a zero; `relation` and `background` 1 where right and
    1/2, 0.7 where wrong. In [0, 1], and 1 exactly where strict is 1.
    """
    wanted = [w for w in spec.wants for _ in range(w.count)]
    likes = np.array([[likeness(w, o) for o in scene.objects] for w in wanted]).reshape(len(wanted), -1)
    total, relation = best_match(likes, spec, scene.objects)
    objects = total / max(likes.shape)
    background = 1.0 if spec.background in (None, scene.background) else 0.7
    dense = objects * (0.5 + 0.5 * relation) * background
    return float(dense == 1.0), dense


def best_match(likes: np.ndarray, spec: Spec, objects: tuple[Obj, ...]) -> tuple[float, float]:
    """(sum of `likes` [wanted, objects], share of the relation that holds) of the best one-to-one matching.

    Where several matchings are equally like, the one in which the relation holds best counts.
    """
    rows, cols = linear_sum_assignment(likes, maximize=True)
    total = float(likes[rows, cols].sum())
    if spec.relation is None:
        return total, 1.0
    matches = [dict(zip(rows.tolist(), cols.tolist(), strict=True))]
    if likes.shape[0] == likes.shape[1] <= 4:
        every = [dict(enumerate(p)) for p in permutations(range(likes.shape[0]))]
        matches += [m for m in every if sum(likes[i, j] for i, j in m.items()) >= total - 1e-9]
    return total, max(relation_share(spec, m, objects) for m in matches)


def relation_share(spec: Spec, match: dict[int, int], objects: tuple[Obj, ...]) -> float:
    """The mean over pairs of 1 if the relation holds, else how far it is on the way there (below 1/2), or 0."""
    first, second = spec.wants[0].count, spec.wants[1].count
    direction = np.array(RELATIONS[spec.relation or ""])
    shares = []
    for i in range(first):
        for j in range(first, first + second):
            if i not in match or j not in match:
                shares.append(0.0)
                continue
            offset = relation_of(objects[match[i]].box, objects[match[j]].box)
            along = float(offset @ direction)
            shares.append(1.0 if along > 0.5 else max(along, 0.0))
    return sum(shares) / len(shares)


def likeness(want: Want, obj: Obj) -> float:
    """The share of the named attributes `obj` has, in [0, 1]; the shape counts double."""
    named = [(2, want.shape, obj.shape), (1, want.colour, obj.colour), (1, want.size, obj.size)]
    asked = [(weight, a == b) for weight, a, b in named if a is not None]
    return sum(weight * right for weight, right in asked) / sum(weight for weight, _ in asked)
