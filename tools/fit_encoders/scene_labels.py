"""Labels of images and of captions: the supervision with which the bundled CLIP and VAE learn in minutes.

CLIP: from pairs of image and caption alone, 450 steps of 96 told shapes apart in 70 % of pairs, and left from right not at all.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit.shapes.scene import (
    BACKGROUNDS,
    BETWEEN,
    COLOURS,
    CORNERS,
    DIRECTIONS,
    MAX_TURN,
    RADII,
    RGB,
    SHAPES,
    Description,
    Scene,
)

# Classes of a patch: colour, shape and size of the object on it (0 for none), and the background.
PATCH_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(RADII) + 1, len(BACKGROUNDS))
# Classes of an object in a caption: colour, shape, size (0 for none stated), whether it is named first, second …, and what
# relation to it was stated of those before (0 for none).
RELATIONS = (None, *DIRECTIONS, BETWEEN)
OBJECT_CLASSES = (len(COLOURS), len(SHAPES), len(RADII) + 1, 4, len(RELATIONS))
# Of each colour and each shape: is it there, where (x, y), is it large. The last three count where exactly one object has it.
ROWS, FACTS = len(COLOURS) + len(SHAPES), 4
SUMMARY = ROWS * FACTS + len(BACKGROUNDS)  # and of each background: is it this one
# Numbers in the code of a cell: which shape covers it, in which colour, the way to its centre, its radius, its turn; background.
CODE = len(SHAPES) + 3 + 2 + 1 + 1 + 3
MEAN_RADIUS, RADIUS_RANGE = 0.18, 0.04
ASIDE = 0.5  # how far from the middle an object is of which a relation is stated


def patch_labels(scene: Scene, patches: int) -> np.ndarray:
    """Return the classes of all patches: (4, patches, patches) int64, in the order of PATCH_CLASSES."""
    labels = np.zeros((len(PATCH_CLASSES), patches, patches), dtype=np.int64)
    labels[3] = list(BACKGROUNDS).index(scene.background)
    centres = (np.arange(patches) + 0.5) / patches
    for shown, (x, y), radius in zip(scene.objects, scene.positions, scene.radii, strict=True):
        covered = (np.abs(centres[:, None] - y) < radius) & (np.abs(centres[None] - x) < radius)
        for row, (names, name) in enumerate(((COLOURS, shown.colour), (SHAPES, shown.shape), (RADII, shown.size))):
            labels[row, covered] = 1 + list(names).index(name)
    return labels


def object_labels(description: Description) -> np.ndarray:
    """Return the classes of every object that `description` names: (objects, 5) int64, in the order of OBJECT_CLASSES."""
    sizes = [None, *RADII]
    stated = {other: relation.name for relation in description.relations for other in relation.others}
    rows = [
        (list(COLOURS).index(o.colour), SHAPES.index(o.shape), sizes.index(o.size), k, RELATIONS.index(stated.get(k)))
        for k, o in enumerate(description.objects)
    ]
    return np.array(rows, dtype=np.int64)


def scene_code(scene: Scene, cells: int) -> np.ndarray:
    """Return what each cell of the image shows: (CODE, cells, cells) float32; all 0 but the background where no object is.

    A cell whose centre is in an object's bounding box tells all of that object, so that some 4 to 16 cells tell the same, each
    from its own place. Colours run from -1 to 1; the way to the centre is in quarters of the image.
    """
    code = np.zeros((CODE, cells, cells), np.float32)
    centres = (np.arange(cells) + 0.5) / cells
    down, right = centres[:, None], centres[None]
    for shown, (x, y), radius, turn in zip(scene.objects, scene.positions, scene.radii, scene.turns, strict=True):
        inside = (np.abs(right - x) < radius) & (np.abs(down - y) < radius)
        shape = np.eye(len(SHAPES))[SHAPES.index(shown.shape)]
        same = (*shape, *_colour(COLOURS[shown.colour]), 0, 0, (radius - MEAN_RADIUS) / RADIUS_RANGE, turn / MAX_TURN, 0, 0, 0)
        code[:, inside] = np.array(same)[:, None]
        code[9] += 4 * (x - right) * inside
        code[10] += 4 * (y - down) * inside
    top, bottom = map(_colour, BACKGROUNDS[scene.background])
    code[-3:] = (top[:, None] + (bottom - top)[:, None] * np.linspace(0, 1, cells))[:, :, None]
    return code


def _colour(colour: RGB) -> np.ndarray:
    return np.array(colour) / 127.5 - 1


def summary_labels(scene: Scene) -> np.ndarray:
    """Return values, and which of them count: (2, SUMMARY) float32; positions run from -1 to 1."""
    facts = [
        (shown.colour, shown.shape, (1, 2 * x - 1, 2 * y - 1, shown.size == "large"))
        for shown, (x, y) in zip(scene.objects, scene.positions, strict=True)
    ]
    return _summary(facts, scene.background)


def caption_labels(description: Description) -> np.ndarray:
    """Return the same of a caption: about the mean over the scenes that it fits, so these labels have no noise."""
    positions = np.zeros((len(description.objects), 2))
    for subject, name, others in description.relations:
        positions[subject] += CORNERS.get(name) or DIRECTIONS.get(name) or (0, 0)
        for other in others:
            positions[other] -= DIRECTIONS.get(name, (0, 0))
    positions = ASIDE * positions.clip(-1, 1)
    large = {"large": 1, "small": 0, None: 0.5}
    facts = [(o.colour, o.shape, (1, x, y, large[o.size])) for o, (x, y) in zip(description.objects, positions, strict=True)]
    return _summary(facts, description.background)


def _summary(facts: list[tuple[str, str, tuple[float, ...]]], background: str | None) -> np.ndarray:
    values, counts = np.zeros((ROWS, FACTS), np.float32), np.zeros(ROWS, int)
    for colour, shape, fact in facts:
        for row in (list(COLOURS).index(colour), len(COLOURS) + SHAPES.index(shape)):
            values[row] = fact
            counts[row] += 1
    mask = np.ones((ROWS, FACTS), np.float32)
    mask[:, 1:] = (counts == 1)[:, None]
    backgrounds = [float(name == background) if background else 1 / len(BACKGROUNDS) for name in BACKGROUNDS]
    return np.stack(
        [np.concatenate([values.ravel(), backgrounds]), np.concatenate([mask.ravel(), np.ones(len(BACKGROUNDS))])],
        dtype=np.float32,
    )


class SceneHeads(nn.Module):
    """Linear read-outs of patch tokens, text tokens, and image and text vectors; not kept after the fit.

    Image and text vectors share theirs, so that both sides learn to encode the same fact in the same place.
    """

    def __init__(self, width: int, vector_size: int):
        super().__init__()
        self.patches = nn.Linear(width, sum(PATCH_CLASSES))
        self.objects = nn.Linear(width, sum(OBJECT_CLASSES))
        self.summary = nn.Linear(vector_size, SUMMARY)

    def patch_loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropies, summed over the four kinds of class; `tokens` (N, T, D), `labels` (N, 4, T) int64."""
        logits = self.patches(tokens).float().split(PATCH_CLASSES, dim=-1)
        return sum(F.cross_entropy(part.transpose(1, 2), labels[:, k]) for k, part in enumerate(logits))

    def object_loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the same of the objects in captions; `tokens` (K, D), `labels` (K, 5) int64."""
        logits = self.objects(tokens).float().split(OBJECT_CLASSES, dim=-1)
        return sum(F.cross_entropy(part, labels[:, k]) for k, part in enumerate(logits))

    def summary_loss(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of the summaries read from `vectors` (N, P); see `summary_labels` for `labels`."""
        values, mask = labels.unbind(1)
        errors = (self.summary(vectors).float() - values).square() * mask
        return errors.sum() / mask.sum()
