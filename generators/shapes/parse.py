"""Reads a picture back into a `Scene`: the verifier's eyes, about 0.5 ms a picture, no model."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from .world import BACKGROUNDS, CANVAS, COLOURS, SHAPES, Obj, Scene, shape_mask, size_name

MIN_SIDE = 5.0  # canvas units; a smaller speck is not an object
MIN_FIT = 0.72  # overlap with the best shape below which an object is of no known shape
UNKNOWN = "blob"  # the shape of such an object
GRID = 16
_COLOURS = np.array(list(COLOURS.values()), np.float32)
_GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)


@cache
def _templates() -> np.ndarray:
    """Coverage of each of SHAPES on a GRID x GRID box, [shapes, GRID * GRID] in [0, 1]."""
    u = (np.arange(GRID * 4) + 0.5) / (GRID * 4)
    masks = [shape_mask(s, u[None, :], u[:, None]).reshape(GRID, 4, GRID, 4).mean((1, 3)) for s in SHAPES]
    return np.stack(masks).reshape(len(SHAPES), -1).astype(np.float32)


def unmix(image: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Background index, cover [h, w] in [0, 1] and colour index [h, w] of float32 pixels [h, w, 3] in 0..255.

    The background is the nearest to the median of the border. A pixel is a blend of it with one colour: the
    colour whose line from the background passes nearest, `cover` being how far along the pixel lies.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = int(((np.median(border, 0) - _GROUNDS) ** 2).sum(1).argmin())
    offset = image.reshape(-1, 3) - _GROUNDS[ground]
    lines = _COLOURS - _GROUNDS[ground]
    square = (lines**2).sum(1)
    cover = np.zeros(len(offset), np.float32)
    colour = np.zeros(len(offset), np.int64)
    active = np.flatnonzero((offset**2).sum(1) > 900.0)
    dots = offset[active] @ lines.T
    along = np.clip(dots / square, 0, 1)
    colour[active] = (along * (along * square - 2 * dots)).argmin(1)
    cover[active] = along[np.arange(len(active)), colour[active]]
    return ground, cover.reshape(image.shape[:2]), colour.reshape(image.shape[:2])


def parse_image(image: np.ndarray) -> Scene:
    """The scene in a square picture [h, w, 3], uint8 or float in [0, 1]; boxes in canvas units.

    An object whose outline is none of SHAPES has the shape 'blob'. Neighbouring objects of different colours
    are told apart; touching ones of one colour are one object.
    """
    pixels = image.astype(np.float32) if image.dtype == np.uint8 else np.asarray(image, np.float32) * 255
    scale = CANVAS / pixels.shape[0]
    ground, cover, colour = unmix(pixels)
    labels, _ = ndimage.label(cover > 0.5)
    objects: list[Obj] = []
    for k, where in enumerate(ndimage.find_objects(labels), 1):
        if min(s.stop - s.start for s in where) * scale < MIN_SIDE:
            continue
        inside = labels[where] == k
        votes = np.bincount(colour[where][inside], minlength=len(_COLOURS))
        parts = np.flatnonzero(votes > 0.25 * votes.sum())
        if len(parts) <= 1:
            objects.append(_object(where, inside, cover, int(votes.argmax()), scale))
            continue
        for c in parts:
            sub, _ = ndimage.label(inside & (colour[where] == c))
            for j, inner in enumerate(ndimage.find_objects(sub), 1):
                if min(s.stop - s.start for s in inner) * scale >= MIN_SIDE:
                    outer = tuple(slice(w.start + s.start, w.start + s.stop) for w, s in zip(where, inner, strict=True))
                    objects.append(_object(outer, sub[inner] == j, cover, int(c), scale))
    return Scene(tuple(objects), list(BACKGROUNDS)[ground])


def _object(where: tuple, inside: np.ndarray, cover: np.ndarray, colour: int, scale: float) -> Obj:
    """One object from its box of whole pixels: half covered outer pixels give the box to a fraction of a pixel."""
    rows, cols = where
    grown = np.zeros((inside.shape[0] + 2, inside.shape[1] + 2), np.float32)
    top, left = max(rows.start - 1, 0), max(cols.start - 1, 0)
    patch = cover[top : rows.stop + 1, left : cols.stop + 1]
    y, x = top - rows.start + 1, left - cols.start + 1
    grown[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
    near = ndimage.binary_dilation(np.pad(inside, 1), np.ones((3, 3), bool))
    grown *= near
    tall, wide = grown.max(1), grown.max(0)
    y0, y1 = rows.start + 1 - tall[:2].sum(), rows.stop - 1 + tall[-2:].sum()
    x0, x1 = cols.start + 1 - wide[:2].sum(), cols.stop - 1 + wide[-2:].sum()
    shape = _shape(grown, y0 - rows.start + 1, y1 - rows.start + 1, x0 - cols.start + 1, x1 - cols.start + 1)
    box = tuple(round(float(c) * scale, 2) for c in (x0, y0, x1, y1))
    width = ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5
    return Obj(shape, list(COLOURS)[colour], size_name(width), box)


def _shape(cover: np.ndarray, y0: float, y1: float, x0: float, x1: float) -> str:
    """The shape whose template overlaps best with `cover` inside the box, or UNKNOWN."""
    if not 0.6 < (x1 - x0) / (y1 - y0) < 1.67:
        return UNKNOWN
    grid = (np.arange(GRID) + 0.5) / GRID
    rows = y0 + grid * (y1 - y0) - 0.5
    cols = x0 + grid * (x1 - x0) - 0.5
    soft = _bilinear(cover, rows, cols).ravel()
    both = np.minimum(soft, _templates()).sum(1)
    either = np.maximum(soft, _templates()).sum(1)
    best = int((both / either).argmax())
    return list(SHAPES)[best] if both[best] / either[best] >= MIN_FIT else UNKNOWN


def _bilinear(values: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """`values` [h, w] read at fractional rows and columns, [rows, cols]."""

    def weights(at: np.ndarray, n: int) -> np.ndarray:
        return np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0).astype(np.float32)

    return weights(rows, values.shape[0]) @ values @ weights(cols, values.shape[1]).T
