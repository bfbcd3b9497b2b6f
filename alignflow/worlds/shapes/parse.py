"""Parses an image into a `Scene`, for the verifier: about 0.5 ms per image, no model."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from alignflow.worlds.shapes.world import BACKGROUNDS, CANVAS, COLOURS, SHAPES, Obj, Scene, shape_mask, size_name

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
    """Background index, cover in [0, 1] and colour index of float32 pixels [h, w, 3] in 0..255.

    Both are [h + 2, w + 2], with an empty margin of one pixel.

    The background is the nearest to the median of the border. A pixel is a blend of it with one colour: the
    colour whose line from the background passes nearest, `cover` being how far along the pixel lies.
    """
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = int(((np.median(border, 0) - _GROUNDS) ** 2).sum(1).argmin())
    offset = image.reshape(-1, 3) - _GROUNDS[ground]
    lines = _COLOURS - _GROUNDS[ground]
    square = (lines**2).sum(1)
    active = np.flatnonzero((offset * offset).sum(1) > 900.0)
    dots = offset[active] @ lines.T
    along = np.clip(dots / square, 0, 1)
    best = (along * (along * square - 2 * dots)).argmin(1)
    cover = np.zeros((image.shape[0] + 2, image.shape[1] + 2), np.float32)
    colour = np.zeros(cover.shape, np.int64)
    at = active // image.shape[1] + 1, active % image.shape[1] + 1
    cover[at], colour[at] = along[np.arange(len(active)), best], best
    return ground, cover, colour


def parse_image(image: np.ndarray) -> Scene:
    """The scene in a square image [h, w, 3], uint8 or float in [0, 1]; boxes in canvas units.

    An object whose outline is none of SHAPES has the shape 'blob'. Neighbouring objects of different colours
    are told apart; touching ones of one colour are one object.
    """
    pixels = image.astype(np.float32) if image.dtype == np.uint8 else np.asarray(image, np.float32) * 255
    scale = CANVAS / pixels.shape[0]
    ground, cover, colour = unmix(pixels)
    labels, _ = ndimage.label(cover > 0.5)
    _split_by_colour(labels, colour)
    objects = []
    for k, where in enumerate(ndimage.find_objects(labels), 1):
        if where and min(s.stop - s.start for s in where) * scale >= MIN_SIDE:
            votes = np.bincount(colour[where][labels[where] == k])
            objects.append(_object(where, labels, k, cover, list(COLOURS)[int(votes.argmax())], scale))
    return Scene(tuple(objects), list(BACKGROUNDS)[ground])


def _split_by_colour(labels: np.ndarray, colour: np.ndarray) -> None:
    """Gives each part of its own colour in a component its own label, in place, if it is a quarter or more."""
    top = int(labels.max())
    for k, where in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[where] == k
        votes = np.bincount(colour[where][inside])
        for c in np.flatnonzero(votes > 0.25 * votes.sum())[1:]:
            parts, n = ndimage.label(inside & (colour[where] == c))
            labels[where][parts > 0] = parts[parts > 0] + top
            top += n


def _object(where: tuple, labels: np.ndarray, k: int, cover: np.ndarray, colour: str, scale: float) -> Obj:
    """The object of label `k` in the box of whole pixels `where`; outer pixels give the box to a fraction of one."""
    rows, cols = where
    rows, cols = slice(rows.start - 1, rows.stop + 1), slice(cols.start - 1, cols.stop + 1)
    label = labels[rows, cols]
    own = np.where((label == k) | (label == 0), cover[rows, cols], 0)
    tall, wide = own.max(1), own.max(0)
    y0, y1 = 2 - tall[:2].sum(), len(tall) - 2 + tall[-2:].sum()
    x0, x1 = 2 - wide[:2].sum(), len(wide) - 2 + wide[-2:].sum()
    left, top = cols.start - 1, rows.start - 1  # `cover` has a margin of one pixel
    west, north, east, south = (round(float(c) * scale, 2) for c in (left + x0, top + y0, left + x1, top + y1))
    width = ((east - west) * (south - north)) ** 0.5
    return Obj(_shape(own, y0, y1, x0, x1), colour, size_name(width), (west, north, east, south))


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
