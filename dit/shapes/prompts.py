"""Prompts of colour and shape pairs that training never shows, and the random streams of the sets of scenes."""

from __future__ import annotations

import numpy as np

from dit.shapes.captions import describe
from dit.shapes.scene import UNSEEN_PAIRS, Kind, sample_description

# One number per set of scenes, so that none shares a scene with another; tools/fit_encoders/fit.py has more.
TRAIN_STREAM, UNSEEN_STREAM = 1, 2


def unseen_prompts(count: int, seed: int, kind: Kind) -> list[str]:
    """Return `count` different captions, each of which names exactly one colour and shape that were never seen together."""
    prompts: dict[str, None] = {}
    k = 0
    while len(prompts) < count:
        rng = np.random.default_rng([seed, UNSEEN_STREAM, k])
        prompts[describe(sample_description(rng, kind, must_have=sorted(UNSEEN_PAIRS)), rng)] = None
        k += 1
    return list(prompts)
