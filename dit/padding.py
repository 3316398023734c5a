"""Texts of different lengths as one batch.

A file of its own, since drawing needs this and nothing else of the latent cache: editing the cache draws nothing again.
"""

from __future__ import annotations

import torch


def pad(rows: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (L_i, E) to (B, length, E) with zeros behind, and the mask (B, length) that is True where a token is."""
    tokens = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for k, row in enumerate(rows):
        tokens[k, : len(row)] = row
        mask[k, : len(row)] = True
    return tokens, mask
