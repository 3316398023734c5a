"""What editing keeps of an image, and how often it changes what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from dit.benchmark.results import markdown_table
from dit.pipeline.generate import load_pipeline
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Description, Object
from dit.shapes.scoring import score_objects

CASES = 50
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def benchmark_editing(model: Path) -> list[dict[str, Any]]:
    """Measure, by strength, in what share of `CASES` images a red circle becomes a blue one, and stays in its place.

    Returns:
        A row for each strength; shares in [0, 1].
    """
    rng = np.random.default_rng(0)
    before, after = (Description((Object(colour, "circle"),)) for colour in ("red", "blue"))
    images = [render(sample_scene(before, rng, "free")) for _ in range(CASES)]
    pipeline = load_pipeline(model, "stochastic")
    pipeline.set_progress_bar_config(disable=True)
    prompts, rows = ["a blue circle"] * CASES, []
    for strength in STRENGTHS:
        seeds = [torch.Generator().manual_seed(k) for k in range(CASES)]
        edited = pipeline(prompts, image=images, strength=strength, generator=seeds, return_dict=False)[0]
        right = np.array([score_objects(image, after).correct for image in edited])
        same = np.array([foreground_iou(*pair) >= 0.6 for pair in zip(images, edited, strict=True)])
        shares = {"right": right.mean(), "same_place": same.mean(), "both": (right & same).mean()}
        rows.append({"strength": strength} | {name: float(share) for name, share in shares.items()})
    return rows


def editing_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `benchmark_editing` as a Markdown table."""
    return markdown_table(
        ("strength", "a blue circle", "same place (IoU of 0.6 or more)", "both"),
        [(str(row["strength"]), *(f"{row[name]:.0%}" for name in ("right", "same_place", "both"))) for row in rows],
    )


def foreground_iou(first: Image.Image, second: Image.Image) -> float:
    """Return the intersection over union of the foregrounds of two images of one size, in [0, 1]."""
    a, b = _foreground(first), _foreground(second)
    return float((a & b).sum() / max(1, (a | b).sum()))


def _foreground(image: Image.Image) -> np.ndarray:
    """Return where `image` differs from the colour along its border, (H, W) bool."""
    pixels = np.asarray(image, dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    return ndimage.binary_opening(np.linalg.norm(pixels - np.median(border, axis=0), axis=2) > 60)
