"""A data set of random images and the settings that it is encoded with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit.config import Encode, load_config
from dit.dataset.reader import read_metadata
from dit.encode.encode import WHOLE, Part, encode_dataset
from dit.sources.writer import DatasetWriter, FetchResult
from helpers import REPO
from helpers.sources import folder_data, noise_file

COUNT = 22  # images
SHARD_BYTES = 2**16  # one batch of four images
RUNTIME = replace(load_config(REPO / "params.yaml").runtime, num_workers=0, prefetch_factor=2)
SETTINGS = Encode(
    image_size=64,
    aspect_ratios="square",
    vae="builtin",
    vae_revision=None,
    vae_slicing=False,
    vae_tiling=False,
    clip="builtin",
    clip_revision=None,
    long_captions="cut",
    crops=0,
    batch_size=4,
    precision="fp32",
)


def write_raw(folder: Path, storage: str = "files") -> Path:
    """Write a data set of `COUNT` images of several sizes, with one to three captions each, four of them for validation."""
    writer = DatasetWriter(folder, replace(folder_data(folder, storage=storage), val_fraction=0.2), COUNT)
    for k in range(COUNT):
        captions = [f"a red circle left of number {k}", "a blue star", "a small green heart on white"][: 1 + k % 3]
        writer.add(f"images/{k}.jpg", noise_file(k, (90 - k, 66 + k)), captions)
    writer.close(FetchResult())
    return folder


def image_names(raw: Path) -> list[str]:
    return list(dict.fromkeys(entry.image for entry in read_metadata(raw)))


def encode(raw: Path, folder: Path, runtime=RUNTIME, part: Part = WHOLE, **changes) -> dict | None:
    """Encode `raw` into `folder` with `changes` of `SETTINGS`."""
    return encode_dataset(raw, folder, replace(SETTINGS, **changes), runtime, folder.parent / "reconstructions.png", part)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
