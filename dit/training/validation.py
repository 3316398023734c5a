"""Validation loss at fixed timesteps and fixed noise, so that runs compare, and the preview images of a training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from dit.latents.cache import Batch, LatentCache, sample_posterior
from dit.model.loss import diffusion_loss
from dit.model.objectives import Objective, apply_cfg, euler_sample
from dit.model.transformer import DiT
from dit.utils.images import grid
from dit.utils.random import seeded_generator

VALIDATION = 3  # the stream of random numbers, beside those of data.py
NOISE_SEED = 20_000  # its own, so that runs of different train.seed are measured at the same noise
PREVIEW_SEED, PREVIEW_STEPS, PREVIEW_GUIDANCE = 30_000, 20, 3.0

Autocast = Callable[[], AbstractContextManager]


def read_first(cache: LatentCache, images: np.ndarray) -> Batch:
    """Read `images` (numbers) as they are: the center crop, not mirrored, with the first caption."""
    return cache.read(images, np.zeros(len(images)), np.zeros(len(images), dtype=bool))


@torch.no_grad()
def validation_losses(
    model: DiT,
    cache: LatentCache,
    objective: Objective,
    batch_size: int,
    passes: int = 1,
    limit: int | None = None,
    rows: np.ndarray | None = None,
    timestep: float | None = None,
    autocast: Autocast = nullcontext,
    progress: tqdm | None = None,
) -> np.ndarray:
    """Measure the loss of the validation images: (passes, N) float64.

    Timesteps are stratified: quantile k of the objective's distribution for image k, in a random order.

    Args:
        model: any weights; used as they are.
        cache: where the validation images are.
        objective: the path and the loss; of a flow with `logit_mean` 0, so that runs with another one compare.
        batch_size: images at once.
        passes: how often each image is measured, each time at other noise and another timestep.
        limit: use only about so many validation images, as many of each bucket as its share is.
        rows: which of them to measure, consecutive numbers from 0; noise and timesteps do not depend on it. None for all.
        timestep: one for all images instead, in (0, 1); the noise stays the same.
        autocast: makes the context in which the model runs.
        progress: a tqdm bar that counts images.
    """

    def network(*inputs: torch.Tensor) -> torch.Tensor:
        with autocast():
            return model(*inputs)

    device = next(model.parameters()).device
    buckets = cache.first_val(limit)
    images, ends = np.concatenate(buckets), np.cumsum([len(bucket) for bucket in buckets])
    count = len(images)
    rows = np.arange(count) if rows is None else rows
    batches = [
        part for of in _by_bucket(rows, ends) for part in np.split(of, range(batch_size, len(of), batch_size)) if len(part)
    ]
    losses = np.empty((passes, len(rows)))
    for number in range(passes):
        source = seeded_generator(torch.device("cpu"), NOISE_SEED, VALIDATION, number)
        shapes = zip(buckets, cache.latent_shapes, strict=True)
        noise = [row for of, shape in shapes for row in torch.randn(2, len(of), *shape, generator=source).unbind(1)]
        timesteps = objective.timesteps((torch.randperm(count, generator=source) + 0.5) / count)
        if timestep is not None:
            timesteps = torch.full_like(timesteps, timestep)
        start = 0
        for own in batches:
            batch = read_first(cache, images[own]).to(device)
            posterior_noise, path_noise = torch.stack([noise[k] for k in own], dim=1).to(device)
            t = timesteps[own].to(device)
            latents = sample_posterior(batch.moments, posterior_noise, *cache.scaling_and_shift(posterior_noise.device))
            loss = diffusion_loss(network, objective, latents, path_noise, t, batch.tokens, batch.mask, batch.pooled)
            losses[number, start : start + len(own)] = loss.cpu().numpy()
            start += len(own)
            if progress is not None:
                progress.update(len(own))
    return losses


def _by_bucket(rows: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Divide `rows`, which rise, into those of each bucket; `ends` are the first row after each."""
    return np.split(rows, np.searchsorted(rows, ends[:-1]))


def validation_loss(
    model: DiT,
    cache: LatentCache,
    objective: Objective,
    batch_size: int,
    limit: int,
    accelerator: Accelerator,
    sharded: bool = False,
) -> float:
    """Return the mean of `validation_losses` in one pass; all processes share the images and return the same number.

    Where the weights are divided, each process measures all images: to gather weights takes all of them, in equally many batches.
    """
    count = sum(map(len, cache.first_val(limit)))
    shares, own = (1, 0) if sharded else (accelerator.num_processes, accelerator.process_index)
    rows = np.array_split(np.arange(count), shares)[own]
    losses = validation_losses(model, cache, objective, batch_size, limit=limit, rows=rows, autocast=accelerator.autocast)
    total = torch.tensor(losses.sum(), dtype=torch.float64, device=accelerator.device)
    return (total if sharded else accelerator.reduce(total)).item() / count


@torch.no_grad()
def sample_preview(
    model: DiT,
    cache: LatentCache,
    objective: Objective,
    count: int,
    decode: Callable[[torch.Tensor], list[Image.Image]],
    autocast: Autocast = nullcontext,
) -> Image.Image:
    """Sample a grid of images for the first `count` validation captions, by a short Euler loop.

    The noise is the same at every step and in every run. Neither the pipeline nor a scheduler is used: editing them must not
    train again.

    Args:
        model: any weights; used as they are.
        cache: where the captions are.
        objective: whose path is followed.
        count: at most so many images.
        decode: turns latents (N, C, H, W) as the diffusion model sees them into RGB images.
        autocast: makes the context in which the model runs.
    """
    device = next(model.parameters()).device
    bucket = int(np.argmax([len(images) for images in cache.val_buckets]))  # a sheet has images of one size
    images = cache.val_buckets[bucket][:count]
    count = len(images)
    batch, empty = read_first(cache, images).to(device), cache.read_empty(count).to(device)
    tokens = torch.cat([batch.tokens, empty.tokens]).float()
    mask = torch.cat([batch.mask, empty.mask])
    pooled = torch.cat([batch.pooled, empty.pooled]).float()
    with autocast():
        keys_values = model.text_keys_values(tokens)

    def predict(latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with autocast():
            both = model(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), None, mask, pooled, keys_values)
        conditional, unconditional = both.chunk(2)
        return apply_cfg(conditional, unconditional, PREVIEW_GUIDANCE)

    source = seeded_generator(torch.device("cpu"), PREVIEW_SEED, VALIDATION)
    noise = torch.randn(count, *cache.latent_shapes[bucket], generator=source).to(device)
    samples = decode(euler_sample(objective, predict, noise, PREVIEW_STEPS))
    return grid(samples, columns=8, scale=max(1, 128 // samples[0].width))
