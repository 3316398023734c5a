"""Scenes of one to three coloured shapes: their vocabulary, their layout and how they are drawn.

Everything here is a pure function of a `numpy.random.Generator`, so a seed fixes every pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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

# Never drawn and never named in training, nor in what the encoders in the box were fitted on. Every colour but two and
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

GRID = 16  # centres lie on sixteenths of the width, so that a small model learns what things look like in minutes
GAP = 0.05  # at least this much background between two bounding boxes
MARGIN = 0.03  # and between a bounding box and the image's border
STEP_ASIDE = 0.2  # a stated relation means at least this distance along its axis, and no more across it
SHADING = 0.07  # brightness runs from +7 % at the top to -7 % at the bottom, of the background and of each shape
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `size` is "small", "large" or None where a caption leaves it open."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Description:
    """What a caption says: the things in the order it names them, relations between them, perhaps the background.

    `relations` holds `(i, relation, j)`: thing `i` is left of, right of, above or below thing `j`.
    """

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture's content, every detail decided. Positions are centres, as fractions of the width, y downwards."""

    things: tuple[Thing, ...]
    positions: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]
    background: str


def sample_description(rng: np.random.Generator, pairs=SEEN_PAIRS, must_have=()) -> Description:
    """Draw a description of one to three different things.

    Args:
        rng: source of chance.
        pairs: (colour, shape) pairs to choose from.
        must_have: pairs of which exactly one is among the things; empty for no such wish.
    """
    count = int(rng.choice([1, 2, 3], p=[0.30, 0.45, 0.25]))
    candidates = [pair for pair in pairs if pair not in must_have]
    chosen = [candidates[k] for k in rng.choice(len(candidates), size=count, replace=False)]
    if must_have:
        chosen[int(rng.integers(count))] = must_have[int(rng.integers(len(must_have)))]
    sizes = _sample_sizes(rng, count)
    things = tuple(
        Thing(colour, shape, size if rng.random() < 0.5 else None) for (colour, shape), size in zip(chosen, sizes, strict=True)
    )
    relations: tuple[tuple[int, str, int], ...] = ()
    if count > 1 and rng.random() < 0.6:
        relation = str(rng.choice(list(RELATIONS)))
        relations = ((0, relation, 1),)
        if count == 3 and rng.random() < 0.6:
            across = ("above", "below") if relation in ("left", "right") else ("left", "right")
            both = str(rng.choice(across))
            relations += ((0, both, 2), (1, both, 2))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None
    return Description(things, relations, background)


def _sample_sizes(rng: np.random.Generator, count: int) -> list[str]:
    sizes = [str(rng.choice(["small", "large"])) for _ in range(count)]
    if sizes.count("large") == 3:  # three large things hardly fit
        sizes[int(rng.integers(3))] = "small"
    return sizes


def sample_scene(description: Description, rng: np.random.Generator) -> Scene:
    """Decide what `description` leaves open (sizes, background, positions) by chance."""
    large = sum(thing.size == "large" for thing in description.things)
    things = []
    for thing in description.things:
        size = thing.size or str(rng.choice(["small", "large"] if large < 2 else ["small"]))
        large += thing.size is None and size == "large"
        things.append(Thing(thing.colour, thing.shape, size))
    background = description.background or str(rng.choice(list(BACKGROUNDS)))
    radii = np.array([RADII[thing.size] for thing in things])
    positions = _place(radii, description.relations, rng)
    return Scene(tuple(things), tuple(map(tuple, positions.tolist())), tuple(radii.tolist()), background)


def _place(radii: np.ndarray, relations, rng: np.random.Generator, tries: int = 64) -> np.ndarray:
    """Centres (N, 2) such that nothing touches and every relation holds; rejection sampling, `tries` at a time."""
    low = np.ceil((radii + MARGIN) * GRID)[:, None]
    while True:
        centres = rng.integers(low, GRID - low, size=(tries, len(radii), 2), endpoint=True) / GRID  # (T, N, 2)
        fits = np.ones(tries, dtype=bool)
        for i in range(len(radii)):
            for j in range(i):
                apart = np.abs(centres[:, i] - centres[:, j]).max(axis=1)
                fits &= apart >= radii[i] + radii[j] + GAP
        for i, relation, j in relations:
            direction = np.array(RELATIONS[relation])
            offset = centres[:, i] - centres[:, j]
            along = offset @ direction
            across = np.abs(offset @ direction[::-1])
            fits &= (along >= STEP_ASIDE) & (along >= across)
        if fits.any():
            return centres[int(fits.argmax())]


def outline(shape: str) -> list[tuple[float, float]]:
    """The polygon of `shape` in the box from -1 to 1, y downwards."""
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


def draw_mask(shape: str, centre: tuple[float, float], radius: float, image_size: int) -> np.ndarray:
    """How much of each pixel `shape` covers: (image_size, image_size) float32 in [0, 1], antialiased."""
    big = image_size * SUPERSAMPLING
    canvas = Image.new("L", (big, big))
    points = [((centre[0] + x * radius) * big, (centre[1] + y * radius) * big) for x, y in outline(shape)]
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def draw(scene: Scene, image_size: int = 64) -> Image.Image:
    """Draw `scene` as an RGB image of `image_size` pixels square."""
    slope = np.linspace(1 + SHADING, 1 - SHADING, image_size, dtype=np.float32)[:, None, None]  # (H, 1, 1)
    picture = np.broadcast_to(slope * np.float32(BACKGROUNDS[scene.background]), (image_size, image_size, 3)).copy()
    rows = (np.arange(image_size, dtype=np.float32) + 0.5)[:, None, None] / image_size
    for thing, centre, radius in zip(scene.things, scene.positions, scene.radii, strict=True):
        cover = draw_mask(thing.shape, centre, radius, image_size)[:, :, None]
        shade = 1 - SHADING * np.clip((rows - centre[1]) / radius, -1, 1)
        picture += cover * (shade * np.float32(COLOURS[thing.colour]) - picture)
    return Image.fromarray(np.clip(np.rint(picture), 0, 255).astype(np.uint8))
