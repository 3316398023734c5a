"""Write a data set: the images' bytes as they came, metadata.json and source.json; see dataset/reader.py for the format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.dataset.storage import LooseFiles, TarShards, choose_layout
from dit.errors import UserError
from dit.utils.files import write_json


@dataclass
class FetchResult:
    """What a source has fetched; becomes metrics/download.json.

    Attributes:
        images, captions, train_images, val_images: how many were written.
        rejected: names of the images that cannot be used, and why.
        unpaired: images without a caption, and .txt files without an image.
    """

    images: int = 0
    captions: int = 0
    train_images: int = 0
    val_images: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)

    def reject(self, image: str, reason: str) -> None:
        """Note that `image` cannot be used, and why."""
        self.rejected.append({"image": image, "reason": reason})

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics/download.json."""
        counts = {key: getattr(self, key) for key in ("images", "captions", "train_images", "val_images")}
        return counts | {"bad": self.rejected, "unpaired": self.unpaired, "bad_images": len(self.rejected)}


def split_by_image(images: list[str], val_fraction: float, seed: int) -> dict[str, str]:
    """Assign "train" or "val" to each image name, the same on every machine, at least one image to each split.

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
        data: the source's block of params.yaml.
        count: how many images there will be at most; decides the layout where the settings leave that open.
    """

    def __init__(self, folder: Path, data: Any, count: int):
        self.folder, self.data = folder, data
        self._images = (TarShards if choose_layout(data.layout, count) == "shards" else LooseFiles)(folder)
        self._rows: dict[str, tuple[str, list[str], str]] = {}

    def add(self, name: str, content: bytes, captions: list[str], licence: str = "", cached: Path | None = None) -> None:
        """Store one image.

        Args:
            name: like images/x.jpg; each only once.
            content: the image file's bytes.
            captions: at least one.
            licence: its address, if known.
            cached: a file with these bytes that need not be copied.
        """
        about = {"captions": captions} | ({"licence": licence} if licence else {})
        self._rows[name] = (self._images.add(name, content, about, cached), captions, licence)

    def close(self, result: FetchResult) -> FetchResult:
        """Write metadata.json and source.json; complete and return `result`.

        Raises:
            UserError: of all images, more than `data.max_bad_fraction` were rejected, or fewer than two are left.
        """
        if result.rejected:
            self._check_rejected(result.rejected)
        self._images.close()
        splits = split_by_image(list(self._rows), self.data.val_fraction, self.data.seed)
        rows = []
        for image, (stored, captions, licence) in self._rows.items():
            more = ({"stored": stored} if stored != image else {}) | ({"licence": licence} if licence else {})
            rows += [{"image": image, "text": text, "split": splits[image]} | more for text in captions]
        write_json(self.folder / "metadata.json", rows)
        write_json(self.folder / "source.json", asdict(self.data))
        result.images, result.captions = len(self._rows), len(rows)
        result.val_images = sum(split == "val" for split in splits.values())
        result.train_images = result.images - result.val_images
        return result

    def _check_rejected(self, rejected: list[dict[str, str]]) -> None:
        total, limit, first = len(self._rows) + len(rejected), self.data.max_bad_fraction, rejected[0]
        if len(rejected) > limit * total:
            raise UserError(
                f"{self.data.source}.data.max_bad_fraction: {len(rejected)} of {total} images are unusable, more than "
                f"{limit:.1%}; the first is {first['image']}: {first['reason']}"
            )
