"""Crop images, and load crops of a data set's images in worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from dit.dataset.decode import open_named
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.utils.hardware import limit_workers

CROP_AREA = (0.5, 1.0)  # of the largest square in the image


def center_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Return the central square of an image, resized (Lanczos) to `image_size`."""
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)


def random_crop(image: Image.Image, image_size: int, name: str, number: int) -> Image.Image:
    """Return crop `number` (1, 2, …) of the image `name`: a square of random size and place, the same on every machine.

    Like the random-resized crop of Szegedy et al. 2015 (arXiv:1409.4842), but always square, so that nothing is distorted.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:8])
    area, across, down = np.random.default_rng(seed).random(3)
    side = min(image.size) * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])) ** 0.5
    left, top = across * (image.width - side), down * (image.height - side)
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), Image.Resampling.LANCZOS, box=box)


def load_crops(
    raw: Path, batches: Sequence[list[tuple[str, str]]], image_size: int, crops: int = 0, workers: int = 0, prefetch: int = 2
) -> Iterator[tuple[torch.Tensor, list[str], list[int]]]:
    """Load batches of images, decoded by up to `workers` processes (no more than there are cores), each `prefetch` ahead.

    Args:
        raw: the data set's folder.
        batches: of each image of each batch, its name and where in `raw` it is stored; the first is as large as any.
        image_size: side of the squares.
        crops: how many random crops there are of each image, beside the central one.
        workers: most processes; 0 decodes in this one.
        prefetch: batches that each process decodes ahead.

    Yields:
        pixels (B, 1 + crops, H, W, 3) uint8, the SHA-256 of each image file, and the shorter side of each image.

    Raises:
        UserError: an image cannot be read.
    """
    workers = max(0, min(workers, os.cpu_count() or 1, len(batches) - 1))
    if workers:
        largest = len(batches[0]) * (1 + crops) * image_size**2 * 3  # bytes; only the last of a shard is smaller
        workers, prefetch = limit_workers(workers, prefetch, largest)
    for item in DataLoader(
        CropBatches(raw, batches, image_size, crops),
        batch_size=None,
        pin_memory=torch.cuda.is_available(),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
    ):
        if isinstance(item, str):
            raise UserError(item)
        yield item


class CropBatches(Dataset):
    """The batches of `load_crops`, by number; a worker process gets a pickled copy.

    An item is a text instead where an image cannot be read: an exception would reach the main process with the worker's
    stack trace in it.
    """

    def __init__(self, raw: Path, batches: Sequence[list[tuple[str, str]]], image_size: int, crops: int):
        self.images, self.batches, self.image_size, self.crops = StoredImages(raw), batches, image_size, crops

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, list[str], list[int]] | str:
        pixels, digests, sides = [], [], []
        for name, stored in self.batches[k]:
            try:
                content = self.images.read(stored)
                image = open_named(content, self.images.folder / stored)
                squares = [center_crop(image, self.image_size)]
                squares += [random_crop(image, self.image_size, name, number) for number in range(1, self.crops + 1)]
            except UserError as error:
                return str(error)
            pixels.append(np.stack([np.asarray(square) for square in squares]))
            digests.append(hashlib.sha256(content).hexdigest())
            sides.append(min(image.size))
        return torch.from_numpy(np.stack(pixels)), digests, sides
