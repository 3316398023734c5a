"""What the figures are made of, to look at: the worst images, and those nearest to a training image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dit.dataset.image_io import center_crop, open_rgb
from dit.dataset.reader import Entry
from dit.dataset.storage import StoredImages
from dit.evaluation.memorization import SAME, Nearest, near
from dit.utils.images import grid, labelled_grid

WORST = 18
PAIRS = 10
CELL = 192  # pixels that an image takes


def plot_worst(
    pictures: Sequence[Image.Image], texts: Sequence[str], problems: Sequence[str | None], scores: np.ndarray, path: Path
) -> None:
    """Return the images that are judged wrong, and then those of the lowest CLIP score, each with the reason."""
    order = sorted(range(len(pictures)), key=lambda k: (not problems[k], float(scores[k])))[:WORST]
    labels = [f"{texts[k]}: {problems[k] or f'CLIP score {scores[k]:.0f}'}" for k in order]
    _save(labelled_grid([pictures[k] for k in order], labels, columns=6, cell=CELL), path)


def plot_nearest(
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    nearest: Nearest,
    held_out: np.ndarray,
    raw: Path,
    training: list[Entry],
    path: Path,
) -> None:
    """Pairs of a sample on the left and its nearest training image on the right, and what the numbers say.

    They are what `memorised` is made of: samples that are near to a training image where the held-out image of the same caption
    is not. Of many, the nearest half of `PAIRS` and those that only just count, since a copy and a chance likeness look alike
    in numbers alone. Of few, the nearest of the other samples follow.

    Args:
        images, texts, nearest: the samples, their prompts, and what `find_nearest` found for them.
        held_out: distances (M,) of the held-out images, of which the k-th has the caption of the k-th sample.
        raw, training: the data set's folder, and its training images in the order that `nearest` counts them in.
        path: of the image.
    """
    threshold = near(held_out) or SAME
    repeats = np.ones(len(pictures), dtype=bool)
    repeats[: len(held_out)] = held_out[: len(pictures)] < threshold
    stored = StoredImages(raw)
    pairs, labels = [], []
    order = np.argsort(nearest.distance, kind="stable")
    counts = (nearest.distance < threshold) & ~repeats
    about, others = order[counts[order]], order[~counts[order]]
    chosen = [*about[: PAIRS // 2], *about[-PAIRS // 2 :]] if len(about) > PAIRS else [*about, *others][:PAIRS]
    for k in chosen:
        entry = training[int(nearest.index[k])]
        image = center_crop(open_rgb(stored.read(entry.stored)), pictures[k].width)
        image = ImageOps.mirror(image) if nearest.mirrored[k] else image
        pairs.append(grid([pictures[k], image], columns=2, gap=2))
        how = ", mirrored" if nearest.mirrored[k] else ""
        beside = "" if counts[k] else ", does not count"
        labels.append(f"Distance {nearest.distance[k]:.3f}{beside}. Drawn: {texts[k]}. Training{how}: {entry.text}")
    _save(labelled_grid(pairs, labels, columns=2, cell=2 * CELL), path)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
