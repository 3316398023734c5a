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

from dit.dataset.aspect_ratios import Size, nearest_size
from dit.dataset.decode import open_named
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.utils.hardware import limit_workers

CROP_AREA = (0.5, 1.0)  # of the largest part of the image that has the shape


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the largest part of an image that has the shape of `size`, from its middle, resized (Lanczos) to that."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def random_crop(image: Image.Image, size: Size, name: str, number: int) -> Image.Image:
    """Return crop `number` (1, 2, …) of the image `name`: of random extent and place, the same on every machine.

    Like the random-resized crop of Szegedy et al. 2015 (arXiv:1409.4842), but always of the shape of `size`, so that nothing is
    distorted.
    """
    seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:8])
    area, across, down = np.random.default_rng(seed).random(3)
    share = (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0])) ** 0.5
    width = min(image.width, image.height * size[0] / size[1]) * share
    height = min(image.height, image.width * size[1] / size[0]) * share
    left, top = across * (image.width - width), down * (image.height - height)
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))


def load_crops(
    raw: Path,
    batches: Sequence[list[tuple[str, str]]],
    sizes: list[Size],
    crops: int = 0,
    workers: int = 0,
    prefetch: int = 2,
    batch_size: int = 1,
) -> Iterator[tuple[torch.Tensor, list[str], list[Size]]]:
    """Load batches of images, decoded by up to `workers` processes (no more than there are cores), each `prefetch` ahead.

    Args:
        raw: the data set's folder.
        batches: of each image of each batch, its name and where in `raw` it is stored.
        sizes: what images are cropped and resized to: each to the one that least is cut off for, which all of a batch share.
        crops: how many random crops there are of each image, beside the central one.
        workers: most processes; 0 decodes in this one.
        prefetch: batches that each process decodes ahead.
        batch_size: images in the largest batch, where that is not the first.

    Yields:
        pixels (B, 1 + crops, H, W, 3) uint8, the SHA-256 of each image file, and the size of each image in it.

    Raises:
        UserError: an image cannot be read.
    """
    workers = max(0, min(workers, os.cpu_count() or 1, len(batches) - 1))
    if workers:
        area = max(width * height for width, height in sizes)
        largest = max(batch_size, len(batches[0])) * (1 + crops) * area * 3  # bytes
        workers, prefetch = limit_workers(workers, prefetch, largest)
    for item in DataLoader(
        CropBatches(raw, batches, sizes, crops),
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

    def __init__(self, raw: Path, batches: Sequence[list[tuple[str, str]]], sizes: list[Size], crops: int):
        self.images, self.batches, self.sizes, self.crops = StoredImages(raw), batches, sizes, crops

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, list[str], list[Size]] | str:
        pixels, digests, found = [], [], []
        for name, stored in self.batches[k]:
            try:
                content = self.images.read(stored)
                image = open_named(content, self.images.folder / stored)
                size = self.sizes[nearest_size(image.size, self.sizes)]
                parts = [center_crop(image, size)]
                parts += [random_crop(image, size, name, number) for number in range(1, self.crops + 1)]
            except UserError as error:
                return str(error)
            pixels.append(np.stack([np.asarray(part) for part in parts]))
            digests.append(hashlib.sha256(content).hexdigest())
            found.append(image.size)
        return torch.from_numpy(np.stack(pixels)), digests, found
