"""What a training step sees, as a pure function of (seed, step), and how its batches reach the device.

No generator state drifts from step to step: as in NVlabs/edm2, everything is reseeded from counters, so that a run can stop
and resume anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dit.config import Runtime
from dit.errors import memory_errors
from dit.latents.cache import Batch, LatentCache
from dit.latents.device_cache import DeviceLatentCache, fits_on_device
from dit.model.objectives import Objective
from dit.utils.hardware import limit_workers
from dit.utils.random import seeded_generator

# One stream per independent use of randomness, so that adding one never shifts another; validation.py has stream 3.
ORDER, CHOICES, NOISE = range(3)
BUCKETS = 4


@dataclass(frozen=True)
class StepNoise:
    """The randomness of one step, for a batch of B: posterior and path noise (B, C, H, W), timesteps and dropped (B,)."""

    posterior_noise: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    dropped: torch.Tensor

    def __getitem__(self, rows: slice) -> StepNoise:
        """Return the part that belongs to some rows of the batch."""
        return StepNoise(*(value[rows] for value in vars(self).values()))


def global_batch(images: np.ndarray, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Return the numbers of the images of step `step` of a bucket, (batch_size,).

    They are a section of an endless sequence of shuffled epochs.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // len(images)
    chosen = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, ORDER, int(epoch)]).permutation(images)
        chosen[epochs == epoch] = order[positions[epochs == epoch] % len(images)]
    return chosen


def choose_bucket(counts: Sequence[int], seed: int, step: int, batch_size: int) -> tuple[int, int]:
    """Return which bucket the batch of step `step` is of, and how many batches that bucket has had before.

    In each epoch a bucket has as many batches as its images fill, what is left over counting for the next epoch, and the batches
    of all buckets come in a random order.

    Args:
        counts: of each bucket, how many training images it has.
        seed, step, batch_size: as of `global_batch`, which then chooses among the bucket's images.
    """
    sizes = np.array(counts)
    epoch = step * batch_size // int(sizes.sum())
    while ((epoch + 1) * sizes // batch_size).sum() <= step:  # the rests that wait make it later by a few batches
        epoch += 1
    before = epoch * sizes // batch_size
    batches = np.repeat(np.arange(len(sizes)), (epoch + 1) * sizes // batch_size - before)
    order = np.random.default_rng([seed, BUCKETS, epoch]).permutation(batches)
    position = step - int(before.sum())
    bucket = int(order[position])
    return bucket, int(before[bucket]) + int((order[:position] == bucket).sum())


def read_batch(cache: LatentCache | DeviceLatentCache, seed: int, step: int, batch_size: int, flip: bool, rows: slice) -> Batch:
    """Read rows `rows` of the global batch of step `step`: training images, each with one of its captions and crops."""
    random = np.random.default_rng([seed, CHOICES, step]).random((3, batch_size))
    bucket, number = choose_bucket([len(images) for images in cache.train_buckets], seed, step, batch_size)
    images = global_batch(cache.train_buckets[bucket], seed, number, batch_size)
    return cache.read(images[rows], random[0, rows], (random[1, rows] < 0.5) & flip, random[2, rows])


def sample_step_noise(
    latent_shape: tuple[int, int, int],
    seed: int,
    step: int,
    batch_size: int,
    dropout: float,
    objective: Objective,
    device: torch.device,
) -> StepNoise:
    """Sample the randomness of step `step` for the whole global batch; `latent_shape` is (C, H, W)."""
    source = seeded_generator(device, seed, NOISE, step)
    return StepNoise(
        posterior_noise=torch.randn(batch_size, *latent_shape, generator=source, device=device),
        noise=torch.randn(batch_size, *latent_shape, generator=source, device=device),
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


def rank_slices(batch_size: int, accumulation_steps: int, processes: int, rank: int) -> list[slice]:
    """Return the rows of the global batch that process `rank` of `processes` works on, for each micro-batch of a step."""
    own = np.array_split(np.arange(batch_size), processes)[rank]
    starts = range(0, batch_size * accumulation_steps, batch_size)
    return [slice(start + int(own[0]), start + int(own[-1]) + 1) for start in starts]


class StepBatches(Dataset):
    """The micro-batches of all steps: item `number` is micro-batch `number % M` of step `number // M`, of M in a step."""

    def __init__(self, cache: LatentCache | DeviceLatentCache, seed: int, batch_size: int, flip: bool, slices: list[slice]):
        self.cache, self.seed, self.batch_size, self.flip, self.slices = cache, seed, batch_size, flip, slices

    def __getitem__(self, number: int) -> Batch:
        step, micro_batch = divmod(number, len(self.slices))
        return read_batch(self.cache, self.seed, step, self.batch_size, self.flip, self.slices[micro_batch])


def load_batches(batches: StepBatches, first: int, last: int, device: torch.device, runtime: Runtime) -> Iterator[Batch]:
    """Yield the micro-batches of steps `first` to `last` - 1, in order, on `device`."""
    numbers = range(first * len(batches.slices), last * len(batches.slices))
    wanted, cache = runtime.data_on_device, batches.cache
    if isinstance(cache, LatentCache) and (wanted is True or (wanted == "auto" and fits_on_device(cache, device))):
        on_device = DeviceLatentCache(cache, device)
        batches = StepBatches(on_device, batches.seed, batches.batch_size, batches.flip, batches.slices)
        return (batches[number] for number in numbers)
    workers, prefetch = 0, runtime.prefetch_factor
    if device.type != "cpu" and runtime.num_workers:  # on a CPU, workers would take the cores that train
        batch_bytes = sum(tensor.nbytes for tensor in vars(batches[numbers[0]]).values())
        workers, prefetch = limit_workers(runtime.num_workers, prefetch, batch_bytes)
    if workers == 0:
        return (batches[number].to(device) for number in numbers)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=True,
    )
    return (batch.to(device) for batch in _loaded(loader))


def _loaded(loader: DataLoader) -> Iterator[Batch]:
    """Yield the batches of `loader`; raise a `UserError` where the system ends a worker, since memory runs out."""
    with memory_errors():
        yield from loader
