"""Scenes of one to three coloured shapes: their vocabulary, their random layout, and how they are rendered.

Everything here is a pure function of a `numpy.random.Generator`, so a seed fixes every pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

Pair = tuple[str, str]  # a colour and a shape
Point = tuple[float, float]  # x, y
Relations = tuple[tuple[int, str, int], ...]

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 132, 28),
    "yellow": (248, 208, 60),
    "green": (60, 160, 70),
    "teal": (40, 185, 180),
    "blue": (48, 100, 220),
    "purple": (125, 65, 175),
    "pink": (240, 135, 185),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "cream": (250, 238, 210),
    "light blue": (204, 228, 246),
    "dark blue": (24, 34, 80),
    "dark green": (20, 62, 48),
    "black": (18, 18, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
RADII = {"small": 0.1425, "large": 0.2025}  # half the bounding box, as a fraction of the image's width
RELATIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first is, seen from the second
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Never rendered and never named in training, nor in what the bundled encoders were fitted on. Every colour but two and
# every shape is in exactly one pair, so each is well known by itself and only the combination is new.
UNSEEN_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "circle"),
        ("green", "heart"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("orange", "cross"),
    }
)
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)
# Objects stand in the middle of the cells of a 2 x 2 grid, so that a small model learns in minutes where objects may be. With
# centres on sixteenths of the width, prompt accuracy was 0.10 after ten minutes; on quarters (3 x 3 places, which overlap), 0.35.
CELLS = 2
MARGIN = 0.03  # at least this much background between a bounding box and its cell's border
SHADING = 0.07  # brightness runs from +7 % at the top to -7 % at the bottom, of the background and of each shape
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Object:
    """One coloured shape. `size` is "small", "large" or None where a caption leaves it open."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def pair(self) -> Pair:
        """Return colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Description:
    """What a caption states: the objects in the order it names them, relations between them, perhaps the background.

    `relations` holds `(i, relation, j)`: object `i` is left of, right of, above or below object `j`.
    """

    objects: tuple[Object, ...]
    relations: Relations = ()
    background: str | None = None


@dataclass(frozen=True)
class Scene:
    """An image's content, every detail decided. Positions are centres, as fractions of the width, y downwards."""

    objects: tuple[Object, ...]
    positions: tuple[Point, ...]
    radii: tuple[float, ...]
    background: str


def sample_description(
    rng: np.random.Generator, pairs: Sequence[Pair] = SEEN_PAIRS, must_have: Sequence[Pair] = ()
) -> Description:
    """Sample a description of one to three different objects; three of them differ in shape.

    Args:
        rng: source of random numbers.
        pairs: (colour, shape) pairs to choose from.
        must_have: pairs of which exactly one is among the objects; empty for no such wish.
    """
    count = int(rng.choice([1, 2, 3], p=[0.42, 0.50, 0.08]))
    chosen = _choose_pairs(count, rng, pairs, must_have)
    while count == 3 and len({shape for _, shape in chosen}) < 3:
        chosen = _choose_pairs(count, rng, pairs, must_have)
    objects = tuple(Object(*pair, str(rng.choice(list(RADII))) if rng.random() < 0.5 else None) for pair in chosen)
    relations: Relations = ()
    if count > 1 and rng.random() < 0.6:
        relation = str(rng.choice(list(RELATIONS)))
        relations = ((0, relation, 1),)
        if count == 3 and rng.random() < 0.6:
            across = ("above", "below") if relation in ("left", "right") else ("left", "right")
            both = str(rng.choice(across))
            relations += ((0, both, 2), (1, both, 2))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    return Description(objects, relations, background)


def _choose_pairs(count: int, rng: np.random.Generator, pairs: Sequence[Pair], must_have: Sequence[Pair]) -> list[Pair]:
    candidates = [pair for pair in pairs if pair not in must_have]
    chosen = [candidates[k] for k in rng.choice(len(candidates), size=count, replace=False)]
    if must_have:
        chosen[int(rng.integers(count))] = must_have[int(rng.integers(len(must_have)))]
    return chosen


def sample_scene(description: Description, rng: np.random.Generator) -> Scene:
    """Sample a scene that `description` fits: what it leaves open (sizes, background, positions) is random."""
    sizes = [wanted.size or str(rng.choice(list(RADII))) for wanted in description.objects]
    background = description.background or str(rng.choice(list(BACKGROUNDS)))
    positions = _sample_positions(len(sizes), description.relations, rng)
    objects = tuple(replace(wanted, size=size) for wanted, size in zip(description.objects, sizes, strict=True))
    return Scene(objects, positions, tuple(RADII[size] for size in sizes), background)


def _sample_positions(count: int, relations: Relations, rng: np.random.Generator) -> tuple[Point, ...]:
    """Sample the centres of `count` cells of the grid for which every relation holds, uniformly.

    Where no relation is stated, objects are named from top to bottom; if none at all is, the first is higher than the others.
    A mirror image keeps that.
    """
    stated = {(i, j) for i, _, j in relations}
    unstated = [(i, j) for j in range(count) for i in range(j) if (i, j) not in stated]
    cells = [((column + 0.5) / CELLS, (row + 0.5) / CELLS) for row in range(CELLS) for column in range(CELLS)]
    fitting = [
        chosen
        for chosen in permutations(cells, count)
        if all(_holds(chosen[i], relation, chosen[j], diagonally=j == 2) for i, relation, j in relations)
        and all(chosen[i][1] <= chosen[j][1] for i, j in unstated)
        and (relations or all(chosen[0][1] < y for _, y in chosen[1:]))
    ]
    return fitting[int(rng.integers(len(fitting)))]


def _holds(first: Point, relation: str, second: Point, diagonally: bool) -> bool:
    """Return whether an object at `first` is `relation` ("left" …) of one at `second`.

    Two objects are straight beside or above each other, so that only one relation is true of them; where both are left of
    a third, one of them may be so diagonally.
    """
    dx, dy = RELATIONS[relation]
    x, y = first[0] - second[0], first[1] - second[1]
    along, across = x * dx + y * dy, abs(x * dy) + abs(y * dx)
    return along > 0 and (diagonally or across == 0)


def outline(shape: str) -> list[Point]:
    """Return the polygon of `shape` in the box from -1 to 1, y downwards."""
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64, endpoint=False)]
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.85), (-1, 0.85)]
    if shape == "star":
        points = []
        for k in range(10):
            radius, angle = (1.0, 0.45)[k % 2], math.pi * (k / 5 - 0.5)
            points.append((radius * math.cos(angle), radius * math.sin(angle)))
        return points
    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        x = 16 * np.sin(turns) ** 3
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        return [(float(a) / 16, float(-b - 2.5) / 15) for a, b in zip(x, y, strict=True)]
    if shape == "cross":
        w = 0.34
        return [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render_mask(shape: str, centre: Point, radius: float, image_size: int) -> np.ndarray:
    """Render how much of each pixel `shape` covers: (image_size, image_size) float32 in [0, 1], antialiased."""
    big = image_size * SUPERSAMPLING
    canvas = Image.new("L", (big, big))
    points = [((centre[0] + x * radius) * big, (centre[1] + y * radius) * big) for x, y in outline(shape)]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Render `scene` as an RGB image of `image_size` pixels square."""
    slope = np.linspace(1 + SHADING, 1 - SHADING, image_size, dtype=np.float32)[:, None, None]  # (H, 1, 1)
    background = slope * np.array(BACKGROUNDS[scene.background], np.float32)
    pixels = np.broadcast_to(background, (image_size, image_size, 3)).copy()
    rows = (np.arange(image_size, dtype=np.float32) + 0.5)[:, None, None] / image_size
    for shown, centre, radius in zip(scene.objects, scene.positions, scene.radii, strict=True):
        cover = render_mask(shown.shape, centre, radius, image_size)[:, :, None]
        shade = 1 - SHADING * np.clip((rows - centre[1]) / radius, -1, 1)
        pixels += cover * (shade * np.array(COLOURS[shown.colour], np.float32) - pixels)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
