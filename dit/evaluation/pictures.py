"""What the figures are made of, to look at: the worst pictures, and those nearest to a training image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dit.evaluation.memorisation import Nearest
from dit.images import grid, labelled_grid
from dit.sources.dataset import Entry
from dit.sources.storage import StoredImages
from dit.views import central_square, open_upright

WORST = 18
PAIRS = 10
CELL = 192  # pixels that a picture takes


def draw_worst(
    pictures: Sequence[Image.Image], texts: Sequence[str], problems: Sequence[str | None], scores: np.ndarray, path: Path
) -> None:
    """The pictures that are judged wrong, and then those of the lowest CLIP score, each with the reason."""
    order = sorted(range(len(pictures)), key=lambda k: (not problems[k], float(scores[k])))[:WORST]
    labels = [f"{texts[k]}: {problems[k] or f'CLIP score {scores[k]:.0f}'}" for k in order]
    _save(labelled_grid([pictures[k] for k in order], labels, columns=6, cell=CELL), path)


def draw_nearest(
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    nearest: Nearest,
    raw: Path,
    training: list[Entry],
    threshold: float | None,
    path: Path,
) -> None:
    """The pairs of least distance: a sample on the left, its nearest training image on the right, and what the numbers say.

    Args:
        pictures, texts, nearest: the samples, their prompts, and what `find_nearest` found for them.
        raw, training: the data set's folder, and its training images in the order that `nearest` counts them in.
        threshold: the distance that `memorisation` counts by, if there is one.
        path: of the picture.
    """
    stored = StoredImages(raw)
    pairs, labels = [], []
    for k in np.argsort(nearest.distance, kind="stable")[:PAIRS]:
        entry = training[int(nearest.index[k])]
        image = central_square(open_upright(stored.read(entry.stored)), pictures[k].width)
        image = ImageOps.mirror(image) if nearest.mirrored[k] else image
        pairs.append(grid([pictures[k], image], columns=2, gap=2))
        by = f" (too near: below {threshold:.3f})" if threshold is not None else ""
        how = ", mirrored" if nearest.mirrored[k] else ""
        labels.append(f"distance {nearest.distance[k]:.3f}{by}. Drawn: {texts[k]}. Training{how}: {entry.text}")
    _save(labelled_grid(pairs, labels, columns=2, cell=2 * CELL), path)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
