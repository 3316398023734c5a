"""How fast images are downloaded and encoded; encoding beside the bare encoders on decoded images, in the same run."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dit.benchmark.baselines import untrained_encoders
from dit.benchmark.results import default_device, device_name, markdown_table
from dit.config import Params
from dit.dataset.image_io import load_crops
from dit.dataset.reader import read_images
from dit.encode.encode import Encoder, group_by_size, plan_shards
from dit.encode.moments import encode_moments
from dit.encoders.loading import BUILTIN, PRECISIONS, EncoderSource, load_vae, with_fast_precision
from dit.encoders.text import TextEncoder
from dit.errors import UserError
from dit.sources.http import Downloader
from dit.sources.writer import DatasetWriter, FetchResult

PHOTOGRAPH = (640, 480)
CAPTION = "a red circle to the left of a small blue star on a white background"
ENCODED = 4  # images in a batch of the encode stage


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
    writer = DatasetWriter(raw, replace(params.folder.data, storage="files"), count)
    for k, content in enumerate(synthetic_photographs(count)):
        writer.add(f"images/{k}.jpg", content, [CAPTION])
    writer.close(FetchResult())
    write_encoders(folder)
    settings = replace(params.coco.encode, batch_size=ENCODED, vae=str(folder / "vae"), clip=str(folder / "clip"))
    device = default_device()
    settings = with_fast_precision(settings, device)
    dtype = PRECISIONS[settings.precision]
    vae, _ = load_vae(EncoderSource(settings.vae), dtype, device)
    vae.to(memory_format=torch.channels_last)  # as the stage does
    encoder = Encoder(vae, TextEncoder(EncoderSource(settings.clip), dtype, device), settings, "benchmark", raw, params.runtime)
    images = read_images(raw)
    stored = [(rows[0].image, rows[0].stored) for rows in images]
    batches = [stored[start : start + ENCODED] for start in range(0, count, ENCODED)]
    decoded = [pixels for pixels, *_ in load_crops(raw, batches, [(settings.image_size, settings.image_size)])]

    def encode_alone(batches: int | None = None) -> float:
        started = time.perf_counter()
        for pixels in decoded[:batches]:
            encode_moments(vae, pixels, settings)
            encoder.text.encode([CAPTION] * len(pixels))
        return time.perf_counter() - started

    def run_stage(number: int) -> float:
        started = time.perf_counter()
        encoder.write(list(plan_shards(group_by_size(raw, images, settings), encoder)), folder / f"parts-{number}")
        return time.perf_counter() - started

    encode_alone(1)  # warms up
    seconds = [(encode_alone(), run_stage(number)) for number in range(2)]  # alternately, as the machine's speed drifts
    alone, stage = (count / min(each) for each in zip(*seconds, strict=True))
    return {"device": device_name(device), "batch_size": ENCODED, "bare_images_per_second": alone, "images_per_second": stage}


def encode_table(row: dict[str, Any]) -> str:
    """Return the result of `benchmark_encode` as a Markdown table."""
    bare, stage = row["bare_images_per_second"], row["images_per_second"]
    cells = (f"{row['device']}, batches of {row['batch_size']}", f"{bare:.2f}", f"{stage:.2f}", f"{stage / bare:.0%}")
    header = ("encode, 256 pixels, two augmentations, bf16", "bare encoders, images/s", "the stage, images/s", "share")
    return markdown_table(header, [cells])


def write_encoders(folder: Path) -> None:
    """Write untrained encoders of the real ones' shapes into `folder`/vae and `folder`/clip, with the bundled tokenizer."""
    shutil.copytree(BUILTIN / "clip", folder / "clip", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    bundled = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu")).model.config
    vae, clip = untrained_encoders(**{name: getattr(bundled, name) for name in ("vocab_size", "bos_token_id", "eos_token_id")})
    vae.save_pretrained(folder / "vae")
    clip.save_pretrained(folder / "clip")
