"""Where the objects of a scene are: a random scene that a description fits, freely or in the quarters of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np

from dit.shapes.scene import (
    BETWEEN,
    CORNERS,
    DIRECTIONS,
    MAX_TURN,
    RADII,
    TURNED,
    Description,
    Point,
    Relation,
    Scene,
    sample_background,
    sample_sizes,
)

MARGIN = 0.03  # at least this much background between an object's bounding box and the border of the image
GAP = 0.04  # and between two bounding boxes
CORNER = 0.06  # how far from a corner, beyond the margin, an object may be that is said to be in it
ASLANT = 0.7  # how far an object may be beside the straight line, of its distance along it, that is said to be left, right …
# Of the distance between two objects: how near to the middle and to the line between them a third is that is between them.
MIDDLE, BESIDE = 0.2, 0.15
CANDIDATES = 128  # centres that are sampled at once, of which the first that fits is taken


def sample_scene(description: Description, rng: np.random.Generator, layout: str) -> Scene:
    """Sample a scene that `description` fits: what it leaves open (sizes, background, positions) is random.

    Where no relation at all is stated, objects are named from top to bottom. A mirror image keeps that.

    Args:
        description: what to show.
        rng: source of random numbers.
        layout: "free" or "quarters", see `Kind`.
    """
    background = description.background or sample_background(rng, layout)
    positions: Sequence[Point] | None = None
    while positions is None:
        sizes = sample_sizes([wanted.size for wanted in description.objects], rng)
        objects = tuple(replace(wanted, size=size) for wanted, size in zip(description.objects, sizes, strict=True))
        if layout == "quarters":
            radii = [sum(RADII[size]) / 2 for size in sizes]
            positions = _sample_quarters(description, rng)
            turns = [0.0] * len(objects)
        else:
            radii = [float(rng.uniform(*RADII[size])) for size in sizes]
            positions = _sample_positions(description, radii, rng)
            turns = [float(rng.uniform(-MAX_TURN, MAX_TURN)) if shown.shape in TURNED else 0.0 for shown in objects]
    return Scene(objects, tuple(positions), tuple(radii), background, tuple(turns))


def _sample_positions(description: Description, radii: Sequence[float], rng: np.random.Generator) -> list[Point] | None:
    """Sample one centre after the other: all relations hold and boxes keep their distance; None if one has no place left."""
    centres = np.empty((CANDIDATES, len(radii), 2))  # in each column the centre that was taken, or candidates for it
    for k, radius in enumerate(radii):
        centres[:, k] = MARGIN + radius + rng.random((CANDIDATES, 2)) * (1 - 2 * (MARGIN + radius))
        fits = np.ones(CANDIDATES, bool)
        for i in range(k):
            fits &= np.abs(centres[:, i] - centres[:, k]).max(axis=1) >= radii[i] + radius + GAP
        for relation in description.relations:
            if max((relation.subject, *relation.others)) == k:
                fits &= _holds(centres, radii, relation, straight=relation.others != (2,))
        if k and not description.relations:
            fits &= centres[:, k - 1, 1] <= centres[:, k, 1]
        if not fits.any():
            return None
        centres[:, k] = centres[fits.argmax(), k]
    return [(float(x), float(y)) for x, y in centres[0]]


def _holds(centres: np.ndarray, radii: Sequence[float], relation: Relation, straight: bool) -> np.ndarray:
    """Return for which of the `centres` (candidates, objects, 2) a relation plainly holds.

    Args:
        centres: the candidates.
        radii: of all objects.
        relation: what shall hold.
        straight: that one object is straight beside or above the other, so that only one relation is true of the two.
    """
    subject = centres[:, relation.subject]
    if relation.name in CORNERS:
        corner = (np.array(CORNERS[relation.name]) + 1) / 2
        return np.abs(subject - corner).max(axis=1) <= MARGIN + radii[relation.subject] + CORNER
    if relation.name == BETWEEN:
        along, beside = position_between(subject, *(centres[:, k] for k in relation.others))
        return (np.abs(along - 0.5) <= MIDDLE) & (beside <= BESIDE)
    (other,) = relation.others
    offset = subject - centres[:, other]
    along = offset @ np.array(DIRECTIONS[relation.name])
    across = np.abs(offset @ np.array(DIRECTIONS[relation.name])[::-1])
    beyond = along >= radii[relation.subject] + radii[other] + GAP
    return beyond & (across <= ASLANT * along) if straight else beyond


def position_between(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far along the line from `start` to `end` a `point` is, and how far beside it, as shares of its length.

    Args:
        point, start, end: (..., 2)
    """
    line, way = end - start, point - start
    squared = np.maximum((line * line).sum(-1), 1e-9)
    across = np.abs(line[..., 0] * way[..., 1] - line[..., 1] * way[..., 0])
    return (line * way).sum(-1) / squared, across / squared


def _sample_quarters(description: Description, rng: np.random.Generator) -> list[Point]:
    """Sample which quarters of the image the objects are in, uniformly among all ways in which every relation holds."""
    centres = [((column + 0.5) / 2, (row + 0.5) / 2) for row in range(2) for column in range(2)]
    fitting = [
        chosen
        for chosen in permutations(centres, len(description.objects))
        if all(_holds_in_quarters(chosen, relation) for relation in description.relations)
        and (description.relations or all(above[1] < below[1] for above, below in pairwise(chosen[:2])))
        and (description.relations or all(above[1] <= below[1] for above, below in pairwise(chosen)))
    ]
    return list(fitting[int(rng.integers(len(fitting)))])


def _holds_in_quarters(chosen: Sequence[Point], relation: Relation) -> bool:
    """Return whether a relation holds: straight between two, so that only one is true of them; perhaps diagonally to a third."""
    (other,) = relation.others
    dx, dy = DIRECTIONS[relation.name]
    x, y = np.subtract(chosen[relation.subject], chosen[other])
    return x * dx + y * dy > 0 and (other == 2 or not x * dy + y * dx)
