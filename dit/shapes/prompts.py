"""Source `shapes`: drawn scenes with captions in plain English, as many as you like, the same on every machine."""

from __future__ import annotations

import numpy as np

from dit.shapes.captions import describe
from dit.shapes.scene import UNSEEN_PAIRS, sample_description

# One number per set of scenes, so that none shares a scene with another: these two here, two more in encoders/fit.py.
TRAIN_STREAM, UNSEEN_STREAM = 1, 2


def unseen_prompts(count: int, seed: int) -> list[str]:
    """`count` different captions, each of which names exactly one colour and shape that were never seen together."""
    prompts: dict[str, None] = {}
    k = 0
    while len(prompts) < count:
        rng = np.random.default_rng([seed, UNSEEN_STREAM, k])
        prompts[describe(sample_description(rng, must_have=sorted(UNSEEN_PAIRS)), rng)] = None
        k += 1
    return list(prompts)
