"""Source `shapes`: rendered scenes with captions in plain English, as many as you like, the same on every machine."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import Runtime, ShapesData
from dit.shapes.captions import describe
from dit.shapes.placement import sample_scene
from dit.shapes.prompts import TRAIN_STREAM
from dit.shapes.render import render
from dit.shapes.scene import Kind, sample_description
from dit.sources.writer import DatasetWriter, FetchResult


def fetch(data: ShapesData, folder: Path, runtime: Runtime) -> FetchResult:
    """Render `data.num_samples` scenes into `folder`, none of which shows or names an unseen pair."""
    writer = DatasetWriter(folder, data, data.num_samples)
    kind = Kind(data.layout, data.level)
    for k in tqdm(range(data.num_samples), desc="render", unit="image"):
        rng = np.random.default_rng([data.seed, TRAIN_STREAM, k])
        description = sample_description(rng, kind)
        text = describe(description, rng)
        content = io.BytesIO()
        render(sample_scene(description, rng, kind.layout), data.image_size).save(content, "PNG")
        writer.add(f"images/{k:06d}.png", content.getvalue(), [text])
    return writer.close(FetchResult())
