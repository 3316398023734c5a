"""What the tests of the sources share: settings, image files, a folder of pairs, and what arrived."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dit.config import CocoData, FolderData, HubData, WebdatasetData, load_config
from dit.dataset.reader import read_metadata
from helpers import REPO

RUNTIME = replace(load_config(REPO / "params.yaml").runtime, download_connections=4)


def captions_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_metadata(folder):
        found.setdefault(entry.image, []).append(entry.text)
    return found


def noise_file(seed: int, size: tuple[int, int] = (48, 32), kind: str = "JPEG") -> bytes:
    """An image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def add_pair(folder: Path, name: str, text: str | bytes, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def folder_data(*paths: Path, limit: float = 0.0, storage: str = "files") -> FolderData:
    return FolderData(
        source="folder", paths=tuple(map(str, paths)), val_fraction=0.3, storage=storage, max_bad_fraction=limit, seed=0
    )


def coco_data(url: str, count: int, **changes) -> CocoData:
    settings = {"split": "val2017", "captions_per_image": 2, "storage": "files", "max_bad_fraction": 0.0, "seed": 0} | changes
    return CocoData(source="coco", num_samples=count, val_fraction=0.3, base_url=url, **settings)


def hub_data(dataset: Path | str, /, **changes) -> HubData:
    columns = {"image_column": "image", "caption_columns": ("text",)}
    plain = {"config": None, "revision": None, "split": "train", "storage": "files", "num_samples": 6, "max_bad_fraction": 0.0}
    return HubData(**{"source": "hub", "dataset": str(dataset), "val_fraction": 0.3, "seed": 0} | columns | plain | changes)


def webdataset_data(*shards: Path | str, **changes) -> WebdatasetData:
    plain = {"min_side": 0, "max_aspect_ratio": None, "min_caption_length": 1, "max_caption_length": None, "storage": "files"}
    keys = {"image_keys": ("jpg", "jpeg", "png", "webp"), "caption_keys": ("txt",), "num_samples": None, "max_bad_fraction": 0.0}
    return WebdatasetData(
        **{"source": "webdataset", "shards": tuple(map(str, shards)), "val_fraction": 0.3, "seed": 0} | plain | keys | changes
    )


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar file of these members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def shard_members(numbers: range) -> dict[str, bytes]:
    """What img2dataset writes of the images of these numbers: image, caption and what is known, under one name."""
    members = {}
    for k in numbers:
        about = {
            "caption": f"caption {k}",
            "meta": {"text": f"text {k}", "all": [f"one {k}", None, f"two {k}"]},
            "status": "success",
        }
        members |= {
            f"{k:09d}.jpg": noise_file(k),
            f"{k:09d}.txt": f"caption {k}".encode(),
            f"{k:09d}.json": json.dumps(about).encode(),
        }
    return members


def write_shards(folder: Path, count: int = 3, images: int = 4) -> list[Path]:
    """`count` tar shards of `images` each, with the table that img2dataset leaves beside them."""
    paths = []
    for number in range(count):
        members = shard_members(range(number * images, (number + 1) * images))
        paths.append(write_tar(folder / f"{number:05d}.tar", members))
        paths[-1].with_suffix(".parquet").write_bytes(b"PAR1")
    return paths
