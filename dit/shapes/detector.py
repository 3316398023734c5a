"""What is in a picture of coloured shapes: classical detection by colour and contour, with nothing learned.

1. The background's colour is the median of the border, where nothing is ever drawn, with the vertical shading taken out.
2. What differs from it is foreground; its connected components are the things.
3. A thing's colour is the palette's nearest to the median of its inside.
4. Its shape is the template of highest overlap (intersection over union of coverage) after both are stretched to the
   same box; the templates come from the code that draws the training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from dit.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHADING, SHAPES, render_mask

BORDER = 0.03  # of the width; scene.MARGIN keeps it free
CONTRAST = 45.0  # RGB distance that makes foreground; the least between a colour and a background is 106 (pink on cream)
SPECK = 0.004  # of the area: less is noise; the smallest star covers 2.4 %
COLOUR_REACH = 70.0  # RGB distance beyond which a thing has none of our colours; the nearest two of them are 83 apart
FOREIGN = 0.12  # share of a thing's inside that may be clearly of another colour: half of the least palette distance from it
# Overlap on 1,000 drawings and on as many blurred and noisy ones: 0.86 or more with the right template, 0.83 at most
# with the best wrong one, and always 0.12 more with the right one than with any other.
OVERLAP = 0.80
STRETCH = 0.08  # log of how far from its template's width : height a thing may be, for free; small drawings reach 0.05
BOX = 24  # side of the box in which shapes are compared
BETWEEN_SIZES = (RADII["small"] + RADII["large"]) / 2


@dataclass(frozen=True)
class Found:
    """One thing in a picture. Position and radius (half of the larger side) are fractions of the width.

    `colour` and `shape` are "unclear" where nothing fits well; `overlap` is the best template's.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Detection:
    background: str
    things: tuple[Found, ...]


def detect(picture: Image.Image | np.ndarray) -> Detection:
    """Find all things in an RGB `picture`, square, at least 32 pixels a side; sorted by position from left to right."""
    pixels = np.asarray(picture, dtype=np.float32)  # (H, W, 3)
    size = pixels.shape[0]
    slope = np.linspace(1 + SHADING, 1 - SHADING, size, dtype=np.float32)[:, None, None]
    flat = pixels / slope
    edge = max(1, round(BORDER * size))
    border = np.concatenate([part.reshape(-1, 3) for part in (flat[:edge], flat[-edge:], flat[:, :edge], flat[:, -edge:])])
    background = np.median(border, axis=0)
    foreground = np.linalg.norm(flat - background, axis=2) > CONTRAST
    labels, count = ndimage.label(foreground, structure=np.ones((3, 3)))
    things = []
    for number, window in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == number
        if inside.sum() >= SPECK * size * size:
            things.append(_describe(pixels, background * slope, inside, window))
    return Detection(_nearest(background, BACKGROUNDS)[0], tuple(sorted(things, key=lambda thing: thing.x)))


def _describe(pixels: np.ndarray, background: np.ndarray, inside: np.ndarray, window) -> Found:
    """Colour, shape and place of the component `inside` (H, W) bool; `background` (H, 1, 3) is what lies behind it."""
    size = len(pixels)
    core = ndimage.binary_erosion(inside)
    core = core if core.sum() >= 6 else inside
    paint = np.median(pixels[core], axis=0)
    colour, distance = _nearest(paint, COLOURS)
    if distance > COLOUR_REACH or _foreign(pixels[core], colour) > FOREIGN:
        colour = "unclear"
    # How far each pixel is on the way from the background to the paint: coverage, with soft edges.
    way = paint - background
    cover = ((pixels - background) * way).sum(2) / np.maximum((way * way).sum(2), 1)
    near = ndimage.binary_dilation(inside, iterations=1)
    cover = np.clip(np.where(near, cover, 0), 0, 1)
    top, bottom = _extent(cover.max(axis=1))
    left, right = _extent(cover.max(axis=0))
    radius = max(bottom - top, right - left) / 2 / size
    stretched = _stretch(cover, top, bottom, left, right)
    overlaps = {}
    for shape in SHAPES:
        template, aspect = _template(shape, round(radius * 64))
        overlap = np.minimum(stretched, template).sum() / np.maximum(stretched, template).sum()
        stretch = abs(np.log((right - left) / (bottom - top) / aspect))  # a squashed circle is no circle
        overlaps[shape] = float(overlap) - 2 * max(0.0, stretch - STRETCH)
    shape = max(overlaps, key=overlaps.get)
    best = overlaps[shape]
    return Found(
        colour=colour,
        shape=shape if best >= OVERLAP else "unclear",
        size="small" if radius < BETWEEN_SIZES else "large",
        x=(left + right) / 2 / size,
        y=(top + bottom) / 2 / size,
        radius=radius,
        overlap=best,
    )


def _nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = {name: float(np.linalg.norm(value - np.float32(colour))) for name, colour in palette.items()}
    name = min(distances, key=distances.get)
    return name, distances[name]


def _foreign(values: np.ndarray, colour: str) -> float:
    """Share of `values` (K, 3) that are near to another palette colour than `colour`; blends at an edge are near to none."""
    palette = np.float32(list(COLOURS.values()))
    distances = np.linalg.norm(values[:, None] - palette, axis=2)
    return float(((distances.argmin(axis=1) != list(COLOURS).index(colour)) & (distances.min(axis=1) < 42)).mean())


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Where a coverage profile first rises above and last falls below one half, between pixels: edges in pixels."""
    above = np.flatnonzero(profile >= 0.5)
    first, last = int(above[0]), int(above[-1])

    def beyond(here: float, there: float) -> float:
        return float(np.clip((here - 0.5) / max(here - there, 1e-3), 0, 1)) - 0.5

    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first + 0.5 - 0.5 - beyond(profile[first], before), last + 0.5 + 0.5 + beyond(profile[last], after)


def _stretch(cover: np.ndarray, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    """The box of `cover` as (BOX, BOX), by linear interpolation."""
    steps = (np.arange(BOX) + 0.5) / BOX
    rows, columns = top + steps * (bottom - top) - 0.5, left + steps * (right - left) - 0.5
    return ndimage.map_coordinates(cover, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")


@lru_cache(maxsize=256)
def _template(shape: str, radius: int) -> tuple[np.ndarray, float]:
    """`shape` drawn with `radius` pixels of 64, stretched to the box, and its width : height."""
    cover = render_mask(shape, (0.5, 0.5), min(max(radius, 4), 31) / 64, 64)
    top, bottom = _extent(cover.max(axis=1))
    left, right = _extent(cover.max(axis=0))
    return _stretch(cover, top, bottom, left, right), (right - left) / (bottom - top)
