"""Score an image by its caption: whether it shows all of it and nothing else, and which attributes are right.

The idea is GenEval's (Ghosh et al. 2023, arXiv:2310.11513): detect the objects, then check what the caption states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from dit.shapes.captions import parse
from dit.shapes.detector import DetectedObject, Detection, detect
from dit.shapes.placement import position_between
from dit.shapes.scene import BETWEEN, CORNERS, DIRECTIONS, Description, Object, Relation

MIN_OFFSET = 0.06  # of the width: how far left means left; rendered scenes keep 0.28
# Of the width: how near to both edges of the image a centre is that is in a corner. Rendered scenes keep 0.31.
MAX_CORNER = 0.36
# As in placement.py, whose scenes keep 0.2 and 0.15: how far from the middle between two, and beside the line, the third is.
MAX_FROM_MIDDLE, MAX_BESIDE = 0.35, 0.25
ATTRIBUTES = ("colour", "shape", "size", "relation", "count")
MAX_CANDIDATES = 6  # detected objects that partners are looked for among, the largest ones: an image of noise shows dozens


@dataclass(frozen=True)
class ScoreResult:
    """The first problem of an image in words, "" if everything is right."""

    problem: str = ""

    @property
    def correct(self) -> bool:
        """Return whether everything is right."""
        return not self.problem


@dataclass(frozen=True)
class PromptScore:
    """The score of one image by its prompt.

    Attributes:
        problem: what is wrong with the image, "" if nothing is.
        num_objects: how many objects the prompt names.
        attributes: by attribute, how many are right and how many are stated.
    """

    problem: str
    num_objects: int
    attributes: dict[str, tuple[int, int]]


def score_image(image: Image.Image | np.ndarray, prompt: str) -> PromptScore | None:
    """Score `image` by `prompt`; None where the prompt is not about our shapes."""
    description = parse(prompt)
    if description is None:
        return None
    detection = detect(image)
    problem = match_objects(detection, description).problem
    return PromptScore(problem, len(description.objects), attribute_scores(detection, description))


def score_objects(image: Image.Image | np.ndarray, description: Description) -> ScoreResult:
    """Detect the objects in `image` and match them with `description`; see `match_objects`."""
    return match_objects(detect(image), description)


def match_objects(detection: Detection, description: Description) -> ScoreResult:
    """Match the detected objects with those of `description`.

    Every object must be there in its colour, shape and, where stated, size; every stated relation must hold; a stated
    background must be there; and nothing else may be.
    """
    found, wanted = detection.objects, description.objects
    shown = ", ".join(f"{other.size} {other.colour} {other.shape}" for other in found) or "nothing"
    if len(found) != len(wanted):
        number = "1 thing" if len(found) == 1 else f"{len(found)} things"
        return ScoreResult(f"{number} instead of {len(wanted)}: {shown}")
    if description.background and detection.background != description.background:
        return ScoreResult(f"background {detection.background}, not {description.background}")
    matches = [order for order in permutations(found) if all(map(_fits, wanted, order))]
    if not matches:
        return ScoreResult(f"shows {shown}")
    if not any(_count_relations(order, description) == len(description.relations) for order in matches):
        return ScoreResult("right things, wrong places")
    return ScoreResult()


def attribute_scores(detection: Detection, description: Description) -> dict[str, tuple[int, int]]:
    """Count, for each of `ATTRIBUTES` that the description states, how many are right and how many are stated.

    Each wanted object has at most one of the detected ones as its partner, which shares its colour or its shape; partners are
    chosen so that as much as possible is right. What has no partner is wrong in everything. `count` is one: whether there
    are as many objects as wanted. The background is no attribute: it is of the image, not of the objects.
    """
    wanted = description.objects
    candidates: list[DetectedObject | None] = []
    candidates += sorted(detection.objects, key=lambda found: -found.radius)[:MAX_CANDIDATES]
    candidates += [None] * (len(wanted) - len(candidates))
    counts = (_count_right(order, description) for order in permutations(candidates, len(wanted)))
    right = max(counts, key=lambda count: sum(count.values())) | {"count": int(len(detection.objects) == len(wanted))}
    stated = {
        "colour": len(wanted),
        "shape": len(wanted),
        "size": sum(each.size is not None for each in wanted),
        "relation": len(description.relations),
        "count": 1,
    }
    return {name: (right[name], stated[name]) for name in ATTRIBUTES if stated[name]}


def _count_right(order: Sequence[DetectedObject | None], description: Description) -> dict[str, int]:
    """Count the colours, shapes, sizes and relations that are right where `order` are the partners of the wanted objects."""
    pairs = [
        (wanted, found) if found and (wanted.colour == found.colour or wanted.shape == found.shape) else (wanted, None)
        for wanted, found in zip(description.objects, order, strict=True)
    ]
    return {
        "colour": sum(found is not None and wanted.colour == found.colour for wanted, found in pairs),
        "shape": sum(found is not None and wanted.shape == found.shape for wanted, found in pairs),
        "size": sum(found is not None and wanted.size == found.size for wanted, found in pairs),
        "relation": _count_relations([found for _, found in pairs], description),
    }


def _fits(wanted: Object, found: DetectedObject) -> bool:
    return wanted.pair == (found.colour, found.shape) and wanted.size in (None, found.size)


def _count_relations(partners: Sequence[DetectedObject | None], description: Description) -> int:
    """Count the stated relations that hold between the partners of the wanted objects; None is missing."""
    count = 0
    for relation in description.relations:
        involved = [partners[k] for k in (relation.subject, *relation.others)]
        count += _holds(relation, [found for found in involved if found]) if all(involved) else 0
    return count


def _holds(relation: Relation, involved: Sequence[DetectedObject]) -> bool:
    """Return whether a relation holds between its subject, which comes first in `involved`, and the others."""
    subject, *others = (np.array([found.x, found.y]) for found in involved)
    if relation.name in CORNERS:
        corner = (np.array(CORNERS[relation.name]) + 1) / 2
        return bool(np.abs(subject - corner).max() <= MAX_CORNER)
    if relation.name == BETWEEN:
        along, beside = position_between(subject, *others)
        return bool(abs(along - 0.5) <= MAX_FROM_MIDDLE and beside <= MAX_BESIDE)
    return bool((subject - others[0]) @ np.array(DIRECTIONS[relation.name]) >= MIN_OFFSET)
