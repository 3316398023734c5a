"""What tests share: a small latent cache of random numbers, by the real writer; a miniature of the project that has been run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from dit.latents import LatentCache, assemble_cache
from dit.shards import ShardBuffer

MADE_BY = "the tests"
REPO = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DIT_SHARED", REPO.parent / "shared"))


def write_cache(
    folder: Path, images: int = 24, val: int = 6, shards: int = 2, size: int = 8, captions: int = 2, views: int = 2
) -> LatentCache:
    """A cache of random moments and text: `images` images of `views` views, with `captions` captions each, of 3 to 9 tokens."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    mean, log_variance = random(images, views, 4, size, size), torch.full((images, views, 4, size, size), -9.0)
    moments = torch.cat([mean, log_variance], dim=2)  # hardly any variance
    tokens = [random(3 + k % 7, 32) for k in range(images * captions)]
    pooled = random(images * captions, 16)
    sides = ["left" if (k // captions + k % captions) % 4 == 0 else "top" for k in range(images * captions)]
    rows = [
        {
            "image": f"images/{k // captions}.png",
            "text": f"caption {k % captions} of image {k // captions}, {sides[k]}",
            "split": "val" if k // captions < val else "train",
        }
        for k in range(images * captions)
    ]
    step = -(-images // shards)
    for number, start in enumerate(range(0, images, step)):
        end = min(start + step, images)
        own = slice(start * captions, end * captions)
        lengths, sided = [len(row) for row in tokens[own]], [side == "left" for side in sides[own]]
        buffer = ShardBuffer([i < val for i in range(start, end)], [captions] * (end - start), lengths, sided)
        buffer.add(moments[start:end], tokens[own], pooled[own])
        buffer.write(folder / "parts", number, rows[own], MADE_BY)
    source_record = {"name": "builtin", "revision": None, "resolved": None}
    about = {
        "made_by": MADE_BY,
        "image_size": 8 * size,
        "vae_scaling": 0.5,
        "vae_shift": 0.0,
        "vae": source_record,
        "clip": source_record,
        "val_images": val,
    }
    assemble_cache(folder / "parts", shards, folder, about, (random(2, 32), random(16)))
    shutil.rmtree(folder / "parts")
    return LatentCache(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> LatentCache:
    return write_cache(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder as the train stage writes it: a small transformer of random weights, for the encoders in the box."""
    from small_models import save  # which imports this file

    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return folder / "dit"


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A `Clone` in which the pipeline has been run and the run committed. Who changes it puts it back as it was."""
    from clones import Clone  # here, since it imports MLflow, which takes seconds that only these tests need

    clone = Clone(tmp_path_factory.mktemp("clone") / "project")
    clone.dvc("repro")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "first run")
    return clone
