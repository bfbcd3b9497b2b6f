"""Training questions of the embedded judge: scenes that differ in one property, with the questions of the rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import Tensor

from alignflow.worlds.shapes import world
from rewards.judges.asking import Question, each_sample, two
from rewards.judges.replies import YES_NO, fill, spellings
from rewards.questions.digit_judge import PLAIN
from rewards.questions.pairwise import TEMPLATE as BETTER
from rewards.questions.prompt_echo import PromptEcho
from rewards.questions.reward_dance import TEMPLATE as BEATS
from rewards.questions.yes_probability import VQASCORE
from rewards.worlds.shapes import judge as gold

ECHO = PromptEcho().template
SCALES = ((0, 5), (0, 5), (1, 5), (0, 9))  # scales of digits; the reward's own most often
RELATED = 2.5  # how much oftener the judge is asked about a scene with a relation than about others
TURNED = 0.5  # share of images with a relation that are asked about the opposite one too: those are read last
DOUBT = 0.25  # P(yes) of an image that is wrong, for each unit of its dense score: near misses are refused less surely


@dataclass(frozen=True)
class Asked:
    """One question with what is to be answered.

    Args:
        images: which of the batch's images the question shows, in order.
        reply: a text, or the probabilities of several of one token each.
        words: for every word of the caption whether it all holds so far, and whether the image has such a thing at
            all; 0, 1 or NaN for unknown.
    """

    question: Question
    images: tuple[int, ...]
    reply: str | Mapping[str, float]
    words: tuple[tuple[float, float], ...] = ()


@dataclass
class Pairs:
    """Pairs of scenes with their specs, and their images uint8 [2 n, 64, 64, 3], the two of a pair side by side."""

    specs: list[world.Spec]
    scenes: list[world.Scene]
    images: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.images = np.stack([world.render(scene) for scene in self.scenes])

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Rows [2 count] of as many pairs, those with a relation RELATED times as often."""
        weight = np.array([RELATED if spec.relation else 1.0 for spec in self.specs[::2]])
        first = 2 * rng.choice(len(weight), count, p=weight / weight.sum())
        return (first[:, None] + [0, 1]).ravel()


def draw_pairs(split: str, n: int, seed: int) -> Pairs:
    """Up to `n` pairs of one split: a scene, and one of a caption with one thing changed, missing or added.

    The few scenes of which all twenty neighbours tried are of the other split are left out.
    """
    rng = np.random.default_rng([seed, 2])
    specs = []
    for spec in world.sample_specs(split, n, seed):
        near = near_by(spec, rng)
        specs += [spec, near] if near else []
    return Pairs(specs, [world.sample_scene(s, rng) for s in specs])


def near_by(spec: world.Spec, rng: np.random.Generator) -> world.Spec | None:
    """A neighbour of the same split, so that what is held out is never seen, right or wrong; None if there is none."""
    tried = (neighbour(spec, rng) for _ in range(20))
    return next((s for s in tried if world.is_held_out(s) == world.is_held_out(spec)), None)


def neighbour(spec: world.Spec, rng: np.random.Generator) -> world.Spec:
    """`spec` with one thing changed, or one object fewer or more."""
    kind, wants = rng.random(), spec.wants
    if kind < 0.15 and len(wants) == 2:
        return replace(spec, wants=(wants[int(rng.integers(2))],), relation=None)
    if kind < 0.3 and len(wants) == 1 and wants[0].count == 1:
        shape = str(rng.choice([s for s in world.SHAPES if s != wants[0].shape]))
        more = world.Want(shape, str(rng.choice(list(world.COLOURS))) if wants[0].colour else None)
        return replace(spec, wants=(wants[0], more) if rng.random() < 0.5 else (more, wants[0]))
    return world.corrupt(spec, rng)


def reworded(spec: world.Spec, rng: np.random.Generator) -> world.Spec:
    """Another caption of every image of `spec`: something left out, or the two kinds in the other order."""
    options = [replace(spec, background=None)] if spec.background else []
    for i, want in enumerate(spec.wants):
        plainer = [w for w in (replace(want, colour=None), replace(want, size=None)) if w != want]
        options += [replace(spec, wants=(*spec.wants[:i], other, *spec.wants[i + 1 :])) for other in plainer]
    if len(spec.wants) == 2:
        options.append(swapped(spec))
    apart = [o for o in options if len({(w.shape, w.colour) for w in o.wants}) == len(o.wants)]
    options = [o for o in apart if not world.is_held_out(o)]
    return options[rng.integers(len(options))] if options else spec


def swapped(spec: world.Spec) -> world.Spec:
    """The same with its two kinds in the other order."""
    return replace(spec, wants=spec.wants[::-1], relation=world.OPPOSITE.get(spec.relation or ""))


def first_wrong(text: str, spec: world.Spec) -> int:
    """The first word of caption `text` that no caption of `spec` has there; its length where all agree."""
    words = text.split()
    right = [world.caption(s).split() for s in (spec, swapped(spec))]
    agree = [next((i for i, (a, b) in enumerate(zip_longest(words, r)) if a != b), len(words)) for r in right]
    return min(max(agree), len(words))


Captioned = tuple[int, world.Spec, int | None]


def captions(pairs: Pairs, rows: np.ndarray, rng: np.random.Generator) -> list[Captioned]:
    """Four captions of every image in `rows` [P], the two of a pair side by side: (image, spec, first wrong word).

    Its own, the other's of its pair, another of its own truth, and one with the relation turned round, with two things
    changed or of another scene.
    """
    found: list[Captioned] = []
    for i, row in enumerate(rows):
        own, near = pairs.specs[row], pairs.specs[row ^ 1]
        found += [(i, spec, first_wrong(world.caption(spec), own)) for spec in (own, near)]
        found.append((i, reworded(own, rng), None))
        turned = replace(own, relation=world.OPPOSITE.get(own.relation or ""))
        if own.relation and not world.is_held_out(turned) and rng.random() < TURNED:
            found.append((i, turned, first_wrong(world.caption(turned), own)))
        else:
            far = near_by(near, rng) if rng.random() < 0.5 else None
            found.append((i, far or pairs.specs[rng.choice(rows)], None))
    return found


def yes_no(pairs: Pairs, rows: np.ndarray, media: Tensor, rng: np.random.Generator) -> list[Asked]:
    """VQAScore's question."""
    said = captions(pairs, rows, rng)
    return asked(VQASCORE, pairs, rows, media, said, [yes(gold(pairs.scenes[rows[one[0]]], one[1])) for one in said])


def digits(pairs: Pairs, rows: np.ndarray, media: Tensor, rng: np.random.Generator) -> list[Asked]:
    """The digit judge's question; the digits' mean is the dense score."""
    lowest, highest = SCALES[rng.integers(len(SCALES))]
    said = captions(pairs, rows, rng)
    replies = [digit(gold(pairs.scenes[rows[i]], spec)[1], lowest, highest) for i, spec, _ in said]
    return asked(PLAIN, pairs, rows, media, said, replies, lowest=lowest, highest=highest)


def asked(
    template: str,
    pairs: Pairs,
    rows: np.ndarray,
    media: Tensor,
    said: list[Captioned],
    replies: list[dict[str, float]],
    **values: Any,
) -> list[Asked]:
    """The question about every captioned image."""
    texts = [world.caption(spec) for _, spec, _ in said]
    questions = each_sample(template, media[[i for i, _, _ in said]], texts, None, **values)
    return [
        Asked(question, (i,), reply, judged_words(text, pairs.scenes[rows[i]], wrong))
        for question, text, reply, (i, _, wrong) in zip(questions, texts, replies, said, strict=True)
    ]


def judged_words(text: str, scene: world.Scene, wrong: int | None) -> tuple[tuple[float, float], ...]:
    """See `Asked.words`; `wrong` is the first word that does not hold, None if that is not known."""
    shapes = [o.shape for o in scene.objects]
    there = {word: float(word in shapes) for word in world.SHAPES}
    there |= {many: float(shapes.count(one) > 1) for one, many in world.SHAPES.items()}
    there |= {word: float(any(o.colour == word for o in scene.objects)) for word in world.COLOURS}
    there |= {word: float(any(o.size == word for o in scene.objects)) for word in world.SIZES}
    there |= {word: float(word == scene.background) for word in world.BACKGROUNDS}
    there |= {word: float(any(shapes.count(s) == n for s in shapes)) for word, n in world.COUNTS.items()}
    unknown = float("nan")
    return tuple(
        (unknown if wrong is None else float(i < wrong), there.get(word, unknown))
        for i, word in enumerate(text.split())
    )


def yes(score: tuple[float, float]) -> dict[str, float]:
    """Yes to what is all right; the better a wrong one, the less sure is the no."""
    share = 1.0 if score[0] else DOUBT * score[1]
    return {"Yes": share, "No": 1 - share}


def digit(dense: float, lowest: int, highest: int) -> dict[str, float]:
    """The two digits about `dense` on the scale, so weighted that their mean is it."""
    at = dense * (highest - lowest)
    below = min(int(at), highest - lowest - 1)
    return {str(lowest + below): 1 - at + below, str(lowest + below + 1): at - below}


def echo(pairs: Pairs, rows: np.ndarray, media: Tensor, rng: np.random.Generator) -> list[Asked]:
    """PromptEcho's question; the reply is a caption."""
    texts = [world.caption(pairs.specs[row]) for row in rows]
    said = each_sample(ECHO, media, texts, None)
    return [Asked(q, (i,), text) for i, (q, text) in enumerate(zip(said, texts, strict=True))]


def better(pairs: Pairs, rows: np.ndarray, media: Tensor, rng: np.random.Generator) -> list[Asked]:
    """Questions for the better one of a pair, as in the rewards pairwise and RewardDance, in either order."""
    found = []
    for i in range(len(rows)):
        prompt = world.caption(pairs.specs[rows[i ^ int(rng.integers(2))]])
        first, second = (gold(pairs.scenes[rows[k]], world.parse_caption(prompt))[1] for k in (i, i ^ 1))
        share = 0.5 + 0.5 * float(np.sign(first - second))
        for template, names in ((BETTER, ("1", "2")), (BEATS, ("Yes", "No"))):
            question = two(template, media[i], media[i ^ 1], prompt, None)
            found.append(Asked(question, (i, i ^ 1), {names[0]: share, names[1]: 1 - share}))
    return found


KINDS: dict[Callable[..., list[Asked]], float] = {yes_no: 0.55, digits: 0.2, echo: 0.1, better: 0.15}
"""The kinds of questions, and their shares of the steps."""


def vocabulary() -> list[str]:
    """The texts of which the judge's tokenizer knows every word: its questions, and yes and no as they may be spelt."""
    values = {"prompt": "a", "lowest": 0, "highest": 5}
    questions = [fill(text, medium="image", **values) for text in (VQASCORE, PLAIN, ECHO)]
    questions += [fill(text, medium="Image", **values) for text in (BETTER, BEATS)]
    return [*questions, "Image 1: ", *(spelling for words in YES_NO for spelling in spellings(words))]
