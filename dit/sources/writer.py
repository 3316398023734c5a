"""What all sources write: the images' bytes as they came, and `metadata.json` with a row per caption.

Rows are `{"image": "images/x.jpg", "text": "…", "split": "train" | "val"}`, with the address of the image's "licence" where
the source knows it, and where the image is "stored" if that is not under its own name; several may share an image.
`source.json` holds the settings that the folder was made from.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.dataset.storage import LooseFiles, TarShards, choose_layout
from dit.errors import UserError
from dit.utils.files import write_json


@dataclass
class Report:
    """What a source found; becomes metrics/download.json. `bad` and `unpaired` say which files were set aside, and why."""

    images: int = 0
    captions: int = 0
    train_images: int = 0
    val_images: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)

    def reject(self, image: str, reason: str) -> None:
        self.bad.append({"image": image, "reason": reason})

    def metrics(self) -> dict[str, Any]:
        return asdict(self) | {"bad_images": len(self.bad)}


def split_by_image(images: list[str], val_fraction: float, seed: int) -> dict[str, str]:
    """ "train" or "val" for each image name; the same on every machine, at least one image in each split.

    Raises:
        UserError: there are fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"data: {len(images)} usable image; at least 2 are needed, one of them for validation")
    count = min(max(1, round(val_fraction * len(images))), len(images) - 1)
    order = np.random.default_rng(seed).permutation(sorted(images))
    return dict.fromkeys(order[:count].tolist(), "val") | dict.fromkeys(order[count:].tolist(), "train")


class DatasetWriter:
    """Write a data set into `folder`, image by image; metadata.json comes last.

    Args:
        folder: where it goes.
        data: the source's settings.
        count: how many images there will be at most; decides the layout where the settings leave that open.
    """

    def __init__(self, folder: Path, data: Any, count: int):
        self.folder, self.data = folder, data
        self._images = (TarShards if choose_layout(data.layout, count) == "shards" else LooseFiles)(folder)
        self._rows: dict[str, tuple[str, list[str], str]] = {}

    def add(self, name: str, content: bytes, captions: list[str], licence: str = "", kept: Path | None = None) -> None:
        """Store one image.

        Args:
            name: like images/x.jpg; each only once.
            content: the picture file's bytes.
            captions: at least one.
            licence: its address, if known.
            kept: a file with these bytes that need not be copied.
        """
        about = {"captions": captions} | ({"licence": licence} if licence else {})
        self._rows[name] = (self._images.add(name, content, about, kept), captions, licence)

    def close(self, report: Report) -> Report:
        """Write metadata.json and source.json; completes and returns `report`."""
        self._images.close()
        splits = split_by_image(list(self._rows), self.data.val_fraction, self.data.seed)
        rows = []
        for image, (stored, captions, licence) in self._rows.items():
            more = ({"stored": stored} if stored != image else {}) | ({"licence": licence} if licence else {})
            rows += [{"image": image, "text": text, "split": splits[image]} | more for text in captions]
        write_json(self.folder / "metadata.json", rows)
        write_json(self.folder / "source.json", asdict(self.data))
        report.images, report.captions = len(self._rows), len(rows)
        report.val_images = sum(split == "val" for split in splits.values())
        report.train_images = report.images - report.val_images
        return report


def refuse_too_many_bad(report: Report, total: int, limit: float, key: str) -> None:
    """Raise a `UserError` if more than the share `limit` of `total` images were set aside; `key` is the limit's name."""
    if len(report.bad) > limit * total:
        first = report.bad[0]
        raise UserError(
            f"{key}: {len(report.bad)} of {total} images are unusable, more than {limit:.1%}; "
            f"the first is {first['image']}: {first['reason']}"
        )
