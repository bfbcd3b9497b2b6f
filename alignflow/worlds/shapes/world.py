"""The embedded world: scenes of flat coloured shapes, their captions and their images. NumPy only, no torch.

Lengths are in units of a canvas 64 units wide, x to the right and y down; `render` draws it at any pixel size.
The six task types are GenEval's (single_object, two_object, counting, colors, position, color_attr); a caption
may also mention sizes and the background. What a caption leaves open an image may choose freely.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np

from alignflow.worlds.shapes.splits import distinct_specs, misnamed

CANVAS = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 40),
    "green": (30, 160, 60),
    "cyan": (50, 205, 225),
    "blue": (35, 65, 215),
    "purple": (160, 40, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (12, 12, 12),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}  # word: plural
SIZES = {"small": 11.0, "medium": 16.0, "large": 22.0}  # width of the box
SIZE_LIMITS = (13.5, 19.0)  # a box narrower than the first is small, wider than the second is large
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT_PAIRS = frozenset(
    {("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"), ("purple", "circle")}
)
GAP = 2.0  # least free space between two objects
PLACES = (12.0, 32.0, 52.0)  # sampled objects have their centres there, on both axes


# ------------------------------------------------------------------------------------------------ scenes and images
@dataclass(frozen=True)
class Obj:
    """One drawn shape; `box` is (x0, y0, x1, y1) in canvas units, `size` small, medium or large."""

    shape: str
    colour: str
    size: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """Content of an image. `asdict` and `Scene.from_dict` convert it to JSON and back."""

    objects: tuple[Obj, ...]
    background: str

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Scene:
        return cls(tuple(Obj(**{**o, "box": tuple(o["box"])}) for o in data["objects"]), data["background"])


def size_name(width: float) -> str:
    """The size word of a box `width` canvas units wide."""
    return "small" if width < SIZE_LIMITS[0] else "medium" if width <= SIZE_LIMITS[1] else "large"


def shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u, v) of the unit square, v down, are inside `shape` drawn to fill that square."""
    inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    if shape == "circle":
        return (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    if shape == "square":
        return inside
    if shape == "triangle":
        return inside & (np.abs(u - 0.5) <= v / 2)
    if shape == "cross":
        return inside & ((np.abs(u - 0.5) <= 1 / 6) | (np.abs(v - 0.5) <= 1 / 6))
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(scene: Scene, size: int = CANVAS, supersample: int = 4) -> np.ndarray:
    """Draws `scene` as uint8 [size, size, 3]; edges are averaged over supersample**2 points a pixel."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for o in scene.objects:
        x0, y0, x1, y1 = (c * size / CANVAS for c in o.box)
        left, top = max(int(x0), 0), max(int(y0), 0)
        right, bottom = min(int(np.ceil(x1)), size), min(int(np.ceil(y1)), size)
        if left >= right or top >= bottom:
            continue
        k = supersample
        xs = left + (np.arange((right - left) * k) + 0.5) / k
        ys = top + (np.arange((bottom - top) * k) + 0.5) / k
        mask = shape_mask(o.shape, ((xs - x0) / (x1 - x0))[None, :], ((ys - y0) / (y1 - y0))[:, None])
        cover = mask.reshape(bottom - top, k, right - left, k).mean((1, 3), dtype=np.float32)[..., None]
        patch = image[top:bottom, left:right]
        patch += cover * (np.array(COLOURS[o.colour], np.float32) - patch)
    return np.round(image).astype(np.uint8)


def relation_of(a: tuple, b: tuple, margin: float = 0.1) -> np.ndarray:
    """GenEval's relative position of box `a` to box `b`: a vector (right, down); a relation holds beyond 0.5.

    The offset of the centres is shrunk by margin * (sum of the boxes' extents) on each axis, then divided by
    the length of the unshrunk offset; zero where the boxes are on each other.
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    offset = (first[:2] + first[2:] - second[:2] - second[2:]) / 2
    extent = first[2:] - first[:2] + second[2:] - second[:2]
    shrunk = np.maximum(np.abs(offset) - margin * extent, 0) * np.sign(offset)
    return shrunk / max(float(np.hypot(*offset)), 1e-6)


# ------------------------------------------------------------------------------------------------ captions
@dataclass(frozen=True)
class Want:
    """`count` objects of one kind; None leaves the attribute open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Spec:
    """Request of a caption: one or two kinds of object, how the first is placed to the second, the background."""

    wants: tuple[Want, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def task(self) -> str:
        """GenEval's task type."""
        if self.relation:
            return "position"
        if len(self.wants) == 2:
            return "color_attr" if all(w.colour for w in self.wants) else "two_object"
        if self.wants[0].count > 1:
            return "counting"
        return "colors" if self.wants[0].colour else "single_object"

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Spec:
        return cls(tuple(Want(**w) for w in data["wants"]), data["relation"], data["background"])


def group_words(want: Want) -> str:
    """The words for the objects of `want`, e.g. 'two small green squares'."""
    words = [w for w in (want.size, want.colour) if w]
    words.append(want.shape if want.count == 1 else SHAPES[want.shape])
    if want.count == 1:
        return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    return " ".join([next(k for k, n in COUNTS.items() if n == want.count), *words])


def caption(spec: Spec) -> str:
    """The canonical caption of `spec`, e.g. 'a red circle left of a blue square on a gray background'."""
    text = f" {spec.relation or 'and'} ".join(group_words(w) for w in spec.wants)
    return f"{text} on a {spec.background} background" if spec.background else text


GROUP = (
    rf"(a|an|the|{'|'.join(COUNTS)}|[1-4]) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?"
    rf"({'|'.join([*SHAPES, *SHAPES.values()])})"
)
_JOIN = rf"(?: (and|(?:(?:to|on) the )?(?:{'|'.join(RELATIONS)})) {GROUP})?"
_CAPTION = re.compile(
    rf"(?:an? (?:photo|picture|image|drawing) of )?{GROUP}{_JOIN}(?: on an? ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(text: str) -> Spec:
    """The inverse of `caption`; case, punctuation and a leading 'a photo of' do not matter.

    Raises ValueError where `text` is outside the world's grammar.
    """
    words = " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split()).replace("grey", "gray")
    found = _CAPTION.fullmatch(words)
    if not found:
        raise ValueError(
            f"caption {text!r} is outside the grammar '<a|two|three|four> [size] [colour] <shape> [<and|left of|"
            "right of|above|below> <the same>] [on a <colour> background]'"
        )
    g = found.groups()
    wants = [read_want(g[0], g[1], g[2], g[3], text)]
    if g[4]:
        wants.append(read_want(g[5], g[6], g[7], g[8], text))
    relation = next((r for r in RELATIONS if g[4] and g[4].endswith(r)), None)
    if len(wants) == 2 and relation is None and len({(w.shape, w.colour, w.size) for w in wants}) == 1:
        raise ValueError(f"caption {text!r} names the same object twice; say its number instead")
    return Spec(tuple(wants), relation, g[9])


def read_want(number: str, size: str | None, colour: str | None, shape: str, text: str) -> Want:
    """The inverse of `group_words`, from the four groups that GROUP matched in the caption `text`."""
    count = int(number) if number.isdigit() else COUNTS.get(number, 1)
    singular = next(s for s, plural in SHAPES.items() if shape in (s, plural))
    if (count == 1) != (shape == singular):
        raise ValueError(f"caption {text!r}: {number!r} does not go with {shape!r}")
    return Want(singular, colour, size, count)


# ------------------------------------------------------------------------------------------------ splits
def is_held_out(spec: Spec) -> bool:
    """The split rule: a held-out colour and shape pair, or one combination in five by a stable hash.

    A combination is what the objects are, how many and in which relation ('A left of B' is 'B right of A');
    sizes and the background belong to it for single_object, colors and two_object only, which have few others.
    """
    if any((w.colour, w.shape) in HELD_OUT_PAIRS for w in spec.wants):
        return True
    full = spec.task in ("single_object", "colors", "two_object")
    wants = [f"{w.count} {w.size if full else ''} {w.colour} {w.shape}" for w in spec.wants]
    relation = spec.relation
    if wants != sorted(wants):
        wants, relation = wants[::-1], OPPOSITE.get(relation or "")
    key = "|".join([*wants, str(relation), str(spec.background) if full else ""])
    return zlib.crc32(key.encode()) % 5 == 0


def sample_spec(task: str, rng: np.random.Generator) -> Spec:
    """Draws a spec of one of TASKS, from both splits."""

    def pick(options: Iterable[str]) -> str:
        options = tuple(options)
        return options[rng.integers(len(options))]

    def maybe(options: Iterable[str], p: float) -> str | None:
        return pick(options) if rng.random() < p else None

    background = maybe(BACKGROUNDS, 0.3)
    if task in ("single_object", "colors"):
        colour = pick(COLOURS) if task == "colors" else None
        return Spec((Want(pick(SHAPES), colour, maybe(("small", "large"), 0.4)),), None, background)
    if task == "counting":
        return Spec((Want(pick(SHAPES), maybe(COLOURS, 0.7), None, int(rng.integers(2, 5))),), None, background)
    if task == "two_object":
        shapes = rng.permutation(list(SHAPES))[:2]
        return Spec(tuple(Want(str(s), None, maybe(("small", "large"), 0.4)) for s in shapes), None, background)
    if task == "position":
        shapes = rng.permutation(list(SHAPES))[:2]
        coloured = rng.random() < 0.5
        wants = tuple(Want(str(s), pick(COLOURS) if coloured else None) for s in shapes)
        return Spec(wants, pick(RELATIONS), background if rng.random() < 0.5 else None)
    if task == "color_attr":
        colours = rng.permutation(list(COLOURS))[:2]
        return Spec(tuple(Want(pick(SHAPES), str(c)) for c in colours), None, background)
    raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")


def sample_specs(split: str, n: int, seed: int) -> list[Spec]:
    """`n` specs of split 'train' or 'heldout', the six tasks in turn; distinct while the task has new ones to give."""
    return distinct_specs(split, n, seed, TASKS, sample_spec, is_held_out)


def prompts(split: str, n: int, seed: int) -> list[str]:
    """`n` captions of split 'train' or 'heldout', the six tasks in turn, the same for the same seed."""
    return [caption(s) for s in sample_specs(split, n, seed)]


def corrupt(spec: Spec, rng: np.random.Generator) -> Spec:
    """`spec` with one thing changed, so that an image of `spec` no longer fits."""
    i = int(rng.integers(len(spec.wants)))
    want, other = spec.wants[i], spec.wants[1 - i] if len(spec.wants) == 2 else None
    changes = [replace(want, shape=str(rng.choice([s for s in SHAPES if s != want.shape])))]
    if want.colour:
        changes.append(replace(want, colour=str(rng.choice([c for c in COLOURS if c != want.colour]))))
    if want.size:
        changes.append(replace(want, size="small" if want.size == "large" else "large"))
    if want.count > 1:
        changes.append(replace(want, count=int(rng.choice([n for n in (2, 3, 4) if n != want.count]))))
    if spec.relation and rng.random() < 0.5:
        return replace(spec, relation=OPPOSITE[spec.relation])
    if other and want.colour != other.colour and want.shape != other.shape and rng.random() < 0.4:
        return replace(spec, wants=(replace(want, colour=other.colour), replace(other, colour=want.colour)))
    changed = changes[rng.integers(len(changes))]
    if changed == other:
        return corrupt(spec, rng)
    return replace(spec, wants=tuple(changed if j == i else w for j, w in enumerate(spec.wants)))


# ------------------------------------------------------------------------------------------------ layouts
def _boxes(widths: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """One try at boxes [n, 4] of these widths on the lattice of PLACES, or None where two come nearer than GAP."""
    centre = np.array(PLACES)[rng.integers(0, len(PLACES), (len(widths), 2))]
    half = widths[:, None] / 2
    boxes = np.concatenate([centre - half, centre + half], 1)
    return boxes if all(apart(a, b) for a, b in combinations(boxes, 2)) else None


def apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes leave GAP between them."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= GAP


def sample_scene(spec: Spec, rng: np.random.Generator) -> Scene:
    """Draws a scene that satisfies `spec`: nothing overlaps, nothing is added, open attributes are chosen freely.

    An open colour or background is any, an open size is medium. Raises ValueError if no layout was found.
    """
    kinds = [w for w in spec.wants for _ in range(w.count)]
    first = spec.wants[0].count
    for _ in range(2000):
        boxes = _boxes(np.array([SIZES[k.size or "medium"] for k in kinds]), rng)
        if boxes is None:
            continue
        if spec.relation:
            direction = np.array(RELATIONS[spec.relation])
            if min(float(relation_of(a, b) @ direction) for a in boxes[:first] for b in boxes[first:]) < 0.6:
                continue
        break
    else:
        raise ValueError(f"no room on the canvas for {caption(spec)!r}")
    free = {w: str(rng.choice(list(COLOURS))) for w in spec.wants}  # objects of one kind share their colour
    objects = tuple(
        Obj(k.shape, k.colour or free[k], k.size or "medium", tuple(b.tolist()))
        for k, b in zip(kinds, boxes, strict=True)
    )
    return Scene(objects, spec.background or str(rng.choice(list(BACKGROUNDS))))


def crowd(rng: np.random.Generator) -> Scene:
    """One to eight objects of any kind and size."""
    wanted, objects = int(rng.integers(1, 9)), list[Obj]()
    for _ in range(10 * wanted):
        size, shape, colour = (str(rng.choice(list(names))) for names in (SIZES, SHAPES, COLOURS))
        box = _boxes(np.array([SIZES[size]]), rng)[0]  # type: ignore[index]  # one box alone is never too near
        if len(objects) < wanted and all(apart(box, o.box) for o in objects):
            objects.append(Obj(shape, colour, size, tuple(box.tolist())))
    return Scene(tuple(objects), str(rng.choice(list(BACKGROUNDS))))


def dataset(split: str, n: int, seed: int, wrong: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """`n` images, uint8 [n, 64, 64, 3], with their captions; what the embedded models are trained on.

    Args:
        wrong: probability, applied twice to every caption, of one wrong detail.
    """
    rng = np.random.default_rng([seed, 1])
    specs = sample_specs(split, n, seed)
    scenes = [sample_scene(s, rng) for s in specs]
    return np.stack([render(scene) for scene in scenes]), [
        caption(misnamed(s, wrong, rng, corrupt, is_held_out)) for s in specs
    ]
