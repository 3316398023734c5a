"""What a drawing shows, patch by patch and as a whole: the extra supervision that makes the CLIP in the box learn in minutes.

From captions alone, 450 steps of 96 told shapes apart in 70 % of pairs, and left from right not at all.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit.sources.scene import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene

# Classes of a patch: colour, shape and size of the thing on it (0 for none), and the background.
PATCH_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(RADII) + 1, len(BACKGROUNDS))
# Of each colour and each shape: is it there, where (x, y), is it large. The last three count where exactly one thing has it.
SUMMARY = (len(COLOURS) + len(SHAPES), 4)


def patch_labels(scene: Scene, patches: int) -> np.ndarray:
    """Classes of every patch of a `patches` x `patches` grid: (4, patches, patches) int64, in the order of PATCH_CLASSES."""
    labels = np.zeros((len(PATCH_CLASSES), patches, patches), dtype=np.int64)
    labels[3] = list(BACKGROUNDS).index(scene.background)
    centres = (np.arange(patches) + 0.5) / patches
    for thing, (x, y), radius in zip(scene.things, scene.positions, scene.radii, strict=True):
        covered = (np.abs(centres[:, None] - y) < radius) & (np.abs(centres[None] - x) < radius)
        for row, (names, name) in enumerate(((COLOURS, thing.colour), (SHAPES, thing.shape), (RADII, thing.size))):
            labels[row, covered] = 1 + list(names).index(name)
    return labels


def summary_labels(scene: Scene) -> np.ndarray:
    """Values and which of them count: (2, *SUMMARY) float32; positions run from -1 to 1."""
    values, counts = np.zeros(SUMMARY, np.float32), np.zeros(SUMMARY[0], int)
    for thing, (x, y) in zip(scene.things, scene.positions, strict=True):
        for row in (list(COLOURS).index(thing.colour), len(COLOURS) + SHAPES.index(thing.shape)):
            values[row] = 1, 2 * x - 1, 2 * y - 1, thing.size == "large"
            counts[row] += 1
    mask = np.ones(SUMMARY, np.float32)
    mask[:, 1:] = (counts == 1)[:, None]
    return np.stack([values, mask])


class SceneHeads(nn.Module):
    """Linear read-outs of patch tokens, and of image and text vectors; thrown away after the fit.

    Image and text vectors share theirs, so that the two sides come to say the same thing in the same place.
    """

    def __init__(self, width: int, vector_size: int):
        super().__init__()
        self.patches = nn.Linear(width, sum(PATCH_CLASSES))
        self.summary = nn.Linear(vector_size, SUMMARY[0] * SUMMARY[1])

    def patch_loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropies, summed over the four kinds of class; `tokens` (N, T, D), `labels` (N, 4, T) int64."""
        logits = self.patches(tokens).float().split(PATCH_CLASSES, dim=-1)
        return sum(F.cross_entropy(part.transpose(1, 2), labels[:, k]) for k, part in enumerate(logits))

    def summary_loss(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean squared error of what `vectors` (N, P) say; `labels` (N, 2, *SUMMARY) are values and what counts."""
        values, mask = labels.unbind(1)
        errors = (self.summary(vectors).float().unflatten(-1, SUMMARY) - values).square() * mask
        return errors.sum() / mask.sum()
