"""Validation loss: the training loss on unseen images at fixed timesteps and fixed noise, so that runs compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from dit import diffusion
from dit.latents import LatentCache, sample_posterior
from dit.model import DiT
from dit.training.batches import VALIDATION, generator

SEED = 20_000  # its own, so that runs of different train.seed are measured at the same noise


@torch.no_grad()
def validation_loss(
    model: DiT,
    cache: LatentCache,
    batch_size: int,
    passes: int = 1,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> float:
    """Mean loss over the validation images, at timesteps spread evenly over the logit-normal distribution.

    Args:
        model: any weights; used as they are.
        cache: where the validation images are.
        batch_size: images at once.
        passes: how often each image is measured, each time at another timestep.
        limit: only so many validation images.
        autocast: makes the context in which the model runs.
    """
    device = next(model.parameters()).device
    images = cache.val[:limit]
    count = len(images)
    total = 0.0
    for number in range(passes):
        source = generator(torch.device("cpu"), SEED, VALIDATION, number)
        noise = torch.randn(2, count, *cache.latent_shape, generator=source)
        # Stratified: quantile k of the distribution for image k, in an order that has nothing to do with the images'.
        quantiles = (torch.randperm(count, generator=source) + 0.5) / count
        timesteps = torch.sigmoid(torch.special.ndtri(quantiles))
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            picked = images[rows]
            batch = cache.read(picked, np.zeros(len(picked)), np.zeros(len(picked), dtype=bool)).to(device)
            latents = sample_posterior(
                batch.moments, noise[0, rows].to(device), cache.index["vae_scaling"], cache.index["vae_shift"]
            )
            path_noise, t = noise[1, rows].to(device), timesteps[rows].to(device)
            with autocast():
                prediction = model(
                    diffusion.add_noise(latents, path_noise, t), t, batch.tokens.float(), batch.mask, batch.pooled.float()
                )
            total += diffusion.loss(prediction, latents, path_noise).sum().item()
    return total / (count * passes)
