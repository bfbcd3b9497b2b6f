"""The embedded world in motion: captioned videos of shapes that move, fall, are thrown or bounce. NumPy only, no torch.

Lengths are those of `world` (a canvas 64 units wide, y down); time runs from 0 at the first frame to 1 at the last.
Every motion is known in closed form, so that what a caption allows is a set of paths and not a matter of taste.
The objects of a video move alike. What a caption leaves open a video may choose freely.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np

from alignflow.worlds.shapes.splits import distinct_specs, misnamed
from alignflow.worlds.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    GROUP,
    HELD_OUT_PAIRS,
    SHAPES,
    Obj,
    Scene,
    Want,
    group_words,
    read_want,
    render,
)

SIZE = 32  # pixels a side
FRAMES = 9
WIDTH = 18.0  # width of every object
ROOM = (11.0, 53.0)  # where centres may be, on both axes; the ground is where a centre at the second touches it
GRAVITY = 84.0  # units a video squared: a fall takes the whole video from one end of ROOM to the other
REBOUND = 0.85  # share of the speed that is left after a bounce
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ACTIONS = ("stay", *DIRECTIONS)  # what an object can do from one frame to the next; a prompt's actions are places here
TRAVELS = {"slowly": (12.0, 20.0), None: (12.0, 44.0), "quickly": (32.0, 44.0)}  # units a video that a caption allows
THROWS = ((26.0, 40.0), (38.0, 50.0))  # speed to the side, speed upwards
DROPS = (13.0, 23.0)  # height that a bouncing object falls from
KINDS = ("move", "fall", "throw", "bounce")
TASKS = ("direction", "speed", "fall", "throw", "bounce", "count")


# ------------------------------------------------------------------------------------------------ captions
@dataclass(frozen=True)
class Motion:
    """One of KINDS; a move has one of DIRECTIONS and perhaps a speed of TRAVELS, a throw left or right."""

    kind: str
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class VideoSpec:
    """Request of a caption: objects of one kind, how all of them move, the background."""

    want: Want
    motion: Motion
    background: str | None = None

    @property
    def task(self) -> str:
        """One of TASKS."""
        if self.want.count > 1:
            return "count"
        return self.motion.kind if self.motion.kind != "move" else "speed" if self.motion.speed else "direction"

    def to_dict(self) -> dict:
        return asdict(self)


def _verb(motion: Motion, many: bool) -> str:
    if motion.kind == "throw":
        return f"{'are' if many else 'is'} thrown to the {motion.direction}"
    words = [motion.kind if many else motion.kind + "s", motion.direction, motion.speed]
    return " ".join(word for word in words if word)


def caption(spec: VideoSpec) -> str:
    """The canonical caption of `spec`, e.g. 'two green squares move up slowly on a gray background'."""
    text = f"{group_words(spec.want)} {_verb(spec.motion, spec.want.count > 1)}"
    return f"{text} on a {spec.background} background" if spec.background else text


_CAPTION = re.compile(
    rf"(?:an? (?:video|clip) of )?{GROUP} (moves?|falls?|bounces?|(?:is|are) thrown to the)"
    rf"(?: ({'|'.join(DIRECTIONS)}))?(?: (slowly|quickly))?(?: on an? ({'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(text: str) -> VideoSpec:
    """The inverse of `caption`; case, punctuation and a leading 'a video of' do not matter.

    Raises ValueError where `text` is outside the world's grammar.
    """
    words = " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split()).replace("grey", "gray")
    found = _CAPTION.fullmatch(words)
    if found:
        number, size, colour, shape, verb, direction, speed, background = found.groups()
        want = read_want(number, size, colour, shape, text)
        motion = Motion("throw" if "thrown" in verb else verb.removesuffix("s"), direction, speed)
        spec = VideoSpec(want, motion, background)
        said = " ".join(word for word in (verb, direction, speed) if word)
        if motion in motions() and said == _verb(motion, want.count > 1) and size is None and want.count <= 3:
            return spec
    raise ValueError(
        f"caption {text!r} is outside the grammar '<a|two|three> [colour] <shape> <moves left|right|up|down [slowly|"
        "quickly], falls, is thrown to the left|right, bounces> [on a <colour> background]'"
    )


def words() -> list[str]:
    """All words a caption may hold, sorted."""
    every = [VideoSpec(Want(shape, None, None, n), motion) for shape in SHAPES for motion in motions() for n in (1, 2)]
    others = ["an", "three", "video", "clip", "of", "on", "background", *COLOURS, *BACKGROUNDS]
    return sorted({word for spec in every for word in caption(spec).split()}.union(others))


@cache
def motions() -> tuple[Motion, ...]:
    """All motions a caption can name."""
    moves = [Motion("move", direction, speed) for direction in DIRECTIONS for speed in TRAVELS]
    throws = [Motion("throw", direction) for direction in ("left", "right")]
    return (*moves, Motion("fall"), *throws, Motion("bounce"))


# ------------------------------------------------------------------------------------------------ splits
def is_held_out(spec: VideoSpec) -> bool:
    """The split rule: a held-out colour and shape pair, or one combination in five by a stable hash.

    A combination is what the objects are, how many, and how they move; the background does not belong to it.
    """
    if (spec.want.colour, spec.want.shape) in HELD_OUT_PAIRS:
        return True
    key = f"{spec.want.count} {spec.want.colour} {spec.want.shape} {spec.motion}"
    return zlib.crc32(key.encode()) % 5 == 0


def sample_spec(task: str, rng: np.random.Generator) -> VideoSpec:
    """Draws a spec of one of TASKS, from both splits."""
    colour = str(rng.choice(list(COLOURS))) if rng.random() < 0.8 else None
    count = int(rng.integers(2, 4)) if task == "count" else 1
    kind = str(rng.choice(KINDS)) if task == "count" else "move" if task in ("direction", "speed") else task
    options = [m for m in motions() if m.kind == kind]
    if task in ("direction", "speed"):
        options = [m for m in options if (m.speed is not None) == (task == "speed")]
    motion = options[rng.integers(len(options))]
    if kind == "throw":
        count = min(count, 2)  # no room for three
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.2 else None
    return VideoSpec(Want(str(rng.choice(list(SHAPES))), colour, None, count), motion, background)


def sample_specs(split: str, n: int, seed: int) -> list[VideoSpec]:
    """`n` specs of split 'train' or 'heldout', the six tasks in turn; distinct while the task has new ones to give."""
    return distinct_specs(split, n, seed, TASKS, sample_spec, is_held_out)


def prompts(split: str, n: int, seed: int) -> list[str]:
    """`n` captions of split 'train' or 'heldout', the six tasks in turn, the same for the same seed."""
    return [caption(s) for s in sample_specs(split, n, seed)]


def corrupt(spec: VideoSpec, rng: np.random.Generator) -> VideoSpec:
    """`spec` with one thing changed, so that a video of `spec` no longer fits; half the time it is the motion."""
    want, motion = spec.want, spec.motion
    if rng.random() < 0.5:
        clear = [m for m in motions() if (m.kind, m.direction) != (motion.kind, motion.direction)]
        if motion.speed and rng.random() < 0.5:
            clear = [replace(motion, speed="slowly" if motion.speed == "quickly" else "quickly")]
        clear = [m for m in clear if want.count < 3 or m.kind != "throw"]
        return replace(spec, motion=clear[rng.integers(len(clear))])
    changes = [replace(want, shape=str(rng.choice([s for s in SHAPES if s != want.shape])))]
    if want.colour:
        changes.append(replace(want, colour=str(rng.choice([c for c in COLOURS if c != want.colour]))))
    counts = [n for n in (1, 2, 3) if n != want.count and (n < 3 or motion.kind != "throw")]
    changes.append(replace(want, count=int(rng.choice(counts))))
    return replace(spec, want=changes[rng.integers(len(changes))])


# ------------------------------------------------------------------------------------------------ physics
def times(frames: int = FRAMES) -> np.ndarray:
    """The time of every frame, [frames] from 0 to 1."""
    return np.linspace(0, 1, frames)


def move(direction: str, travel: float, t: np.ndarray) -> np.ndarray:
    """Uniform motion over `travel` units: offsets from the start at times `t` [F], [F, 2]."""
    return t[:, None] * travel * np.array(DIRECTIONS[direction], float)


def fly(across: float, upwards: float, t: np.ndarray) -> np.ndarray:
    """Free flight with this velocity at the start: offsets, [F, 2]; (0, 0) is free fall from rest."""
    return np.stack([across * t, 0.5 * GRAVITY * t**2 - upwards * t], 1)


def bounce(drop: float, t: np.ndarray) -> np.ndarray:
    """A fall from rest of `drop` units to the ground and the flight after it: offsets, [F, 2]."""
    hit = (2 * drop / GRAVITY) ** 0.5
    after = np.maximum(t - hit, 0)
    down = np.minimum(0.5 * GRAVITY * t**2, drop)
    return np.stack([0 * t, down - REBOUND * GRAVITY * hit * after + 0.5 * GRAVITY * after**2], 1)


def paths(motion: Motion, steps: int, t: np.ndarray) -> np.ndarray:
    """Paths that `motion` allows, [K, F, 2]: offsets from the start, for `steps` values of everything left open."""
    if motion.kind == "fall":
        return fly(0, 0, t)[None]
    if motion.kind == "bounce":
        return np.stack([bounce(drop, t) for drop in np.linspace(*DROPS, steps)])
    direction = motion.direction or ""
    if motion.kind == "move":
        return np.stack([move(direction, travel, t) for travel in np.linspace(*TRAVELS[motion.speed], steps)])
    throws = [(a, u) for a in np.linspace(*THROWS[0], steps) for u in np.linspace(*THROWS[1], steps)]
    return np.stack([fly(DIRECTIONS[direction][0] * a, u, t) for a, u in throws])


def actions(motion: Motion, frames: int = FRAMES) -> list[int]:
    """The action of every step from frame to frame that `motion` determines, as places in ACTIONS.

    Raises ValueError for a motion whose steps depend on what its caption leaves open.
    """
    direction = "down" if motion.kind == "fall" else motion.direction if motion.kind == "move" else None
    if direction is None:
        raise ValueError(f"the steps of a {motion.kind} are not determined by its caption")
    return [ACTIONS.index(direction)] * (frames - 1)


# ------------------------------------------------------------------------------------------------ videos
@dataclass(frozen=True)
class Video:
    """Content of a video: its first frame, and how far all objects are from there in every frame, [FRAMES, 2]."""

    scene: Scene
    path: np.ndarray

    def frames(self) -> list[Scene]:
        """The scene of every frame."""
        return [
            Scene(tuple(_moved(o, *offset) for o in self.scene.objects), self.scene.background) for offset in self.path
        ]


def _moved(obj: Obj, right: float, down: float) -> Obj:
    x0, y0, x1, y1 = obj.box
    return replace(obj, box=(x0 + right, y0 + down, x1 + right, y1 + down))


def sample_video(spec: VideoSpec, rng: np.random.Generator) -> Video:
    """Draws a video that satisfies `spec`: several objects are in a row across their motion, nothing is added."""
    inner = slice(1, -1) if spec.motion.kind in ("move", "bounce") else slice(None)
    options = paths(spec.motion, 3 if spec.motion.kind == "throw" else 5, times())[inner]
    path = options[rng.integers(len(options))]
    low, high = ROOM[0] - path.min(0), ROOM[1] - path.max(0)
    if spec.motion.kind == "bounce":
        low[1] = high[1]  # the lowest point of its path is the ground
    along = 0 if spec.motion.direction in ("left", "right") else 1
    lanes = np.linspace(low[1 - along], high[1 - along], 3 if high[1 - along] - low[1 - along] >= 40 else 2)
    count = spec.want.count
    centres = np.empty((count, 2))
    centres[:, along] = rng.choice(np.linspace(low[along], high[along], 3))
    centres[:, 1 - along] = rng.permutation(lanes)[:count]
    colour = spec.want.colour or str(rng.choice(list(COLOURS)))
    half = WIDTH / 2
    objects = tuple(
        Obj(spec.want.shape, colour, "medium", (x - half, y - half, x + half, y + half)) for x, y in centres.tolist()
    )
    return Video(Scene(objects, spec.background or str(rng.choice(list(BACKGROUNDS)))), path)


def draw(video: Video, size: int = SIZE) -> np.ndarray:
    """Draws `video` as uint8 [FRAMES, size, size, 3]."""
    return np.stack([render(scene, size) for scene in video.frames()])


def dataset(split: str, n: int, seed: int, wrong: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """`n` videos, uint8 [n, FRAMES, 32, 32, 3], with their captions.

    Args:
        wrong: probability, applied twice to every caption, of one wrong detail.
    """
    rng = np.random.default_rng([seed, 1])
    specs = sample_specs(split, n, seed)
    videos = np.stack([draw(sample_video(s, rng)) for s in specs])
    return videos, [caption(misnamed(s, wrong, rng, corrupt, is_held_out)) for s in specs]
