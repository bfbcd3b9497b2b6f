"""Ways to word a caption of the embedded world. All of them are inside its grammar, so the verifier reads every one."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from alignflow.worlds.shapes.splits import distinct_specs
from alignflow.worlds.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OPPOSITE,
    SIZES,
    TASKS,
    Spec,
    Want,
    caption,
    is_held_out,
    parse_caption,
    sample_spec,
)

LEADS = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ")


@dataclass(frozen=True)
class Style:
    """Wording of a caption. The default is the canonical wording of :func:`alignflow.worlds.shapes.world.caption`.

    Args:
        lead: one of LEADS.
        the: "the" instead of "a" before a single object.
        digits: numbers as digits.
        long: "to the left of" instead of "left of".
        swap: the objects the other way round, with the opposite relation.
        background: a background for a caption that leaves it open.
        size: a size for all objects whose size is open.
        colour: a colour for all objects whose colour is open.
    """

    lead: str = ""
    the: bool = False
    digits: bool = False
    long: bool = False
    swap: bool = False
    background: str | None = None
    size: str | None = None
    colour: str | None = None


def _drawn(rng: np.random.Generator, said: float, added: float) -> Style:
    """A random style: each way of saying it with probability `said`, each addition with probability `added`."""

    def one(options: list[str], p: float) -> str | None:
        pick = options[rng.integers(len(options))]
        return pick if rng.random() < p else None

    lead = one(list(LEADS[1:]), said) or ""
    the, digits, long, swap = (bool(rng.random() < said) for _ in range(4))
    return Style(
        lead, the, digits, long, swap,
        one(list(BACKGROUNDS), added), one(list(SIZES), added / 4), one(list(COLOURS), added / 4),
    )  # fmt: skip


def users(rng: np.random.Generator) -> Style:
    """A user's style: wordy, in words the generator was not trained on, and nothing added."""
    return _drawn(rng, 0.6, 0.0)


def rewriters(rng: np.random.Generator) -> Style:
    """The style of a rewriter that knows the language and not what the generator follows best."""
    return _drawn(rng, 0.3, 0.5)


def mutated(style: Style, rng: np.random.Generator, rate: float = 0.2) -> Style:
    """`style` with each of its parts drawn anew with probability `rate`."""
    other = rewriters(rng)
    names = [part.name for part in fields(Style) if rng.random() < rate]
    return replace(style, **{name: getattr(other, name) for name in names})


def worded(spec: Spec, style: Style) -> str:
    """The caption of `spec` in a style; what the style adds holds where `spec` leaves it open."""
    wants = tuple(replace(w, size=w.size or style.size, colour=w.colour or style.colour) for w in spec.wants)
    if len({(w.shape, w.size, w.colour, w.count) for w in wants}) < len(wants):
        wants = spec.wants  # the additions made them the same
    relation = spec.relation
    if style.swap:
        wants, relation = wants[::-1], OPPOSITE.get(relation or "")
    groups = [_group(want, style) for want in wants]
    side = relation in ("left of", "right of")
    join = f"to the {relation}" if side and style.long else relation or "and"
    background = spec.background or style.background
    text = style.lead + f" {join} ".join(groups)
    return f"{text} on a {background} background" if background else text


def _group(want: Want, style: Style) -> str:
    plain = caption(Spec((want,)))
    number, rest = plain.split(" ", 1)
    if want.count > 1:
        return f"{COUNTS[number]} {rest}" if style.digits else plain
    return f"the {rest}" if style.the else plain


def keeps(spec: Spec, text: str) -> bool:
    """Whether every image of ``text`` is one of `spec`: it says all that `spec` says, and perhaps more."""
    try:
        found = parse_caption(text)
    except ValueError:
        return False
    other = Spec(found.wants[::-1], OPPOSITE.get(found.relation or ""), found.background)
    return any(
        len(one.wants) == len(spec.wants)
        and all(_fits(want, said) for want, said in zip(spec.wants, one.wants, strict=True))
        and spec.relation in (None, one.relation)
        and spec.background in (None, one.background)
        for one in (found, other)
    )


def _fits(want: Want, said: Want) -> bool:
    same = (want.shape, want.count) == (said.shape, said.count)
    return same and want.colour in (None, said.colour) and want.size in (None, said.size)


def prompts(split: str, n: int, seed: int) -> list[tuple[Spec, str]]:
    """`n` specs of split 'train' or 'heldout', each in a user's wording; the same for the same seed."""
    rng = np.random.default_rng([seed, split == "heldout"])
    return [
        (spec, worded(spec, users(rng))) for spec in distinct_specs(split, n, seed, TASKS, sample_spec, is_held_out)
    ]
