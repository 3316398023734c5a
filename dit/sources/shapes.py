"""Source `shapes`: drawn scenes with captions in plain English, as many as you like, the same on every machine."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import Runtime, ShapesData
from dit.sources.captions import describe
from dit.sources.dataset import DatasetWriter, Report
from dit.sources.scene import UNSEEN_PAIRS, draw, sample_description, sample_scene

# One number per set of scenes, so that none shares a scene with another: these two here, two more in encoders/fit.py.
TRAIN_STREAM, UNSEEN_STREAM = 1, 2


def fetch(data: ShapesData, folder: Path, runtime: Runtime) -> Report:
    """Draw `data.num_samples` scenes into `folder`, none of which shows or names an unseen pair."""
    writer = DatasetWriter(folder, data, data.num_samples)
    for k in tqdm(range(data.num_samples), desc="draw", unit="image"):
        rng = np.random.default_rng([data.seed, TRAIN_STREAM, k])
        description = sample_description(rng)
        text = describe(description, rng)
        content = io.BytesIO()
        draw(sample_scene(description, rng), data.image_size).save(content, "PNG")
        writer.add(f"images/{k:06d}.png", content.getvalue(), [text])
    return writer.close(Report())


def unseen_prompts(count: int, seed: int) -> list[str]:
    """`count` different captions, each of which names exactly one colour and shape that were never seen together."""
    prompts: dict[str, None] = {}
    k = 0
    while len(prompts) < count:
        rng = np.random.default_rng([seed, UNSEEN_STREAM, k])
        prompts[describe(sample_description(rng, must_have=sorted(UNSEEN_PAIRS)), rng)] = None
        k += 1
    return list(prompts)
