"""Latent caches of any size with the shapes of real ones: written with random numbers, and read to measure how fast that is.

The shapes are those of 256-pixel photographs and CLIP-L text. This module imports little, since it measures its own memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dit.benchmark.results import markdown_table
from dit.config import VAE_FACTOR
from dit.encode.cache_writer import ShardBuffer, assemble_cache
from dit.errors import UserError
from dit.latents.cache import LatentCache, bytes_per_image

SIZE, CHANNELS, AUGMENTATIONS = 32, 4, 2  # latents of 256 pixels, the image and its mirror image
TEXT, POOLED = 768, 768  # openai/clip-vit-large-patch14
SHORTEST, LONGEST = 8, 20  # tokens of a COCO caption, beginning and end included: 12.5 on average
SHARD_IMAGES = 3072  # about 160 MB with one caption each
BATCH, BATCHES, WARM_UP = 96, 100, 10  # of reading; the first batches come from the disk and do not count


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
                _take(pool, rng, len(batch), AUGMENTATIONS, 2 * CHANNELS, SIZE, SIZE),
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


def benchmark_read(folder: Path, entries: int) -> dict[str, float]:
    """Write a cache of real shapes into `folder` and read it, each in a process of its own, so that its memory is its own."""
    started = time.perf_counter()
    peak = _in_new_process(_write_cache, folder, entries)
    seconds = time.perf_counter() - started
    return {"entries": entries, "write_seconds": seconds, "writer_peak_mb": peak} | _in_new_process(_read_cache, folder)


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _write_cache(folder: Path, entries: int) -> float:
    write_synthetic(folder, entries)
    return memory_mb("VmHWM")


def _read_cache(folder: Path) -> dict[str, float]:
    """Open a cache and read random batches."""
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    cache = LatentCache(folder)
    opened, after = time.perf_counter() - started, memory_mb("VmRSS")
    rng = np.random.default_rng(0)
    choice, mirrored = np.zeros(BATCH), np.zeros(BATCH, dtype=bool)
    seconds = peak = 0.0
    for number in range(WARM_UP + BATCHES):
        images = rng.integers(0, len(cache), BATCH)
        started = time.perf_counter()
        batch = cache.read(images, choice, mirrored)
        seconds += time.perf_counter() - started if number >= WARM_UP else 0.0
        peak = max(peak, memory_mb("VmRSS"))
    anonymous = memory_mb("RssAnon")
    size = sum(value.nbytes for value in vars(batch).values())
    source, target = torch.ones(40 * size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)  # too large for the caches
    started = time.perf_counter()
    for number in range(BATCHES):
        target.copy_(source[number % 40 * size :][:size])
    copied = time.perf_counter() - started
    stored, float32 = bytes_per_image(cache)
    return {
        "bytes_per_image": stored,
        "float32_bytes_per_image": float32,
        "open_seconds": opened,
        "before_mb": before,
        "after_mb": after,
        "peak_mb": peak,
        "anonymous_mb": anonymous,
        "images_per_second": BATCHES * BATCH / seconds,
        "bytes_per_second": BATCHES * size / seconds,
        "copy_bytes_per_second": BATCHES * size / copied,
    }


def read_table(rows: list[dict[str, float]]) -> str:
    """Return results of `benchmark_read` as a Markdown table."""
    columns: dict[str, Callable[[dict[str, float]], str]] = {
        "entries": lambda row: f"{row['entries']:,}",
        "written in": lambda row: f"{row['write_seconds']:.0f} s",
        "writer's peak memory": lambda row: f"{row['writer_peak_mb']:.0f} MB",
        "bytes per image": lambda row: f"{row['bytes_per_image']:,.0f}",
        "of float32, 77 tokens": lambda row: f"1/{row['float32_bytes_per_image'] / row['bytes_per_image']:.1f}",
        "opened in": lambda row: f"{row['open_seconds'] * 1e3:.0f} ms",
        "memory after opening": lambda row: (
            f"{row['after_mb']:.0f} MB, {row['after_mb'] - row['before_mb']:.0f} more than before"
        ),
        "peak while reading": lambda row: f"{row['peak_mb']:.0f} MB",
        "of which anonymous": lambda row: f"{row['anonymous_mb']:.0f} MB",
        f"batches of {BATCH}": lambda row: f"{row['bytes_per_second'] / 1e9:.2f} GB/s, {row['images_per_second']:,.0f} images/s",
        "of a plain copy": lambda row: (
            f"{row['bytes_per_second'] / row['copy_bytes_per_second']:.0%} of {row['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        ),
    }
    return markdown_table(list(columns), [[write(row) for write in columns.values()] for row in rows])


def memory_mb(kind: str) -> float:
    """Return this process's memory in MB: VmRSS now, VmHWM at most, RssAnon without mapped files.

    Raises:
        UserError: this is not Linux, which alone tells them apart.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("benchmark data read: the memory of a process is read from /proc/self/status, which only Linux has")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(kind)) / 1e3
