"""Write a data set: the images' bytes as they came, metadata.json and source.json; see dataset/reader.py for the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from dit.dataset.filters import printable
from dit.dataset.storage import LooseFiles, TarShards, choose_storage
from dit.errors import UserError, without_passwords
from dit.sources.table import ImageRow, ImageTable
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
        filtered: of each of the source's filters, how many images it has left out, and one of them.
    """

    images: int = 0
    captions: int = 0
    train_images: int = 0
    val_images: int = 0
    double_images: int = 0
    rejected: list[dict[str, str]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)
    other_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    filtered: dict[str, dict[str, Any]] = field(default_factory=dict)

    def reject(self, image: str, reason: str) -> None:
        """Note that `image` cannot be used, and why."""
        self.rejected.append({"image": printable(image), "reason": printable(reason)})

    def leave_unpaired(self, file: Path) -> None:
        """Note that there is no caption to an image, or no image to a caption."""
        self.unpaired.append(printable(str(file)))

    def leave_out(self, file: Path, kind: str = "") -> None:
        """Note that a file is of a kind that is not read; by default, the end of its name says which."""
        _count_one(self.other_files, kind or printable(file.suffix.lower() or file.name), printable(str(file)))

    def filter_out(self, image: str, reason: str) -> None:
        """Note that the settings leave out `image`, which could be used, and why."""
        _count_one(self.filtered, reason, printable(image))

    def metrics(self) -> dict[str, Any]:
        """Return the content of metrics/download.json."""
        counts = {key: getattr(self, key) for key in ("images", "captions", "train_images", "val_images", "double_images")}
        lists = {"bad": self.rejected, "unpaired": self.unpaired, "other_files": self.other_files}
        filtered = {"filtered": self.filtered} if self.filtered else {}  # of the one source that has filters
        return counts | lists | {"bad_images": len(self.rejected)} | filtered

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
        for reason, about in self.filtered.items():
            yield f"{about['count']} left out by the settings: {reason}, such as {about['example']}"

    def _unpaired_images(self) -> list[str]:
        return [name for name in self.unpaired if not name.lower().endswith(".txt")]


def _count_one(kinds: dict[str, dict[str, Any]], kind: str, example: str) -> None:
    """Count one more of `kind`; the first stays the example."""
    kinds.setdefault(kind, {"count": 0, "example": example})["count"] += 1


SHOWN = 5  # kinds of files in one line
METADATA = "metadata.json"


class DatasetWriter:
    """Write a data set into `folder`, image by image; metadata.json comes last.

    Args:
        folder: where it goes.
        data: the source's block of params.yaml.
        count: how many images there will be at most; decides the storage where the settings leave that open.
    """

    def __init__(self, folder: Path, data: Any, count: int):
        self.folder, self.data = folder, data
        self.storage = choose_storage(data.storage, count)
        self._files = (TarShards if self.storage == "shards" else LooseFiles)(folder)
        self._table = ImageTable(folder / "images.sqlite.part")

    @property
    def images(self) -> int:
        """Return how many images there are so far."""
        return self._table.images

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
        stored = self._files.add(name, content, about, cached)
        self._table.add(name, hashlib.sha256(content).digest(), stored, captions, licence)

    def close(self, result: FetchResult) -> FetchResult:
        """Write metadata.json and source.json; complete and return `result`.

        Raises:
            UserError: of all images, more than `data.max_bad_fraction` were rejected, or fewer than two are left.
        """
        self.check_rejected(result)
        self._files.close()
        try:
            val, result.double_images = self._table.split(self.data.val_fraction, self.data.seed)
        except UserError as error:
            raise UserError("; ".join([str(error), *result.left_out()])) from None
        rows = _count(self._table.rows(val), result)
        if self.storage == "shards":
            files = write_lines(rows, self.folder)
            write_json(self.folder / METADATA, {"files": files, "images": result.images, "captions": result.captions})
        else:
            write_json(self.folder / METADATA, [line for row in rows for line in _lines(row)])
        write_json(self.folder / "source.json", without_passwords(asdict(self.data)))
        self._table.close()
        return result

    def check_rejected(self, result: FetchResult, expected: int = 0) -> None:
        """Check how many images were rejected, where there are, or will be, up to `expected` that are not.

        Raises:
            UserError: more than `data.max_bad_fraction` of them all.
        """
        rejected, total = result.rejected, self.images + len(result.rejected)
        if not rejected or len(rejected) <= self.data.max_bad_fraction * (max(self.images, expected) + len(rejected)):
            return
        examples: dict[str, str] = {}  # of each kind of reason, the first image
        for row in rejected:
            examples.setdefault(row["reason"].split(":")[0], f"{row['image']}: {row['reason']}")
        raise UserError(
            f"{self.data.source}.data.max_bad_fraction: {len(rejected)} of {total} images are unusable, more than "
            f"{self.data.max_bad_fraction:.1%}; mend or remove them, or raise the limit. "
            f"{'; '.join(list(examples.values())[:SHOWN])}"
        )


def _count(rows: Iterator[ImageRow], result: FetchResult) -> Iterator[ImageRow]:
    """Yield `rows`, and count them in `result`."""
    for row in rows:
        result.images += 1
        result.captions += len(row.captions)
        result.val_images += row.split == "val"
        result.train_images += row.split == "train"
        yield row


def _lines(row: ImageRow) -> list[dict[str, str]]:
    """Return what metadata has of an image, for each of its captions."""
    more = ({"stored": row.stored} if row.stored != row.name else {}) | ({"licence": row.licence} if row.licence else {})
    return [{"image": row.name, "text": text, "split": row.split} | more for text in row.captions]


def write_lines(rows: Iterator[ImageRow], folder: Path) -> list[str]:
    """Write the rows of the images in shards/00000.tar as lines of JSON into shards/00000.jsonl …; return the files' names."""
    files = []
    for shard, group in groupby(rows, key=lambda row: row.stored.rpartition(".tar/")[0]):
        files.append(f"{shard}.jsonl")
        with (folder / files[-1]).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for row in group for line in _lines(row))
    return files
