"""The picture of how training goes: validation captions drawn by a short Euler loop from fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from PIL import Image

from dit import diffusion
from dit.diffusion import Objective
from dit.images import grid
from dit.latents import LatentCache
from dit.model import DiT
from dit.training.batches import VALIDATION, generator

STEPS = 20
GUIDANCE_SCALE = 3.0
SEED = 30_000


@torch.no_grad()
def draw_preview(
    model: DiT,
    cache: LatentCache,
    objective: Objective,
    count: int,
    decode: Callable[[torch.Tensor], list[Image.Image]],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Image.Image:
    """A grid of the first `count` validation captions; the noise is the same at every step and in every run."""
    device = next(model.parameters()).device
    images = cache.val[:count]
    count = len(images)
    batch = cache.read(images, np.zeros(count), np.zeros(count, dtype=bool)).to(device)
    empty = cache.read_empty(count).to(device)
    tokens = torch.cat([batch.tokens, empty.tokens]).float()
    mask = torch.cat([batch.mask, empty.mask])
    pooled = torch.cat([batch.pooled, empty.pooled]).float()
    with autocast():
        keys_values = model.text_keys_values(tokens)

    def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with autocast():
            both = model(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), None, mask, pooled, keys_values)
        return diffusion.guide(*both.chunk(2), GUIDANCE_SCALE)

    noise = torch.randn(count, *cache.latent_shape, generator=generator(torch.device("cpu"), SEED, VALIDATION)).to(device)
    pictures = decode(diffusion.integrate(objective, predict, noise, STEPS))
    return grid(pictures, columns=8, scale=max(1, 128 // pictures[0].width))
