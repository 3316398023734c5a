"""Write a data set: the images' bytes as they came, metadata.json and source.json; see dataset/reader.py for the format."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit.dataset.filters import printable
from dit.dataset.storage import LooseFiles, TarShards, choose_storage
from dit.errors import UserError, without_passwords
from dit.utils.files import write_json


@dataclass
class FetchResult:
    """What a source has fetched; becomes metrics/download.json.

    Attributes:
        images, captions, train_images, val_images: how many were written.
        double_images: how many of them have the same bytes as another one.
        rejected: names of the images that cannot be used, and why.
        unpaired: images without a caption, and .txt files without an image.
        other_files: of each kind of file that is not read, by the end of the name, how many there are, and one of them.
    """

    images: int = 0
    captions: int = 0
    train_images: int = 0
    val_images: int = 0
    double_images: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    other_files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reject(self, image: str, reason: str) -> None:
        """Note that `image` cannot be used, and why."""
        self.rejected.append({"image": printable(image), "reason": printable(reason)})

    def leave_unpaired(self, file: Path) -> None:
        """Note that there is no caption to an image, or no image to a caption."""
        self.unpaired.append(printable(str(file)))

    def leave_out(self, file: Path, kind: str = "") -> None:
        """Note that a file is of a kind that is not read; by default, the end of its name says which."""
        counted = self.other_files.setdefault(kind or printable(file.suffix.lower() or file.name), {"count": 0, "example": ""})
        counted["count"] += 1
        counted["example"] = counted["example"] or printable(str(file))

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics/download.json."""
        counts = {key: getattr(self, key) for key in ("images", "captions", "train_images", "val_images", "double_images")}
        lists = {"bad": self.rejected, "unpaired": self.unpaired, "other_files": self.other_files}
        return counts | lists | {"bad_images": len(self.rejected)}

    def summary(self) -> Iterator[str]:
        """Yield lines for the terminal: what was written, and what was left out, with an example each."""
        yield f"{self.images} images, {self.captions} captions ({self.captions / max(1, self.images):.1f} an image)"
        yield from self.left_out()
        if self.double_images:
            yield f"{self.double_images} images have the same bytes as another one; equal ones are on one side of the split"
        others = sum(about["count"] for about in self.other_files.values())
        left_out = len(self.rejected) + max(len(self._unpaired_images()), others)
        if left_out > self.images:
            yield (
                f"WARNING: more is left out ({left_out} files) than used ({self.images} images); captions are read from "
                ".txt files of the image's name, and from metadata.jsonl, .csv or .json"
            )

    def left_out(self) -> Iterator[str]:
        """Yield a line for each reason why files were not used, with an example."""
        if self.rejected:
            yield f"{len(self.rejected)} rejected, such as {self.rejected[0]['image']}: {self.rejected[0]['reason']}"
        images = self._unpaired_images()
        texts = [name for name in self.unpaired if name not in images]
        for what, names in (("images without a caption", images), ("captions without an image", texts)):
            if names:
                yield f"{len(names)} {what}, such as {names[0]}"
        if self.other_files:
            kinds = sorted(self.other_files.items(), key=lambda kind: -kind[1]["count"])
            listed = ", ".join(f"{kind} {about['count']} ({about['example']})" for kind, about in kinds[:SHOWN])
            more = f" and {len(kinds) - SHOWN} more kinds" if len(kinds) > SHOWN else ""
            yield f"files of kinds that are not read: {listed}{more}"

    def _unpaired_images(self) -> list[str]:
        return [name for name in self.unpaired if not name.lower().endswith(".txt")]


SHOWN = 5  # kinds of files in one line


def split_by_image(digests: dict[str, bytes], val_fraction: float, seed: int) -> dict[str, str]:
    """Assign "train" or "val" to each image, the same on every machine, at least one to each split.

    Images of the same digest are on the same side: otherwise the validation would measure what was learned by heart.

    Args:
        digests: of each image's bytes, by name.
        val_fraction: share of the images that are for validation.
        seed: chooses them.

    Raises:
        UserError: there are fewer than two different images.
    """
    groups: dict[bytes, list[str]] = {}
    for name in sorted(digests):
        groups.setdefault(digests[name], []).append(name)
    if len(groups) < 2:
        found = f"{len(digests)} usable images, all of the same bytes" if len(digests) > 1 else f"{len(digests)} usable image"
        raise UserError(f"data: {found}; at least 2 are needed, one of them for validation")
    count = min(max(1, round(val_fraction * len(digests))), len(digests) - 1)
    by_first = {names[0]: names for names in groups.values()}
    val: list[str] = []
    for first in np.random.default_rng(seed).permutation(list(by_first)).tolist():
        if len(val) + len(by_first[first]) <= count:
            val += by_first[first]
    val = val or min(groups.values(), key=len)  # where there are more doubles of each image than are wanted
    return dict.fromkeys(digests, "train") | dict.fromkeys(val, "val")


class DatasetWriter:
    """Write a data set into `folder`, image by image; metadata.json comes last.

    Args:
        folder: where it goes.
        data: the source's block of params.yaml.
        count: how many images there will be at most; decides the storage where the settings leave that open.
    """

    def __init__(self, folder: Path, data: Any, count: int):
        self.folder, self.data = folder, data
        self._images = (TarShards if choose_storage(data.storage, count) == "shards" else LooseFiles)(folder)
        self._rows: dict[str, tuple[str, list[str], str]] = {}
        self._digests: dict[str, bytes] = {}

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
        self._digests[name] = hashlib.sha256(content).digest()
        self._rows[name] = (self._images.add(name, content, about, cached), captions, licence)

    def close(self, result: FetchResult) -> FetchResult:
        """Write metadata.json and source.json; complete and return `result`.

        Raises:
            UserError: of all images, more than `data.max_bad_fraction` were rejected, or fewer than two are left.
        """
        if result.rejected:
            self._check_rejected(result.rejected)
        self._images.close()
        try:
            splits = split_by_image(self._digests, self.data.val_fraction, self.data.seed)
        except UserError as error:
            raise UserError("; ".join([str(error), *result.left_out()])) from None
        rows = []
        for image, (stored, captions, licence) in self._rows.items():
            more = ({"stored": stored} if stored != image else {}) | ({"licence": licence} if licence else {})
            rows += [{"image": image, "text": text, "split": splits[image]} | more for text in captions]
        write_json(self.folder / "metadata.json", rows)
        write_json(self.folder / "source.json", without_passwords(asdict(self.data)))
        result.images, result.captions = len(self._rows), len(rows)
        result.val_images = sum(split == "val" for split in splits.values())
        result.train_images = result.images - result.val_images
        result.double_images = sum(count for count in Counter(self._digests.values()).values() if count > 1)
        return result

    def _check_rejected(self, rejected: list[dict[str, str]]) -> None:
        total, limit = len(self._rows) + len(rejected), self.data.max_bad_fraction
        if len(rejected) <= limit * total:
            return
        examples: dict[str, str] = {}  # of each kind of reason, the first image
        for row in rejected:
            examples.setdefault(row["reason"].split(":")[0], f"{row['image']}: {row['reason']}")
        raise UserError(
            f"{self.data.source}.data.max_bad_fraction: {len(rejected)} of {total} images are unusable, more than {limit:.1%}; "
            f"mend or remove them, or raise the limit. {'; '.join(list(examples.values())[:SHOWN])}"
        )
