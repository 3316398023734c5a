"""What each patch of a drawing shows: the extra supervision with which the CLIP in the box learns to see in minutes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit.sources.scene import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene

# Classes of a patch: 0 is background in the first three.
ATTRIBUTES = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "size": len(RADII) + 1, "background": len(BACKGROUNDS)}


def patch_labels(scene: Scene, patches: int) -> np.ndarray:
    """Classes of every patch of a `patches` x `patches` grid: (4, patches, patches) int64, in the order of ATTRIBUTES."""
    labels = np.zeros((len(ATTRIBUTES), patches, patches), dtype=np.int64)
    labels[3] = list(BACKGROUNDS).index(scene.background)
    centres = (np.arange(patches) + 0.5) / patches
    for thing, (x, y), radius in zip(scene.things, scene.positions, scene.radii, strict=True):
        covered = (np.abs(centres[:, None] - y) < radius) & (np.abs(centres[None] - x) < radius)
        for row, (names, name) in enumerate(((COLOURS, thing.colour), (SHAPES, thing.shape), (RADII, thing.size))):
            labels[row, covered] = 1 + list(names).index(name)
    return labels


class PatchHeads(nn.Module):
    """Linear classifiers on a vision transformer's patch tokens; thrown away after the fit."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.Linear(width, sum(ATTRIBUTES.values()))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of the four cross-entropies; `tokens` (N, T, D), `labels` (N, 4, T) int64."""
        logits = self.heads(tokens).float().split(list(ATTRIBUTES.values()), dim=-1)
        return sum(F.cross_entropy(part.transpose(1, 2), labels[:, k]) for k, part in enumerate(logits))
