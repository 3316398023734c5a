"""Does a picture show what its caption says, all of it and nothing else? And if not, which of its attributes are right?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from dit.shapes.captions import parse
from dit.shapes.detector import Detection, Found, detect
from dit.shapes.scene import RELATIONS, Description, Object

SIDE = 0.06  # of the width: how far left means left; drawings keep 0.2
ATTRIBUTES = ("colour", "shape", "size", "relation", "count")
PARTNERS = 6  # of the things found, that the wanted ones are looked for among: a picture of noise shows dozens


@dataclass(frozen=True)
class ScoreResult:
    """Whether everything is right, and if not the first problem in words."""

    correct: bool
    problem: str | None = None


def judge(picture: Image.Image | np.ndarray, description: Description) -> ScoreResult:
    """Compare what is found in `picture` with `description`; see `compare`."""
    return compare(detect(picture), description)


def compare(detection: Detection, description: Description) -> ScoreResult:
    """The verdict on what was found in a picture.

    Every thing must be there in its colour, shape and, where stated, size; every stated relation must hold; a stated
    background must be there; and nothing else may be.
    """
    found, wanted = detection.things, description.things
    shown = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in found) or "nothing"
    if len(found) != len(wanted):
        number = "1 thing" if len(found) == 1 else f"{len(found)} things"
        return ScoreResult(False, f"{number} instead of {len(wanted)}: {shown}")
    if description.background and detection.background != description.background:
        return ScoreResult(False, f"background {detection.background}, not {description.background}")
    matches = [order for order in permutations(found) if all(map(_fits, wanted, order))]
    if not matches:
        return ScoreResult(False, f"shows {shown}")
    if not any(_related(order, description) for order in matches):
        return ScoreResult(False, "right things, wrong places")
    return ScoreResult(True)


def attributes(detection: Detection, description: Description) -> dict[str, tuple[int, int]]:
    """Of each of `ATTRIBUTES` that the description states, how many are right and how many there are.

    Each wanted thing has at most one of the found ones as its partner, which shares its colour or its shape; partners are
    chosen so that as much as possible is right. What has no partner is wrong in everything. `count` is one: whether there
    are as many things as wanted. The background is no attribute: it is of the picture, not of the things.
    """
    largest = sorted(detection.things, key=lambda thing: -thing.radius)[:PARTNERS]
    largest += [None] * (len(description.things) - len(largest))
    orders = permutations(largest, len(description.things))
    right = max((_right(order, description) for order in orders), key=lambda counts: sum(counts.values()))
    right["count"] = len(detection.things) == len(description.things)
    stated = {
        "colour": len(description.things),
        "shape": len(description.things),
        "size": sum(thing.size is not None for thing in description.things),
        "relation": len(description.relations),
        "count": 1,
    }
    return {name: (int(right[name]), stated[name]) for name in ATTRIBUTES if stated[name]}


def _right(order: tuple[Found | None, ...], description: Description) -> dict[str, int]:
    """How many colours, shapes, sizes and relations are right where `order` are the partners of the wanted things."""
    pairs = list(zip(description.things, order, strict=True))
    pairs = [(thing, other) if other and _akin(thing, other) else (thing, None) for thing, other in pairs]
    partners = [other for _, other in pairs]
    return {
        "colour": sum(other is not None and thing.colour == other.colour for thing, other in pairs),
        "shape": sum(other is not None and thing.shape == other.shape for thing, other in pairs),
        "size": sum(other is not None and thing.size == other.size for thing, other in pairs),
        "relation": sum(
            partners[i] is not None and partners[j] is not None and _beside(partners[i], relation, partners[j])
            for i, relation, j in description.relations
        ),
    }


def _akin(wanted: Object, found: Found) -> bool:
    return wanted.colour == found.colour or wanted.shape == found.shape


def _fits(wanted: Object, found: Found) -> bool:
    return wanted.pair == (found.colour, found.shape) and wanted.size in (None, found.size)


def _related(order: tuple[Found, ...], description: Description) -> bool:
    return all(_beside(order[i], relation, order[j]) for i, relation, j in description.relations)


def _beside(first: Found, relation: str, second: Found) -> bool:
    """Whether `first` is left of, right of, above or below `second`."""
    dx, dy = RELATIONS[relation]
    return (first.x - second.x) * dx + (first.y - second.y) * dy >= SIDE


@dataclass(frozen=True)
class PromptScore:
    """What is wrong with a picture, "" if nothing is; of how many `things` its caption speaks; and by attribute how many are
    right and how many are stated."""

    problem: str
    things: int
    attributes: dict[str, tuple[int, int]]


def score_image(picture: Image.Image, text: str) -> PromptScore | None:
    """Judge `picture` by its caption; None where the caption is not about our shapes."""
    description = parse(text)
    if description is None:
        return None
    detection = detect(picture)
    problem = compare(detection, description).problem or ""
    return PromptScore(problem, len(description.things), attributes(detection, description))
