"""How fast data arrives, is encoded and is read, as the tables of docs/performance.md.

Each rate is printed beside its limit, measured in the same run: for encoding the bare encoders on pictures that are decoded
already, for reading a plain copy in memory.
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit.config import load_config
from dit.dataset.image_io import load_crops
from dit.dataset.reader import by_image, read_metadata
from dit.encode.encode import Encoder, plan_shards
from dit.encode.moments import encode_moments
from dit.encoders.loading import BUILTIN, PRECISIONS, EncoderSource, load_vae
from dit.encoders.text import TextEncoder
from dit.latents.cache import LatentCache, bytes_per_image
from dit.sources.http import Downloader
from dit.sources.writer import DatasetWriter, Report

PHOTOGRAPH = (640, 480)
CAPTION = "a red circle to the left of a small blue star on a white background"
BATCH = 96
BATCHES = 100
EXAMPLES = """\
examples:
  python -m dit.benchmark.data                         everything; on 2 cores about 5 minutes, and 7 GB on the disk for a while
  python -m dit.benchmark.data encode --images 256     encoding alone, of more images: what a GPU needs to get going
  python -m dit.benchmark.data read --entries 118000
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dit.benchmark.data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", default="all", choices=["all", "download", "encode", "read"], help="default: all")
    parser.add_argument("--images", type=int, default=16, help="to encode; 16 times as many to download; default: %(default)s")
    parser.add_argument(
        "--entries", type=int, nargs="*", default=[1000, 10_000, 118_000], help="sizes of caches to read; default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, help="where to write what is read; default: a temporary folder")
    parser.add_argument("--one-cache", type=Path, help=argparse.SUPPRESS)  # a process of its own, so that its memory is its own
    arguments = parser.parse_args()
    if arguments.one_cache:
        read_cache(arguments.one_cache)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["DVC_ROOT"] = folder
        if arguments.what in ("all", "download"):
            download(Path(folder), 16 * arguments.images)
        if arguments.what in ("all", "encode"):
            encode(Path(folder), arguments.images)
        if arguments.what in ("all", "read"):
            print(
                "\n| entries | written in | writer's peak memory | bytes per image | of float32, 77 tokens | opened in | "
                "memory after opening | peak while reading | of which anonymous | batches of 96 | of a plain copy |"
            )
            print("|" + "---|" * 11)
            for count in arguments.entries:
                measure_cache(Path(folder) / f"cache-{count}", count)


def photographs(count: int) -> list[bytes]:
    """JPEG files about as large and as hard to decode as COCO's."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        content = io.BytesIO()
        coarse.save(content, "JPEG", quality=85)
        files.append(content.getvalue())
    return files


def download(folder: Path, count: int) -> None:
    """From a plain file server on the same machine, which has to share its cores."""
    served = folder / "served"
    served.mkdir()
    files = photographs(count)
    for k, content in enumerate(files):
        (served / f"{k}.jpg").write_bytes(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--protocol", "HTTP/1.1"]
    server = subprocess.Popen(command, cwd=served, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    downloader, connections = Downloader("benchmark"), load_config().runtime.download_connections
    time.sleep(2)
    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        problems = list(pool.map(lambda k: downloader.cached(f"http://127.0.0.1:{port}/{k}.jpg")[1], range(count)))
    seconds = time.perf_counter() - started
    server.kill()
    if any(problems):
        raise SystemExit(f"download: {next(filter(None, problems))}")
    size = sum(map(len, files))
    each = f"{connections} connections, {size / count / 1e3:.0f} kB per image"
    print("\n| download over loopback | images/s | MB/s |\n|---|---|---|")
    print(f"| {each} | {count / seconds:.0f} | {size / seconds / 1e6:.0f} |")


def encode(folder: Path, count: int) -> None:
    """The stage's work against the two encoders alone; both of the real ones' shape, with random weights, in bf16."""
    params = load_config()
    raw, batch = folder / "raw", 4
    writer = DatasetWriter(raw, replace(params.folder.data, layout="files"), count)
    for k, content in enumerate(photographs(count)):
        writer.add(f"images/{k}.jpg", content, [CAPTION])
    writer.close(Report())
    vae_folder, clip_folder = write_encoders(folder)
    settings = replace(params.coco.encode, batch_size=batch, vae=str(vae_folder), clip=str(clip_folder))
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PRECISIONS[settings.precision]
    vae, _ = load_vae(EncoderSource(settings.vae), dtype, device)
    encoder = Encoder(vae, TextEncoder(EncoderSource(settings.clip), dtype, device), settings, "benchmark", raw, params.runtime)
    images = by_image(read_metadata(raw))
    batches = [[(rows[0].image, rows[0].stored) for rows in images[start : start + batch]] for start in range(0, count, batch)]
    decoded = [pixels for pixels, _ in load_crops(raw, batches, settings.image_size)]

    def bare(batches: int | None = None) -> float:
        started = time.perf_counter()
        for pixels in decoded[:batches]:
            encode_moments(vae, pixels, settings)
            encoder.text.encode([CAPTION] * len(pixels))
        return time.perf_counter() - started

    def stage(number: int) -> float:
        started = time.perf_counter()
        encoder.write(list(plan_shards(images, encoder)), folder / f"parts-{number}")
        return time.perf_counter() - started

    bare(1)  # warms up
    seconds = [(bare(), stage(number)) for number in range(2)]  # alternately, as the machine's speed drifts
    alone, whole = (min(each) for each in zip(*seconds, strict=True))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print("\n| encode, 256 pixels, two views, bf16 | bare encoders, images/s | the stage, images/s | share |\n|---|---|---|---|")
    print(f"| {name}, batches of {batch} | {count / alone:.2f} | {count / whole:.2f} | {alone / whole:.0%} |")


def write_encoders(folder: Path) -> tuple[Path, Path]:
    """A VAE like stabilityai/sd-vae-ft-mse and a text side like openai/clip-vit-large-patch14's, untrained."""
    import shutil

    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder / "vae")
    shutil.copytree(BUILTIN / "clip", folder / "clip", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    small = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu")).model.config
    config = CLIPTextConfig(
        vocab_size=small.vocab_size,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
    )
    CLIPTextModelWithProjection(config).save_pretrained(folder / "clip")
    return folder / "vae", folder / "clip"


def measure_cache(folder: Path, count: int) -> None:
    """Write a cache of real shapes and read it, each in a process of its own; prints a row of the table."""
    script = (
        "import sys; from pathlib import Path; from dit.benchmark.synthetic import write_synthetic; "
        "from dit.benchmark.data import memory; write_synthetic(Path(sys.argv[1]), int(sys.argv[2])); print(memory('VmHWM'))"
    )
    started = time.perf_counter()
    peak = subprocess.run([sys.executable, "-c", script, str(folder), str(count)], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    row = subprocess.run(
        [sys.executable, "-m", "dit.benchmark.data", "--one-cache", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    print(f"| {count:,} | {seconds:.0f} s | {float(peak.stdout):.0f} MB | {row.stdout.strip()} |", flush=True)


def read_cache(folder: Path) -> None:
    """Open a cache and read random batches; prints the cells of a row."""
    before = memory("VmRSS")
    started = time.perf_counter()
    cache = LatentCache(folder)
    opened, after = time.perf_counter() - started, memory("VmRSS")
    rng = np.random.default_rng(0)
    no = np.zeros(BATCH, dtype=bool)
    read = total = 0.0
    peak = 0.0
    for number in range(BATCHES + 10):
        images = rng.integers(0, len(cache), BATCH)
        started = time.perf_counter()
        batch = cache.read(images, np.zeros(BATCH), no)
        if number >= 10:  # the first ones come from the disk
            read += time.perf_counter() - started
            total += sum(value.nbytes for value in vars(batch).values())
        peak = max(peak, memory("VmRSS"))
    anonymous = memory("RssAnon")
    size = sum(value.nbytes for value in vars(batch).values())
    source, target = torch.ones(40 * size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)  # too large for the caches
    started = time.perf_counter()
    for number in range(BATCHES):
        target.copy_(source[number % 40 * size :][:size])
    copied = time.perf_counter() - started
    stored, naive = bytes_per_image(cache)
    cells = (
        f"{stored:,.0f}",
        f"1/{naive / stored:.1f}",
        f"{opened * 1e3:.0f} ms",
        f"{after:.0f} MB, {after - before:.0f} more than before",
        f"{peak:.0f} MB",
        f"{anonymous:.0f} MB",
        f"{total / read / 1e9:.2f} GB/s, {BATCHES * BATCH / read:,.0f} images/s",
        f"{copied / read:.0%} of {total / copied / 1e9:.1f} GB/s",
    )
    print(" | ".join(cells))


def memory(what: str) -> float:
    """A line of /proc/self/status, in MB: VmRSS now, VmHWM at most, RssAnon without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1e3


if __name__ == "__main__":
    main()
