"""Does a picture show what its caption says, all of it and nothing else?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from dit.evaluation.detector import Found, detect
from dit.sources.scene import RELATIONS, Description, Thing

SIDE = 0.06  # of the width: how far left means left; drawings keep 0.2


@dataclass(frozen=True)
class Verdict:
    """Whether everything is right, and if not the first problem in words."""

    correct: bool
    problem: str | None = None


def judge(picture: Image.Image | np.ndarray, description: Description) -> Verdict:
    """Compare what is found in `picture` with `description`.

    Every thing must be there in its colour, shape and, where stated, size; every stated relation must hold; a stated
    background must be there; and nothing else may be.
    """
    detection = detect(picture)
    found, wanted = detection.things, description.things
    shown = ", ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in found) or "nothing"
    if len(found) != len(wanted):
        return Verdict(False, f"{len(found)} things instead of {len(wanted)}: {shown}")
    if description.background and detection.background != description.background:
        return Verdict(False, f"background {detection.background}, not {description.background}")
    matches = [order for order in permutations(found) if all(map(_fits, wanted, order))]
    if not matches:
        return Verdict(False, f"shows {shown}")
    if not any(_related(order, description) for order in matches):
        return Verdict(False, "right things, wrong places")
    return Verdict(True)


def _fits(wanted: Thing, found: Found) -> bool:
    return wanted.pair == (found.colour, found.shape) and wanted.size in (None, found.size)


def _related(order: tuple[Found, ...], description: Description) -> bool:
    for i, relation, j in description.relations:
        dx, dy = RELATIONS[relation]
        if (order[i].x - order[j].x) * dx + (order[i].y - order[j].y) * dy < SIDE:
            return False
    return True
