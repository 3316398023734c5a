"""Figures of single samples: the worst ones, and those nearest to a training image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dit.config import WORST_SHOWN
from dit.dataset.decode import open_named
from dit.dataset.image_io import center_crop
from dit.dataset.reader import Entry
from dit.dataset.storage import StoredImages
from dit.evaluation.memorization import SAME, Nearest, near_threshold
from dit.utils.images import grid, labelled_grid

PAIRS = 10
CELL = 192  # pixels that an image takes


def plot_worst(
    images: Sequence[Image.Image], texts: Sequence[str], problems: Sequence[str | None], scores: np.ndarray, path: Path
) -> None:
    """Plot the samples with a problem, and then those of the lowest CLIP score, each with the reason, to `path`."""
    order = sorted(range(len(images)), key=lambda k: (not problems[k], float(scores[k])))[:WORST_SHOWN]
    labels = [f"{texts[k]}: {problems[k] or f'CLIP score {scores[k]:.0f}'}" for k in order]
    _save(labelled_grid([images[k] for k in order], labels, columns=6, cell=CELL), path)


def plot_nearest(
    images: Sequence[Image.Image],
    texts: Sequence[str],
    nearest: Nearest,
    held_out: np.ndarray,
    raw: Path,
    training: list[Entry],
    path: Path,
) -> None:
    """Plot pairs of a sample on the left and its nearest training image on the right, with their distance.

    The pairs that count for `memorised` come first: samples that are near to a training image where the held-out image of the
    same caption is not. If there are more than `PAIRS`, the nearest half of `PAIRS` and those that only just count are plotted,
    since the distance alone cannot tell a copy from a random likeness. If there are fewer, the nearest other samples follow.

    Args:
        images, texts, nearest: the samples, their prompts, and what `find_nearest` found for them.
        held_out: distances (M,) of the held-out images, of which the k-th has the caption of the k-th sample.
        raw, training: the data set's folder, and its training images in the order that `nearest` counts them in.
        path: the image file to write.
    """
    threshold = near_threshold(held_out) or SAME
    repeats = np.ones(len(images), dtype=bool)
    repeats[: len(held_out)] = held_out[: len(images)] < threshold
    stored = StoredImages(raw)
    pairs, labels = [], []
    order = np.argsort(nearest.distance, kind="stable")
    counts = (nearest.distance < threshold) & ~repeats
    counted, others = order[counts[order]], order[~counts[order]]
    chosen = [*counted[: PAIRS // 2], *counted[-PAIRS // 2 :]] if len(counted) > PAIRS else [*counted, *others][:PAIRS]
    for k in chosen:
        entry = training[int(nearest.index[k])]
        known = center_crop(open_named(stored.read(entry.stored), entry.image), images[k].size)
        known = ImageOps.mirror(known) if nearest.mirrored[k] else known
        pairs.append(grid([images[k], known], columns=2, gap=2))
        mirrored = ", mirrored" if nearest.mirrored[k] else ""
        remark = "" if counts[k] else ", does not count"
        labels.append(f"Distance {nearest.distance[k]:.3f}{remark}. Sample: {texts[k]}. Training{mirrored}: {entry.text}")
    _save(labelled_grid(pairs, labels, columns=2, cell=2 * CELL), path)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
