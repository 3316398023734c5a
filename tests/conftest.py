"""What tests share: a small latent cache of random numbers, written by the real writer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dit.latents import CacheWriter, LatentCache

REPO = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DIT_SHARED", REPO.parent / "shared"))


def write_cache(folder: Path, images: int = 24, val: int = 6, shards: int = 2, size: int = 8, captions: int = 2) -> LatentCache:
    """A cache of random moments and text: `images` images with `captions` captions each, of 3 to 9 tokens."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    writer = CacheWriter(folder)
    rows = []
    for i in range(images):
        texts = []
        moments = torch.cat([random(2, 4, size, size), torch.full((2, 4, size, size), -9.0)], dim=1)  # hardly any variance
        for c in range(captions):
            side = "left" if (i + c) % 4 == 0 else "top"
            length = 3 + (i * captions + c) % 7
            texts.append((f"caption {c} of image {i}, {side}", random(length, 32), random(16), side == "left"))
        rows.append({"image": f"images/{i}.png", "val": i < val, "moments": moments, "captions": texts})
    step = -(-images // shards)
    for start in range(0, images, step):
        writer.add_shard(rows[start : start + step])
    source_record = {"name": "builtin", "revision": None, "resolved": None}
    writer.close(
        {
            "image_size": 8 * size,
            "vae_scaling": 0.5,
            "vae_shift": 0.0,
            "vae": source_record,
            "clip": source_record,
            "val_images": val,
        },
        (random(2, 32), random(16)),
    )
    return LatentCache(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> LatentCache:
    return write_cache(tmp_path_factory.mktemp("latents"))
