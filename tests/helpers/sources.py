"""What the tests of the sources share: settings, a folder of pairs, and what arrived."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit.config import CocoData, FolderData, load_config
from dit.dataset.reader import read_metadata
from helpers import REPO

RUNTIME = replace(load_config(REPO / "params.yaml").runtime, download_connections=4)


def captions_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_metadata(folder):
        found.setdefault(entry.image, []).append(entry.text)
    return found


def folder_data(*paths: Path, limit: float = 0.0, layout: str = "files") -> FolderData:
    return FolderData(
        source="folder", paths=tuple(map(str, paths)), val_fraction=0.3, layout=layout, max_bad_fraction=limit, seed=0
    )


def add_pair(folder: Path, name: str, text: str | bytes, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def coco_data(url: str, count: int, **changes) -> CocoData:
    return CocoData(
        **{
            "source": "coco",
            "split": "val2017",
            "num_samples": count,
            "val_fraction": 0.3,
            "base_url": url,
            "captions_per_image": 2,
            "layout": "files",
            "max_bad_fraction": 0.0,
            "seed": 0,
        }
        | changes
    )
