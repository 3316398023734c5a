"""What a training step works on, as a pure function of (seed, step): no generator state drifts from step to step.

The idea is NVlabs/edm2's: reseed from counters at every step, so that a run can stop and go on anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dit.diffusion import Objective
from dit.latents import Batch, LatentCache

# One number per independent use of chance, so that adding one never shifts another.
ORDER, CHOICES, NOISE, VALIDATION = range(4)


@dataclass(frozen=True)
class Draw:
    """The chance in one step, for a batch of B: posterior and path noise (B, C, H, W), timesteps and drops (B,)."""

    posterior_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    dropped: torch.Tensor

    def part(self, rows: slice) -> Draw:
        return Draw(*(value[rows] for value in vars(self).values()))


def generator(device: torch.device, *counters: int) -> torch.Generator:
    """A fresh generator for these counters, e.g. (seed, NOISE, step)."""
    seed = int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def global_batch(images: np.ndarray, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Numbers of the images of step `step`, (batch_size,): a window on an endless row of shuffled epochs."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // len(images)
    chosen = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, ORDER, int(epoch)]).permutation(images)
        chosen[epochs == epoch] = order[positions[epochs == epoch] % len(images)]
    return chosen


def read_step(cache: LatentCache, seed: int, step: int, batch_size: int, flip: bool, rows: slice) -> Batch:
    """Rows `rows` of step `step`'s global batch, from the training images, each with one of its captions and crops."""
    chance = np.random.default_rng([seed, CHOICES, step]).random((3, batch_size))
    images = global_batch(cache.train, seed, step, batch_size)
    return cache.read(images[rows], chance[0, rows], (chance[1, rows] < 0.5) & flip, chance[2, rows])


def draw_step(
    shape: tuple[int, int, int], seed: int, step: int, batch_size: int, dropout: float, objective: Objective, device: torch.device
) -> Draw:
    """Step `step`'s chance for the whole global batch; `shape` is (C, H, W)."""
    source = generator(device, seed, NOISE, step)
    return Draw(
        posterior_noise=torch.randn(batch_size, *shape, generator=source, device=device),
        noise=torch.randn(batch_size, *shape, generator=source, device=device),
        timesteps=objective.timesteps(torch.rand(batch_size, generator=source, device=device)),
        dropped=torch.rand(batch_size, generator=source, device=device) < dropout,
    )


def drop_captions(batch: Batch, dropped: torch.Tensor, empty: Batch) -> Batch:
    """Put the caption "" where `dropped` (B,) is True; `empty` is one row of it."""
    return Batch(
        batch.moments,
        torch.where(dropped[:, None, None], empty.tokens, batch.tokens),
        torch.where(dropped[:, None], empty.mask, batch.mask),
        torch.where(dropped[:, None], empty.pooled, batch.pooled),
    )
