"""The embedded world's gold reward for videos: objects tracked from frame to frame, paths compared with physics.

Every frame is read back into a scene, objects of neighbouring frames are joined to tracks, and a track is compared with
the nearest path that the caption's motion allows. No model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from alignflow.worlds.shapes.motion import Motion, VideoSpec, parse_caption, paths, times
from alignflow.worlds.shapes.parse import parse_image
from alignflow.worlds.shapes.world import Obj, Scene
from rewards.worlds.shapes import score_each

REACH = 14.0  # canvas units that an object may go from one frame to the next; a free fall ends with 10
TOLERANCE = 1.5  # canvas units (3/4 pixel): root mean square distance to a path, below which it is that path
STEADY = 0.9  # identity of a track that passes as right: one frame in nine may be misread
PARTS = ("strict", "dense", "identity", "motion", "persistence")
_spec = lru_cache(4096)(parse_caption)  # a group of samples shares its prompt


@dataclass
class Track:
    """One object over the F frames of a video; None if it was not seen."""

    objects: list[Obj | None]

    def centres(self) -> np.ndarray:
        """Its centres, [F, 2] in canvas units, NaN if it was not seen."""
        return np.array([(np.nan, np.nan) if o is None else centre(o) for o in self.objects])

    def seen(self) -> list[Obj]:
        """The object in the frames it was seen in."""
        return [o for o in self.objects if o is not None]


def centre(obj: Obj) -> tuple[float, float]:
    """The middle of its box."""
    x0, y0, x1, y1 = obj.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def follow(scenes: list[Scene]) -> list[Track]:
    """Joins the objects of F frames to tracks, frame by frame, so that the summed distances are least.

    An object further than REACH from where every track was last seen begins its own track.
    """
    tracks: list[Track] = []
    for f, scene in enumerate(scenes):
        here = np.array([centre(o) for o in scene.objects]).reshape(-1, 2)
        last = np.array([centre(t.seen()[-1]) for t in tracks]).reshape(-1, 2)
        distance = np.linalg.norm(last[:, None] - here[None], axis=-1)
        joined = {j: i for i, j in zip(*linear_sum_assignment(distance), strict=True) if distance[i, j] <= REACH}
        for track in tracks:
            track.objects.append(None)
        for j, obj in enumerate(scene.objects):
            if j not in joined:
                tracks.append(Track([None] * (f + 1)))
            tracks[joined.get(j, -1)].objects[f] = obj
    return tracks


@cache
def _allowed(motion: Motion, frames: int) -> np.ndarray:
    """Paths that count as `motion`, [K, F, 2]."""
    return paths(motion, 9, times(frames))


def motion_of(centres: np.ndarray, motion: Motion) -> float:
    """How near a track's `centres` [F, 2], NaN if not seen, come to `motion`, in [0, 1].

    1 if the nearest path is within TOLERANCE, 0 if it is as far as from an object that stays where it is, or
    where fewer than half of the frames were seen; where the path begins does not matter.
    """
    seen = ~np.isnan(centres[:, 0])
    if seen.sum() <= len(centres) / 2:
        return 0.0
    wanted = _allowed(motion, len(centres))[:, seen]
    wanted = wanted - wanted.mean(1, keepdims=True)
    found = centres[seen] - centres[seen].mean(0)
    still = np.sqrt((wanted**2).sum(-1).mean(-1)).min()
    distance = np.sqrt(((wanted - found) ** 2).sum(-1).mean(-1)).min()
    return float(np.clip((still - distance) / max(still - TOLERANCE, 1e-6), 0, 1))


def identity_of(track: Track, spec: VideoSpec) -> float:
    """The mean over the frames it was seen in of the share of wanted attributes it has; an open colour must stay."""
    seen = track.seen()
    colours = [o.colour for o in seen]
    want = Obj(spec.want.shape, spec.want.colour or max(colours, key=colours.count), "medium", seen[0].box)
    return float(np.mean([(2 * (o.shape == want.shape) + (o.colour == want.colour)) / 3 for o in seen]))


def judge(scenes: list[Scene], spec: VideoSpec) -> dict[str, float]:
    """The PARTS of a video, from the scenes of its F frames.

    identity: mean over the wanted objects of how like one a track stays, less 3/10 of the frames of another background.
    motion: mean over the wanted objects of `motion_of`.
    persistence: mean over frames of the share of objects that are wanted ones, of those wanted or there.
    dense: persistence * (identity + motion) / 2. strict: 1 where every object is right in all three, or 0.
    """
    tracks = follow(scenes)
    like = [identity_of(t, spec) for t in tracks]
    moved = [motion_of(t.centres(), spec.motion) for t in tracks]
    worth = [len(t.seen()) * (1 + i + m) for t, i, m in zip(tracks, like, moved, strict=True)]
    best = sorted(range(len(tracks)), key=lambda k: -worth[k])[: spec.want.count]
    missing = [0.0] * (spec.want.count - len(best))
    likes, moves = [like[k] for k in best] + missing, [moved[k] for k in best] + missing
    ground = float(np.mean([spec.background in (None, s.background) for s in scenes]))
    shares = [
        sum(tracks[k].objects[f] is not None for k in best) / max(spec.want.count, len(scene.objects))
        for f, scene in enumerate(scenes)
    ]
    identity, motion, persistence = np.mean(likes) * (0.7 + 0.3 * ground), np.mean(moves), np.mean(shares)
    strict = min(*likes, ground) >= STEADY and min(moves) == 1 and persistence == 1
    dense = 1.0 if strict else persistence * (identity + motion) / 2
    values = (strict, dense, identity, motion, persistence)
    return {name: float(value) for name, value in zip(PARTS, values, strict=True)}


def score(video: np.ndarray, prompt: str) -> tuple[float, ...]:
    """The PARTS of a video [F, h, w, 3], uint8 or float in [0, 1]; see `judge`.

    Raises ValueError where `prompt` is outside the world's grammar.
    """
    return tuple(judge([parse_image(frame) for frame in video], _spec(prompt)).values())


def score_batch(videos: Any, prompts: list[str]) -> dict[str, Any]:
    """The PARTS of videos [N, F, 3, H, W] in [0, 1], one prompt each; see `rewards.worlds.shapes.score_each`."""
    return score_each(videos, prompts, score, PARTS)
