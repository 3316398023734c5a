"""Scenes of one to four coloured shapes: their vocabulary, and what is random about their content.

Everything here is a pure function of a `numpy.random.Generator`, so a seed fixes every pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np

Pair = tuple[str, str]  # a colour and a shape
Point = tuple[float, float]  # x, y
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (214, 48, 49),
    "orange": (240, 132, 28),
    "yellow": (248, 208, 60),
    "green": (60, 160, 70),
    "teal": (40, 185, 180),
    "blue": (48, 100, 220),
    "purple": (125, 65, 175),
    "pink": (240, 135, 185),
}
LIGHT: dict[str, RGB] = {"white": (250, 250, 250), "cream": (250, 238, 210), "light blue": (204, 228, 246)}
DARK: dict[str, RGB] = {"dark blue": (24, 34, 80), "dark green": (20, 62, 48), "black": (18, 18, 22)}
PLAIN = (*LIGHT, *DARK)
# What a background is at the top and at the bottom: one colour, or a gradient between two that are both light or both dark, so
# that every object stands out everywhere.
BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {name: (colour, colour) for name, colour in (LIGHT | DARK).items()} | {
    f"{top} to {bottom}": (shades[top], shades[bottom]) for shades in (LIGHT, DARK) for top, bottom in permutations(shades, 2)
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# Half the larger side of the bounding box, as a fraction of the image's width: from, to.
RADII = {"small": (0.13, 0.16), "large": (0.2, 0.225)}
MAX_LARGE = (1, 2, 2, 1)  # of 1, 2 … objects
MAX_TURN = 20  # degrees to either side, of the shapes in TURNED
TURNED = ("triangle", "star", "heart")  # the others look the same after a quarter turn, or always
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # where the first is, seen from the second
CORNERS = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1)}
BETWEEN = "between"
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


@dataclass(frozen=True)
class Kind:
    """What is graded about scenes.

    Attributes:
        layout: "free" for objects anywhere, of any size and turned, on gradients, too; "quarters" for objects of two sizes in the
            middle of the quarters of the image, upright, on plain backgrounds.
        level: 1 for one or two objects and relations between two; 2 for up to three, of which one may be in a corner, and
            relations of two to a third; 3 for up to four, of which one may be between two others.
    """

    layout: str = "free"
    level: int = 1

    @property
    def counts(self) -> tuple[float, ...]:
        """Return how often there are 1, 2 … objects; quarters have room for three in few ways, so that these would repeat."""
        return ((0.4, 0.6), (0.42, 0.5, 0.08) if self.layout == "quarters" else (0.3, 0.4, 0.3), (0.2, 0.3, 0.3, 0.2))[
            self.level - 1
        ]


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


class Relation(NamedTuple):
    """Where object number `subject` is: left of, right of, above, below or between the `others`, or in a corner of the image."""

    subject: int
    name: str
    others: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """What a caption states: the objects in the order it names them, where some of them are, perhaps the background."""

    objects: tuple[Object, ...]
    relations: tuple[Relation, ...] = ()
    background: str | None = None


@dataclass(frozen=True)
class Scene:
    """An image's content, every detail decided.

    Positions are centres, as fractions of the width, y downwards; turns are in degrees, clockwise.
    """

    objects: tuple[Object, ...]
    positions: tuple[Point, ...]
    radii: tuple[float, ...]
    background: str
    turns: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Leave all objects upright where `turns` is not given."""
        if not self.turns:
            object.__setattr__(self, "turns", (0.0,) * len(self.objects))


def sample_description(
    rng: np.random.Generator, kind: Kind, pairs: Sequence[Pair] = SEEN_PAIRS, must_have: Sequence[Pair] = ()
) -> Description:
    """Sample a description of different objects; three or more of them differ in shape.

    Args:
        rng: source of random numbers.
        kind: layout and level.
        pairs: (colour, shape) pairs to choose from.
        must_have: pairs of which exactly one is among the objects; empty for no such wish.
    """
    count = 1 + int(rng.choice(len(kind.counts), p=kind.counts))
    chosen = _choose_pairs(count, rng, pairs, must_have)
    while count > 2 and len({shape for _, shape in chosen}) < count:
        chosen = _choose_pairs(count, rng, pairs, must_have)
    sizes = [size if rng.random() < 0.5 else None for size in sample_sizes((None,) * count, rng)]
    objects = tuple(Object(*pair, size) for pair, size in zip(chosen, sizes, strict=True))
    background = sample_background(rng, kind.layout) if rng.random() < 0.5 else None
    return Description(objects, _sample_relations(objects, rng, kind), background)


def sample_sizes(stated: Sequence[str | None], rng: np.random.Generator) -> list[str]:
    """Sample the sizes that are not stated; not many of three or four are large, since they would leave no room."""
    sizes = [size or str(rng.choice(list(RADII))) for size in stated]
    while sizes.count("large") > max(MAX_LARGE[len(sizes) - 1], stated.count("large")):
        sizes = [size or str(rng.choice(list(RADII))) for size in stated]
    return sizes


def sample_background(rng: np.random.Generator, layout: str) -> str:
    """Sample the name of a background: with the layout "free" a quarter of them are gradients."""
    names = [name for name in BACKGROUNDS if name not in PLAIN] if layout == "free" and rng.random() < 0.25 else list(PLAIN)
    return names[int(rng.integers(len(names)))]


def _choose_pairs(count: int, rng: np.random.Generator, pairs: Sequence[Pair], must_have: Sequence[Pair]) -> list[Pair]:
    candidates = [pair for pair in pairs if pair not in must_have]
    chosen = [candidates[k] for k in rng.choice(len(candidates), size=count, replace=False)]
    if must_have:
        chosen[int(rng.integers(count))] = must_have[int(rng.integers(len(must_have)))]
    return chosen


def _sample_relations(objects: Sequence[Object], rng: np.random.Generator, kind: Kind) -> tuple[Relation, ...]:
    """Sample what is stated of where `objects` are: often nothing."""
    count, corners = len(objects), kind.level > 1 and kind.layout == "free"
    if rng.random() > (0.6 if count > 1 else 0.25):
        return ()
    if corners and count <= 2 and rng.random() < (1 if count == 1 else 0.2):
        return (Relation(0, list(CORNERS)[int(rng.integers(len(CORNERS)))]),)
    if count == 1:
        return ()
    if kind.level > 2 and count > 2 and rng.random() < 0.3 and not any(named.size == "large" for named in objects):
        return (Relation(0, BETWEEN, (1, 2)),)
    name = list(DIRECTIONS)[int(rng.integers(len(DIRECTIONS)))]
    if count != 3 or rng.random() > 0.6:
        return (Relation(0, name, (1,)),)
    across = ("above", "below") if name in ("left", "right") else ("left", "right")
    both = across[int(rng.integers(2))]
    return (Relation(0, name, (1,)), Relation(0, both, (2,)), Relation(1, both, (2,)))
