"""Edits of the embedded world's scenes: instructions, requested changes, images before and after. NumPy only.

An edit names its object by colour and shape, of which a scene holds one. Every edit has one right result: what it does
not name stays as it is. Places are the nine of the lattice on which `world` draws. A fill is the other kind of change:
a hole hides an object, a caption describes what to draw there.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice

import numpy as np

from alignflow.worlds.shapes.world import (
    BACKGROUNDS,
    CANVAS,
    COLOURS,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    Obj,
    Scene,
    Want,
    apart,
    size_name,
)

Box = tuple[float, float, float, float]

KINDS = ("recolour", "remove", "add", "move", "replace")
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")
LATTICE = {
    " ".join(filter(None, (row, column))) or "center": (x, y)
    for row, y in zip(_ROWS, PLACES, strict=True)
    for column, x in zip(_COLUMNS, PLACES, strict=True)
}
"""Name of a place -> its centre (x, y) in canvas units."""
HOLE_MARGIN = 1.0  # what a hole hides around its object; the largest then just fits the canvas
OBJECTS = (2, 3, 4)  # how many a scene holds before it is edited
OTHER_WORDS = ("make", "remove", "add", "move", "replace", "by", "at", "the", "a", "an", "to")


@dataclass(frozen=True)
class Edit:
    """One change: the object it names (or adds), and what becomes of it.

    Args:
        kind: one of `KINDS`.
        to_colour: of recolour and replace; None leaves it.
        to_shape: of replace.
        place: of add and move, a name in `LATTICE`.
        size: of add.
    """

    kind: str
    colour: str
    shape: str
    to_colour: str | None = None
    to_shape: str | None = None
    place: str | None = None
    size: str | None = None


def instruction(edit: Edit) -> str:
    """The canonical wording, e.g. 'move the red circle to the top left'."""
    named = f"{edit.colour} {edit.shape}"
    if edit.kind == "recolour":
        return f"make the {named} {edit.to_colour}"
    if edit.kind == "remove":
        return f"remove the {named}"
    if edit.kind == "add":
        return f"add {_a(edit.size, named)} at the {edit.place}"
    if edit.kind == "move":
        return f"move the {named} to the {edit.place}"
    return f"replace the {named} by {_a(edit.to_colour, edit.to_shape)}"


def _a(*words: str | None) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


_COLOUR, _SHAPE, _SIZE = ("|".join(names) for names in (COLOURS, SHAPES, SIZES))
_PLACE = "|".join(sorted(LATTICE, key=len, reverse=True))
_NAMED = rf"(?P<colour>{_COLOUR}) (?P<shape>{_SHAPE})"
_GRAMMAR = {
    "recolour": rf"make the {_NAMED} (?P<to_colour>{_COLOUR})",
    "remove": rf"remove the {_NAMED}",
    "add": rf"add an? (?:(?P<size>{_SIZE}) )?{_NAMED} at the (?P<place>{_PLACE})",
    "move": rf"move the {_NAMED} to the (?P<place>{_PLACE})",
    "replace": rf"replace the {_NAMED} by an? (?:(?P<to_colour>{_COLOUR}) )?(?P<to_shape>{_SHAPE})",
}
_PATTERNS = {kind: re.compile(pattern) for kind, pattern in _GRAMMAR.items()}


def words() -> list[str]:
    """All words a prompt may hold, sorted."""
    groups = (OTHER_WORDS, SHAPES, COLOURS, SIZES, " ".join(LATTICE).split())
    return sorted({word for group in groups for word in group})


def parse_instruction(text: str) -> Edit:
    """The inverse of `instruction`; case and punctuation do not matter. Raises ValueError outside the grammar."""
    words = " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(words):
            return Edit(kind, **found.groupdict())
    raise ValueError(
        f"instruction {text!r} is not one of 'make the red circle blue', 'remove the red circle', 'add a [small] red "
        "circle at the top left', 'move the red circle to the right', 'replace the red circle by a [blue] square'"
    )


# ------------------------------------------------------------------------------------------------ what an edit does
def box_at(place: tuple[float, float], width: float) -> Box:
    """The box of this width around a place."""
    x, y = place
    return x - width / 2, y - width / 2, x + width / 2, y + width / 2


def find(scene: Scene, colour: str, shape: str) -> Obj:
    """The one object of this colour and shape; raises ValueError if there is none or are several."""
    found = [o for o in scene.objects if (o.colour, o.shape) == (colour, shape)]
    if len(found) != 1:
        raise ValueError(f"the scene holds {len(found)} of {colour} {shape}, an edit needs exactly one")
    return found[0]


def change(scene: Scene, edit: Edit) -> tuple[Obj | None, Obj | None]:
    """The object before (None if it is added) and after (None if it is removed).

    Raises ValueError if the scene does not hold exactly one such object.
    """
    if edit.kind == "add":
        size = edit.size or "medium"
        return None, Obj(edit.shape, edit.colour, size, box_at(LATTICE[edit.place or ""], SIZES[size]))
    old = find(scene, edit.colour, edit.shape)
    if edit.kind == "remove":
        return old, None
    if edit.kind == "move":
        return old, replace(old, box=box_at(LATTICE[edit.place or ""], old.box[2] - old.box[0]))
    return old, replace(old, colour=edit.to_colour or old.colour, shape=edit.to_shape or old.shape)


def apply(scene: Scene, edit: Edit) -> Scene:
    """The scene after the edit. Raises ValueError as `change` does."""
    old, new = change(scene, edit)
    kept = tuple(o for o in scene.objects if o is not old)
    return Scene(kept if new is None else (*kept, new), scene.background)


def is_possible(scene: Scene, edit: Edit) -> bool:
    """Whether the edit changes something, nothing then overlaps, and no two objects are alike in colour and shape."""
    try:
        old, new = change(scene, edit)
    except ValueError:
        return False
    others = [o for o in scene.objects if o is not old]
    if new is None:
        return True
    alike = any((o.colour, o.shape) == (new.colour, new.shape) for o in others)
    return new != old and not alike and all(apart(new.box, o.box) for o in others)


# ------------------------------------------------------------------------------------------------ drawing lots
def is_held_out(edit: Edit) -> bool:
    """The split rule: a held-out colour and shape pair is named or made, or one combination in five by a stable hash.

    A combination is everything in the instruction.
    """
    made = (edit.to_colour or edit.colour, edit.to_shape or edit.shape)
    if {(edit.colour, edit.shape), made} & HELD_OUT_PAIRS:
        return True
    return zlib.crc32(instruction(edit).encode()) % 5 == 0


def sample_source(rng: np.random.Generator) -> Scene:
    """A scene of two to four objects of which no two are alike in colour and shape; most are of medium size."""
    wanted, objects = int(rng.choice(OBJECTS)), list[Obj]()
    while len(objects) < wanted:
        size = _pick(("small", "medium", "medium", "medium", "large"), rng)
        shape, colour, place = (_pick(names, rng) for names in (SHAPES, COLOURS, LATTICE))
        box = box_at(LATTICE[place], SIZES[size])
        if all(apart(box, o.box) and (o.colour, o.shape) != (colour, shape) for o in objects):
            objects.append(Obj(shape, colour, size, box))
    return Scene(tuple(objects), _pick(BACKGROUNDS, rng))


def sample_edit(scene: Scene, kind: str, rng: np.random.Generator, tries: int = 60) -> Edit | None:
    """One possible edit of this kind, of either split; None where so many tries found none."""
    return next((edit for _ in range(tries) if is_possible(scene, edit := any_edit(scene, kind, rng))), None)


def any_edit(scene: Scene, kind: str, rng: np.random.Generator) -> Edit:
    """An edit of this kind, possible or not."""
    if kind == "add":
        size = _pick(("small", "large"), rng) if rng.random() < 0.3 else None
        return Edit(kind, _pick(COLOURS, rng), _pick(SHAPES, rng), place=_pick(LATTICE, rng), size=size)
    named = scene.objects[rng.integers(len(scene.objects))]
    edit = Edit(kind, named.colour, named.shape)
    if kind == "recolour":
        return replace(edit, to_colour=_pick(COLOURS, rng))
    if kind == "move":
        return replace(edit, place=_pick(LATTICE, rng))
    if kind == "replace":
        other = _pick([s for s in SHAPES if s != edit.shape], rng)
        repaint = _pick([c for c in COLOURS if c != edit.colour], rng) if rng.random() < 0.3 else None
        return replace(edit, to_shape=other, to_colour=repaint)
    return edit


def _pick(options: Iterable[str], rng: np.random.Generator) -> str:
    options = tuple(options)
    return options[rng.integers(len(options))]


# ------------------------------------------------------------------------------------------------ tasks
@dataclass(frozen=True)
class Task:
    """A scene, what is to be done to it, and the scene after it; of a fill also the box that is repainted."""

    source: Scene
    edit: Edit
    target: Scene
    hole: Box | None = None

    @property
    def text(self) -> str:
        """The prompt: an instruction, or of a fill the caption of what belongs into the hole."""
        return instruction(self.edit) if self.hole is None else _a(self.edit.colour, self.edit.shape)

    def to_dict(self) -> dict:
        """Metadata of a prompt: the edit and the scenes before and after, ready for JSON."""
        return {"edit": asdict(self.edit), "source": self.source.to_dict(), "target": self.target.to_dict()}


def edit_tasks(split: str, seed: int, each: int = 1) -> Iterator[Task]:
    """Endless edits of split 'train' or 'heldout', the kinds in turn, up to `each` of them to a scene."""
    rng, kinds = _lots(split, seed), cycle(KINDS)
    while True:
        scene = sample_source(rng)
        for _ in range(each):
            kind = next(kinds)
            for _ in range(20):  # this scene may have none of this kind in this split
                edit = sample_edit(scene, kind, rng)
                if edit and is_held_out(edit) == (split == "heldout"):
                    yield Task(scene, edit, apply(scene, edit))
                    break


def fill_tasks(split: str, seed: int, each: int = 1) -> Iterator[Task]:
    """Endless fills of split 'train' or 'heldout', up to `each` to a scene: an object is hidden, another wanted."""
    rng = _lots(split, seed)
    while True:
        scene = sample_source(rng)
        for _ in range(each):
            hidden = scene.objects[rng.integers(len(scene.objects))]
            rest = replace(scene, objects=tuple(o for o in scene.objects if o is not hidden))
            for _ in range(20):
                edit = any_edit(rest, "add", rng)
                edit = replace(edit, place=place_name(hidden.box), size=hidden.size)
                new = (edit.colour, edit.shape) != (hidden.colour, hidden.shape)
                if new and is_possible(rest, edit) and is_held_out(edit) == (split == "heldout"):
                    yield Task(scene, edit, apply(rest, edit), grow(hidden.box, HOLE_MARGIN))
                    break


TASKS: dict[str, Callable[..., Iterator[Task]]] = {"shapes-edit": edit_tasks, "shapes-fill": fill_tasks}
"""The worlds of changes: name -> its endless tasks."""


def _lots(split: str, seed: int) -> np.random.Generator:
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}; known: train, heldout")
    return np.random.default_rng([seed, zlib.crc32(split.encode()), 5])


def dataset(
    world: str, split: str, n: int, seed: int, wrong: float = 0.0, each: int = 1
) -> tuple[list[Task], list[str]]:
    """`n` tasks of a world in TASKS with their prompts; what its embedded model is trained on.

    Args:
        wrong: the chance of a prompt that asks for something else than the target shows.
        each: tasks made of one scene, at most; those of one scene are next to each other.
    """
    rng = np.random.default_rng([seed, 6])
    tasks = list(islice(TASKS[world](split, seed, each), n))
    said = [replace(t, edit=corrupt(t, rng)) if rng.random() < wrong else t for t in tasks]
    return tasks, [task.text for task in said]


def corrupt(task: Task, rng: np.random.Generator) -> Edit:
    """Another edit of the same scene, kind and split: it names another thing or makes another; the same if none is."""
    for _ in range(20):
        if task.hole is None:
            other = sample_edit(task.source, task.edit.kind, rng)
        else:
            change = {"shape": SHAPES} if rng.random() < 0.5 else {"colour": COLOURS}
            other = replace(task.edit, **{name: _pick(values, rng) for name, values in change.items()})
        if other and other != task.edit and is_held_out(other) == is_held_out(task.edit):
            return other
    return task.edit


# ------------------------------------------------------------------------------------------------ holes
def grow(box: Box, by: float) -> Box:
    """The box with `by` canvas units more on every side."""
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def place_name(box: Box) -> str:
    """The name in LATTICE that is nearest to the middle of a box."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return min(LATTICE, key=lambda name: (LATTICE[name][0] - x) ** 2 + (LATTICE[name][1] - y) ** 2)


def draw_mask(hole: Box, size: int = CANVAS) -> np.ndarray:
    """uint8 [size, size]: 255 where a pixel's middle is in the hole, else 0."""
    middle = (np.arange(size) + 0.5) * CANVAS / size
    inside = [(middle > low) & (middle < high) for low, high in ((hole[0], hole[2]), (hole[1], hole[3]))]
    return np.uint8(255) * (inside[1][:, None] & inside[0][None, :])


def read_mask(mask: np.ndarray) -> Box:
    """The hole in a mask [h, w] in [0, 1], the inverse of `draw_mask`. Raises ValueError if there is none."""
    rows, columns = np.flatnonzero((mask >= 0.5).any(1)), np.flatnonzero((mask >= 0.5).any(0))
    if not len(rows):
        raise ValueError("the mask is empty: there is nothing to repaint")
    unit = CANVAS / mask.shape[0]
    return tuple(float(c) * unit for c in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))  # type: ignore[return-value]


def fill(scene: Scene, hole: Box, want: Want) -> tuple[Obj | None, Scene]:
    """The content of the hole, and the scene with `want` in its place: the hole gives its place and size.

    Raises ValueError where `want` leaves the colour open or asks for several.
    """
    if want.colour is None or want.count != 1:
        raise ValueError("a fill needs one object of a named colour, such as 'a red circle'")
    box = grow(hole, -HOLE_MARGIN)
    hidden = [o for o in scene.objects if not apart(o.box, box)]
    kept = tuple(o for o in scene.objects if o not in hidden)
    new = Obj(want.shape, want.colour, size_name(box[2] - box[0]), box)
    return (hidden[0] if hidden else None), Scene((*kept, new), scene.background)
