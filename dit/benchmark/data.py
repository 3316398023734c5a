"""How fast data is downloaded, encoded and read, each beside its limit, which is measured in the same run.

For encoding the limit is the bare encoders on images that are decoded already, for reading a plain copy in memory.
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit.benchmark.results import default_device, device_name, markdown_table
from dit.benchmark.synthetic import write_synthetic
from dit.config import Params
from dit.dataset.image_io import load_crops
from dit.dataset.reader import by_image, read_metadata
from dit.encode.encode import Encoder, plan_shards
from dit.encode.moments import encode_moments
from dit.encoders.loading import BUILTIN, PRECISIONS, EncoderSource, load_vae
from dit.encoders.text import TextEncoder
from dit.errors import UserError
from dit.latents.cache import LatentCache, bytes_per_image
from dit.sources.http import Downloader
from dit.sources.writer import DatasetWriter, Report

PHOTOGRAPH = (640, 480)
CAPTION = "a red circle to the left of a small blue star on a white background"
ENCODED = 4  # images in a batch of the encode stage
BATCH, BATCHES, WARM_UP = 96, 100, 10  # of reading; the first batches come from the disk and do not count


def synthetic_photographs(count: int) -> list[bytes]:
    """Make JPEG files about as large and as hard to decode as COCO's."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        content = io.BytesIO()
        coarse.save(content, "JPEG", quality=85)
        files.append(content.getvalue())
    return files


def benchmark_download(folder: Path, count: int, connections: int) -> dict[str, Any]:
    """Download `count` photographs from a plain file server on the same machine, which has to share its cores.

    Raises:
        UserError: a download failed.
    """
    served = folder / "served"
    served.mkdir()
    files = synthetic_photographs(count)
    for k, content in enumerate(files):
        (served / f"{k}.jpg").write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--protocol", "HTTP/1.1"]
    server = subprocess.Popen(command, cwd=served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    downloader = Downloader("benchmark")
    time.sleep(2)
    try:
        started = time.perf_counter()
        with ThreadPoolExecutor(connections) as pool:
            problems = list(pool.map(lambda k: downloader.cached(f"http://127.0.0.1:{port}/{k}.jpg")[1], range(count)))
        seconds = time.perf_counter() - started
    finally:
        server.kill()
        server.wait()
    if any(problems):
        raise UserError(f"download: {next(filter(None, problems))}")
    size = sum(map(len, files))
    return {
        "connections": connections,
        "bytes_per_image": size / count,
        "images_per_second": count / seconds,
        "bytes_per_second": size / seconds,
    }


def download_table(row: dict[str, Any]) -> str:
    """Return the result of `benchmark_download` as a Markdown table."""
    name = f"{row['connections']} connections, {row['bytes_per_image'] / 1e3:.0f} kB per image"
    cells = (name, f"{row['images_per_second']:.0f}", f"{row['bytes_per_second'] / 1e6:.0f}")
    return markdown_table(("download over loopback", "images/s", "MB/s"), [cells])


def benchmark_encode(folder: Path, count: int, params: Params) -> dict[str, Any]:
    """Compare the encode stage with the two encoders alone; both of the real ones' shapes, with random weights, in bf16."""
    raw = folder / "raw"
    writer = DatasetWriter(raw, replace(params.folder.data, layout="files"), count)
    for k, content in enumerate(synthetic_photographs(count)):
        writer.add(f"images/{k}.jpg", content, [CAPTION])
    writer.close(Report())
    write_encoders(folder)
    settings = replace(params.coco.encode, batch_size=ENCODED, vae=str(folder / "vae"), clip=str(folder / "clip"))
    device, dtype = default_device(), PRECISIONS[settings.precision]
    vae, _ = load_vae(EncoderSource(settings.vae), dtype, device)
    encoder = Encoder(vae, TextEncoder(EncoderSource(settings.clip), dtype, device), settings, "benchmark", raw, params.runtime)
    images = by_image(read_metadata(raw))
    stored = [(rows[0].image, rows[0].stored) for rows in images]
    batches = [stored[start : start + ENCODED] for start in range(0, count, ENCODED)]
    decoded = [pixels for pixels, _ in load_crops(raw, batches, settings.image_size)]

    def encode_alone(batches: int | None = None) -> float:
        started = time.perf_counter()
        for pixels in decoded[:batches]:
            encode_moments(vae, pixels, settings)
            encoder.text.encode([CAPTION] * len(pixels))
        return time.perf_counter() - started

    def run_stage(number: int) -> float:
        started = time.perf_counter()
        encoder.write(list(plan_shards(images, encoder)), folder / f"parts-{number}")
        return time.perf_counter() - started

    encode_alone(1)  # warms up
    seconds = [(encode_alone(), run_stage(number)) for number in range(2)]  # alternately, as the machine's speed drifts
    alone, stage = (count / min(each) for each in zip(*seconds, strict=True))
    return {"device": device_name(device), "batch_size": ENCODED, "bare_images_per_second": alone, "images_per_second": stage}


def encode_table(row: dict[str, Any]) -> str:
    """Return the result of `benchmark_encode` as a Markdown table."""
    bare, stage = row["bare_images_per_second"], row["images_per_second"]
    cells = (f"{row['device']}, batches of {row['batch_size']}", f"{bare:.2f}", f"{stage:.2f}", f"{stage / bare:.0%}")
    header = ("encode, 256 pixels, two views, bf16", "bare encoders, images/s", "the stage, images/s", "share")
    return markdown_table(header, [cells])


def write_encoders(folder: Path) -> None:
    """Write untrained encoders of the real ones' shapes into `folder`/vae and `folder`/clip, with the bundled tokenizer."""
    from dit.benchmark.baselines import untrained_encoders  # here, since it takes memory that a reader of a cache does without

    shutil.copytree(BUILTIN / "clip", folder / "clip", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    bundled = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu")).model.config
    vae, clip = untrained_encoders(**{name: getattr(bundled, name) for name in ("vocab_size", "bos_token_id", "eos_token_id")})
    vae.save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "clip")


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
