"""How the batches of the steps come to the device: from its own memory, from worker processes, or read when they are due."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from dit.config import Runtime
from dit.latents import Batch, LatentCache
from dit.resident import ResidentCache, fits
from dit.training.batches import read_step


class Steps(Dataset):
    """Batch `number` of a training: step `number // len(parts)`, rows `parts[number % len(parts)]` of its global batch."""

    def __init__(self, cache: LatentCache | ResidentCache, seed: int, batch_size: int, flip: bool, parts: list[slice]):
        self.cache, self.seed, self.batch_size, self.flip, self.parts = cache, seed, batch_size, flip, parts

    def __getitem__(self, number: int) -> Batch:
        step, part = divmod(number, len(self.parts))
        return read_step(self.cache, self.seed, step, self.batch_size, self.flip, self.parts[part])


def load_batches(steps: Steps, first: int, last: int, device: torch.device, runtime: Runtime) -> Iterator[Batch]:
    """The batches of steps `first` to `last` - 1, in order, on `device`."""
    numbers = range(first * len(steps.parts), last * len(steps.parts))
    wanted = runtime.data_on_device
    if wanted is True or (wanted == "auto" and fits(steps.cache, device)):
        steps = Steps(ResidentCache(steps.cache, device), steps.seed, steps.batch_size, steps.flip, steps.parts)
        return (steps[number] for number in numbers)
    if device.type == "cpu" or runtime.num_workers == 0:  # workers would take the cores that train
        return (steps[number].to(device) for number in numbers)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=numbers,
        num_workers=runtime.num_workers,
        prefetch_factor=runtime.prefetch_factor,
        pin_memory=True,
        multiprocessing_context="fork",  # nothing of it uses the GPU; a worker that starts anew would load torch for seconds
    )
    return (batch.to(device) for batch in loader)
