"""A small latent cache of random numbers, by the real writer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from dit.encode.cache_writer import ShardBuffer, assemble_cache
from dit.latents.cache import LatentCache

FINGERPRINT = "the tests"


def write_cache(
    folder: Path,
    images: int = 24,
    val: int = 6,
    shards: int = 2,
    size: int = 8,
    captions: int = 2,
    augmentations: int = 2,
    channels: int = 4,
    fingerprint: str = FINGERPRINT,
    text_sizes: tuple[int, int] = (32, 16),
    shapes: Sequence[tuple[int, int]] = (),
) -> LatentCache:
    """A cache of random moments and text: images with so many augmentations and captions each, of 3 to 9 tokens.

    With `shapes`, of which there is one for each shard, its latents are the corners, of that height and width, of latents of
    `size`, and the images for validation are spread over all shards.
    """
    held_out = set(range(0, images, images // val)) if shapes else set(range(val))
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    mean = random(images, augmentations, channels, size, size)
    moments = torch.cat([mean, torch.full_like(mean, -9.0)], dim=2)  # hardly any variance
    tokens = [random(3 + k % 7, text_sizes[0]) for k in range(images * captions)]
    pooled = random(images * captions, text_sizes[1])
    sides = ["left" if (k // captions + k % captions) % 4 == 0 else "top" for k in range(images * captions)]
    rows = [
        {
            "image": f"images/{k // captions}.png",
            "text": f"caption {k % captions} of image {k // captions}, {sides[k]}",
            "split": "val" if k // captions in held_out else "train",
        }
        for k in range(images * captions)
    ]
    step = -(-images // shards)
    for number, start in enumerate(range(0, images, step)):
        end = min(start + step, images)
        own = slice(start * captions, end * captions)
        lengths, no_flip = [len(row) for row in tokens[own]], [side == "left" for side in sides[own]]
        height, width = shapes[number] if shapes else (size, size)
        buffer = ShardBuffer([i in held_out for i in range(start, end)], [captions] * (end - start), lengths, no_flip)
        buffer.add(moments[start:end, :, :, :height, :width], tokens[own], pooled[own])
        buffer.write(folder / "parts", number, rows[own], fingerprint)
    source_record = {"name": "builtin", "revision": None, "resolved": None}
    about = {
        "fingerprint": fingerprint,
        "image_size": 8 * size,
        "vae_scaling": 0.5,
        "vae_shift": 0.0,
        "vae": source_record,
        "clip": source_record,
        "val_images": val,
    }
    if shapes:
        about["sizes"] = [(8 * width, 8 * height) for height, width in dict.fromkeys(shapes)]
    assemble_cache(folder / "parts", shards, folder, about, (random(2, text_sizes[0]), random(text_sizes[1])))
    shutil.rmtree(folder / "parts")
    return LatentCache(folder)
