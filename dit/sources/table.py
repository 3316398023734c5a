"""The images of a data set that is being written, on disk until all of them are known and can be split.

As Python objects, a million images with their captions would take hundreds of megabytes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit.errors import UserError


class ImageRow(NamedTuple):
    """An image of a data set: its name, where it is stored, its captions, its licence's address if known, and its split."""

    name: str
    stored: str
    captions: list[str]
    licence: str
    split: str


class ImageTable:
    """Images in a table of SQLite in the file `path`, which `close` deletes.

    Attributes:
        images: how many there are.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was killed
        self.path, self.images = path, 0
        self._db = sqlite3.connect(path)
        self._db.executescript(  # nothing of it outlives this run, so nothing need be safe from a crash; the cache is in kB
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -32000;"
            "CREATE TABLE images (number INTEGER PRIMARY KEY, name TEXT, digest BLOB, stored TEXT, captions TEXT, licence TEXT);"
            "CREATE TABLE contents (number INTEGER PRIMARY KEY, digest BLOB, images INTEGER);"
        )

    def add(self, name: str, digest: bytes, stored: str, captions: list[str], licence: str) -> None:
        """Add an image; `digest` is of its bytes."""
        self._db.execute(
            "INSERT INTO images (name, digest, stored, captions, licence) VALUES (?, ?, ?, ?, ?)",
            (name, digest, stored, json.dumps(captions, ensure_ascii=False), licence),
        )
        self.images += 1

    def split(self, val_fraction: float, seed: int) -> tuple[set[bytes], int]:
        """Choose the images for validation, the same on every machine, in whatever order they were added.

        Images of the same digest are on the same side: otherwise the validation would measure what was learned by heart.

        Args:
            val_fraction: share of the images that are for validation.
            seed: chooses them.

        Returns:
            the digests of those for validation, for `rows`; how many images have the same digest as another one.

        Raises:
            UserError: there are fewer than two different images.
        """
        self._db.execute(
            "INSERT INTO contents (digest, images) SELECT digest, count(*) FROM images GROUP BY digest ORDER BY min(name)"
        )
        sizes = np.fromiter((size for (size,) in self._db.execute("SELECT images FROM contents ORDER BY number")), np.int32)
        if len(sizes) < 2:
            found = f"{self.images} usable images, all of the same bytes" if self.images > 1 else f"{self.images} usable image"
            raise UserError(f"data: {found}; at least 2 are needed, one of them for validation")
        chosen = choose_val(sizes, val_fraction, seed)
        digests = self._db.execute("SELECT digest FROM contents ORDER BY number")
        val = {digest for (digest,), is_val in zip(digests, chosen, strict=True) if is_val}
        return val, int(sizes[sizes > 1].sum())

    def rows(self, val: set[bytes]) -> Iterator[ImageRow]:
        """Yield all images in the order in which they were added; those whose digest is in `val` are for validation."""
        images = self._db.execute("SELECT name, digest, stored, captions, licence FROM images ORDER BY number")
        for name, digest, stored, captions, licence in images:
            yield ImageRow(name, stored, json.loads(captions), licence, "val" if digest in val else "train")

    def close(self) -> None:
        """Delete the file."""
        self._db.close()
        self.path.unlink()


def choose_val(sizes: np.ndarray, val_fraction: float, seed: int) -> np.ndarray:
    """Choose groups of images for validation, at least one, and not all.

    Args:
        sizes: (G,) of each group of equal images, their number; at least two groups.
        val_fraction: share of the images that are for validation; no more are chosen, unless every group is larger than that.
        seed: chooses them.

    Returns:
        (G,) bool, true for validation.
    """
    images, found = int(sizes.sum()), 0
    wanted = min(max(1, round(val_fraction * images)), images - 1)
    chosen = np.zeros(len(sizes), bool)
    for k in np.random.default_rng(seed).permutation(len(sizes)):
        if found + sizes[k] <= wanted:
            chosen[k] = True
            found += int(sizes[k])
            if found == wanted:
                break
    if not found:  # where there are more doubles of each image than are wanted
        chosen[sizes.argmin()] = True
    return chosen
