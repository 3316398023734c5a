"""Validation loss: the training loss on unseen images at fixed timesteps and fixed noise, so that runs compare."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator

from dit import diffusion
from dit.diffusion import Objective
from dit.latents import LatentCache, sample_posterior
from dit.model import DiT
from dit.training.batches import VALIDATION, generator

SEED = 20_000  # its own, so that runs of different train.seed are measured at the same noise


@torch.no_grad()
def validation_loss(
    model: DiT,
    cache: LatentCache,
    batch_size: int,
    objective: Objective,
    passes: int = 1,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    accelerator: Accelerator | None = None,
) -> float:
    """Mean loss over the validation images, at timesteps spread evenly over the objective's distribution.

    Args:
        model: any weights; used as they are.
        cache: where the validation images are.
        batch_size: images at once.
        objective: the path and the loss; of a flow with `logit_mean` 0, so that runs with another one compare.
        passes: how often each image is measured, each time at another timestep.
        limit: only so many validation images.
        autocast: makes the context in which the model runs.
        accelerator: of several processes, which then share the images; all return the same number.
    """
    device = next(model.parameters()).device
    images = cache.val[:limit]
    count = len(images)
    total = torch.zeros((), dtype=torch.float64, device=device)
    own = np.array_split(np.arange(count), accelerator.num_processes)[accelerator.process_index] if accelerator else range(count)
    for number in range(passes):
        source = generator(torch.device("cpu"), SEED, VALIDATION, number)
        noise = torch.randn(2, count, *cache.latent_shape, generator=source)
        # Stratified: quantile k of the distribution for image k, in an order that has nothing to do with the images'.
        quantiles = (torch.randperm(count, generator=source) + 0.5) / count
        timesteps = objective.timesteps(quantiles)
        for start in range(0, len(own), batch_size):
            rows = own[start : start + batch_size]
            rows = slice(rows[0], rows[-1] + 1)
            picked = images[rows]
            batch = cache.read(picked, np.zeros(len(picked)), np.zeros(len(picked), dtype=bool)).to(device)
            latents = sample_posterior(
                batch.moments, noise[0, rows].to(device), cache.index["vae_scaling"], cache.index["vae_shift"]
            )
            path_noise, t = noise[1, rows].to(device), timesteps[rows].to(device)
            with autocast():
                prediction = model(
                    objective.add_noise(latents, path_noise, t), t, batch.tokens.float(), batch.mask, batch.pooled.float()
                )
            total += diffusion.loss(objective, prediction, latents, path_noise, t).sum()
    if accelerator:
        total = accelerator.reduce(total)
    return total.item() / (count * passes)
