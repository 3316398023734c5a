"""What the tests of the sources share: settings, image files, a folder of pairs, and what arrived."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dit.config import CocoData, FolderData, HubData, load_config
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
