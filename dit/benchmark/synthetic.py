"""Latent caches of any size with the shapes of real ones: 256-pixel photographs, CLIP-L text, random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit.config import VAE_FACTOR
from dit.encode.cache_writer import ShardBuffer, assemble_cache

SIZE, CHANNELS, VIEWS = 32, 4, 2  # latents of 256 pixels, the image and its mirror image
TEXT, POOLED = 768, 768  # openai/clip-vit-large-patch14
SHORTEST, LONGEST = 8, 20  # tokens of a COCO caption, beginning and end included: 12.5 on average
SHARD_IMAGES = 3072  # about 160 MB with one caption each


def write_synthetic(folder: Path, images: int, captions: int = 1, longest: int = LONGEST) -> None:
    """Write a cache of random numbers into `folder`.

    Args:
        folder: where it goes.
        images: their number; one of twenty is for validation.
        captions: of each image.
        longest: length of the longest caption, in tokens.
    """
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.standard_normal(2**22, dtype=np.float32)).half()  # sampling 4 GB anew would be what is measured
    parts = folder / "parts"
    count = -(-images // SHARD_IMAGES)
    for number in tqdm(range(count), desc=f"write {images}", unit="shard", delay=2):
        own = range(number * SHARD_IMAGES, min((number + 1) * SHARD_IMAGES, images))
        lengths = rng.integers(SHORTEST, longest, len(own) * captions, endpoint=True).tolist()
        lengths[0] = longest
        buffer = ShardBuffer([i % 20 == 0 for i in own], [captions] * len(own), lengths, [False] * len(lengths))
        for start in range(0, len(own), 64):
            batch = own[start : start + 64]
            texts = lengths[start * captions : (start + len(batch)) * captions]
            buffer.add(
                _take(pool, rng, len(batch), VIEWS, 2 * CHANNELS, SIZE, SIZE),
                [_take(pool, rng, length, TEXT) for length in texts],
                _take(pool, rng, len(texts), POOLED),
            )
        rows = [
            {"image": f"images/{i:012d}.jpg", "text": f"caption {c} of {i}", "split": "val" if i % 20 == 0 else "train"}
            for i in own
            for c in range(captions)
        ]
        buffer.write(parts, number, rows, "synthetic")
    about = {
        "fingerprint": "synthetic",
        "image_size": VAE_FACTOR * SIZE,
        "vae": {"name": "synthetic", "revision": None, "resolved": None},
        "clip": {"name": "synthetic", "revision": None, "resolved": None},
        "vae_scaling": 0.18215,
        "vae_shift": 0.0,
    }
    assemble_cache(parts, count, folder, about, (_take(pool, rng, 2, TEXT), _take(pool, rng, POOLED)))
    shutil.rmtree(parts)


def _take(pool: torch.Tensor, rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Return random numbers of this shape: a random part of the pool."""
    count = int(np.prod(shape))
    start = int(rng.integers(0, len(pool) - count))
    return pool[start : start + count].view(shape)
