"""Detect the objects in an image of coloured shapes: classical detection by colour and contour, with nothing learned.

1. The background is fitted to the border, where no object ever is: one colour, or a vertical gradient between two, with the
   vertical shading taken out.
2. What differs from it is foreground; its connected components are the objects.
3. An object's colour is the palette's nearest to the median of its inside.
4. Its shape is the template of highest overlap (intersection over union of coverage) after both are stretched to the
   same box; the templates, upright and turned, come from the code that renders the training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from dit.shapes.placement import MARGIN
from dit.shapes.render import SHADING, render_mask
from dit.shapes.scene import BACKGROUNDS, COLOURS, MAX_TURN, RADII, RGB, SHAPES, TURNED

MIN_CONTRAST = 45.0  # RGB distance that makes foreground; the least between a colour and a background is 106 (pink on cream)
MIN_AREA = 0.004  # of the image: less is noise; the smallest star covers 2.4 %
MAX_COLOUR_DISTANCE = 70.0  # RGB; further away an object has none of our colours; the nearest two of them are 83 apart
FOREIGN_DISTANCE = 42.0  # RGB; clearly of another colour: half of the least distance in the palette
MAX_FOREIGN = 0.12  # share of an object's inside that may be clearly of another colour
# Overlap on 1,000 rendered images and on as many blurred and noisy ones: 0.86 or more with the right template, 0.83 at most
# with the best wrong one, and always 0.12 more with the right one than with any other.
MIN_OVERLAP = 0.80
FREE_STRETCH = 0.08  # log of how far from its template's width : height an object may be at no cost; small ones reach 0.05
BOX = 24  # side of the box in which shapes are compared
BETWEEN_SIZES = (RADII["small"][1] + RADII["large"][0]) / 2
TURNS = tuple(np.linspace(-MAX_TURN, MAX_TURN, 7).tolist())  # degrees; of templates of the shapes that are turned
TEMPLATES = [(shape, turn) for shape in SHAPES for turn in (TURNS if shape in TURNED else (0.0,))]


@dataclass(frozen=True)
class DetectedObject:
    """One object in an image. Position and radius (half of the larger side) are fractions of the width.

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
    """The nearest background of the palette, and all objects, from left to right."""

    background: str
    objects: tuple[DetectedObject, ...]


def detect(image: Image.Image | np.ndarray) -> Detection:
    """Detect all objects in a square RGB `image` of at least 32 pixels a side, values 0 to 255."""
    pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3)
    size = len(pixels)
    slope = np.linspace(1 + SHADING, 1 - SHADING, size, dtype=np.float32)[:, None, None]
    top, bottom = _fit_background(pixels / slope)
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    background = (top + down * (bottom - top)) * slope  # (H, 1, 3)
    foreground = np.linalg.norm(pixels - background, axis=2) > MIN_CONTRAST
    labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    numbers = (k for k in range(1, len(areas)) if areas[k] >= MIN_AREA * size * size)  # 0 is the background
    objects = [_describe(pixels, background, labels == k) for k in numbers]
    return Detection(_nearest_background(top, bottom), tuple(sorted(objects, key=lambda found: found.x)))


def _describe(pixels: np.ndarray, background: np.ndarray, inside: np.ndarray) -> DetectedObject:
    """Measure the component `inside` (H, W) bool; `background` (H, 1, 3) is what lies behind it."""
    size = len(pixels)
    core = ndimage.binary_erosion(inside)
    core = core if core.sum() >= 6 else inside
    paint = np.median(pixels[core], axis=0)
    colour, distance = _nearest(paint, COLOURS)
    if distance > MAX_COLOUR_DISTANCE or _foreign_share(pixels[core], colour) > MAX_FOREIGN:
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
    overlaps: dict[str, float] = {}
    for shape, turn in TEMPLATES:
        template, aspect = _template(shape, turn, round(radius * 64))
        overlap = np.minimum(stretched, template).sum() / np.maximum(stretched, template).sum()
        stretch = abs(np.log((right - left) / (bottom - top) / aspect))  # a squashed circle is no circle
        overlaps[shape] = max(overlaps.get(shape, 0.0), float(overlap) - 2 * max(0.0, stretch - FREE_STRETCH))
    shape = max(overlaps, key=overlaps.__getitem__)
    best = overlaps[shape]
    return DetectedObject(
        colour=colour,
        shape=shape if best >= MIN_OVERLAP else "unclear",
        size="small" if radius < BETWEEN_SIZES else "large",
        x=(left + right) / 2 / size,
        y=(top + bottom) / 2 / size,
        radius=radius,
        overlap=best,
    )


def _fit_background(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the colours at top and bottom, (3,) each, to the border of `flat` (H, W, 3); a few odd pixels do not matter."""
    size = len(flat)
    edge = max(1, round(MARGIN * size))
    rows = np.median(np.concatenate([flat[:, :edge], flat[:, -edge:]], axis=1), axis=1)  # (H, 3)
    down = np.linspace(0, 1, size)
    upper, lower = np.median(rows[: size // 2], axis=0), np.median(rows[size // 2 :], axis=0)
    middles = np.median(down[: size // 2]), np.median(down[size // 2 :])
    slope = (lower - upper) / (middles[1] - middles[0])
    top = upper - slope * middles[0]
    return top.astype(np.float32), (top + slope).astype(np.float32)


def _nearest_background(top: np.ndarray, bottom: np.ndarray) -> str:
    """Return the name of the background that is nearest to these colours, (3,) each."""
    found = np.stack([top, bottom])
    return min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(found - np.array(BACKGROUNDS[name], np.float32))))


def _nearest(value: np.ndarray, palette: dict[str, RGB]) -> tuple[str, float]:
    """Return the name of the nearest colour of `palette`, and its RGB distance from `value` (3,)."""
    distances = {name: float(np.linalg.norm(value - np.array(colour, np.float32))) for name, colour in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def _foreign_share(values: np.ndarray, colour: str) -> float:
    """Return the share of `values` (K, 3) that are near to another palette colour; blends at an edge are near to none."""
    palette = np.array(list(COLOURS.values()), np.float32)
    distances = np.linalg.norm(values[:, None] - palette, axis=2)
    others = distances.argmin(axis=1) != list(COLOURS).index(colour)
    return float((others & (distances.min(axis=1) < FOREIGN_DISTANCE)).mean())


def _extent(profile: np.ndarray) -> tuple[float, float]:
    """Return where a coverage profile first rises above and last falls below one half, between pixels: edges in pixels."""
    above = np.flatnonzero(profile >= 0.5)
    first, last = int(above[0]), int(above[-1])

    def beyond(here: float, there: float) -> float:
        return float(np.clip((here - 0.5) / max(here - there, 1e-3), 0, 1)) - 0.5

    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    return first - beyond(profile[first], before), last + 1.0 + beyond(profile[last], after)


def _stretch(cover: np.ndarray, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    """Resample the box of `cover` to (BOX, BOX), by linear interpolation."""
    steps = (np.arange(BOX) + 0.5) / BOX
    rows, columns = top + steps * (bottom - top) - 0.5, left + steps * (right - left) - 0.5
    return ndimage.map_coordinates(cover, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")


@lru_cache(maxsize=1024)
def _template(shape: str, turn: float, radius: int) -> tuple[np.ndarray, float]:
    """Render `shape` with `radius` pixels of 64, turned by `turn` degrees; return it stretched, and its width : height."""
    cover = render_mask(shape, (0.5, 0.5), min(max(radius, 4), 31) / 64, 64, turn)
    top, bottom = _extent(cover.max(axis=1))
    left, right = _extent(cover.max(axis=0))
    return _stretch(cover, top, bottom, left, right), (right - left) / (bottom - top)
