"""Read which images a data set has, and their captions, as `DatasetWriter` writes them: a row per caption.

Rows are `{"image": "images/x.jpg", "text": "…", "split": "train" | "val"}`, with the address of the image's "licence" where
the source knows it, and where the image is "stored" if that is not under its own name; several may share an image.

Where images are loose files, metadata.json is the list of all rows. Where they are in tar shards, the rows of
shards/00000.tar are the lines of shards/00000.jsonl, those of an image one after the other, and metadata.json names these
files: millions of rows are read one by one. Shards of before, whose rows are all in metadata.json, are read, too.
`source.json` holds the settings that the folder was made from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from dit.dataset.filters import check_name
from dit.errors import UserError

AGAIN = "run `dvc repro download`"
PLACE = np.dtype(
    [("file", "u4"), ("size", "u4"), ("start", "u8")]
)  # of an image's lines: in which file, how many bytes, from where


@dataclass(frozen=True, slots=True)
class Entry:
    """One caption of one image: the image's name, the text, "train" or "val", and where in the folder the image lies."""

    image: str
    text: str
    split: str
    stored: str


def read_metadata(folder: Path) -> Iterator[Entry]:
    """Yield the rows of the data set in `folder`; of tar shards, only one of them is in memory.

    Raises:
        UserError: metadata.json or a file that it names is missing or is not what `DatasetWriter` writes; one line that names
            the row.
    """
    content = _read_index(folder)
    if isinstance(content, list):
        yield from content
        return
    for path in content.files:
        for _, _, entry in _read_lines(path):
            yield entry


def read_images(folder: Path) -> Sequence[list[Entry]]:
    """Return the images of the data set in `folder`, each as the list of its captions; of tar shards, as `StoredRows`.

    Raises:
        UserError: as `read_metadata` does.
    """
    content = _read_index(folder)
    if isinstance(content, list):
        return by_image(content)
    places, captions = bytearray(), 0
    for number, path in enumerate(content.files):
        last, starts, ends = None, [], []
        for start, end, entry in _read_lines(path):
            if entry.image != last:
                last = entry.image
                starts.append(start)
                ends.append(end)
            ends[-1] = end
            captions += 1
        found = np.zeros(len(starts), PLACE)
        found["file"], found["start"], found["size"] = number, starts, np.subtract(ends, starts)
        places += found.tobytes()
    rows = StoredRows(content.files, np.frombuffer(places, PLACE))
    if (len(rows), captions) != (content.images, content.captions):
        raise UserError(
            f"{folder / 'metadata.json'}: {content.images} images with {content.captions} captions expected, "
            f"{len(rows)} with {captions} found; {AGAIN}"
        )
    return rows


class StoredRows(Sequence[list[Entry]]):
    """The images of a data set in tar shards, each as the list of its captions, which are read when they are asked for.

    An image takes 16 bytes of memory. A slice is another `StoredRows`, and reads nothing. Worker processes get copies.

    Args:
        files: the files of rows.
        places: (N,) of `PLACE`, where the rows of each image are in them.
    """

    def __init__(self, files: list[Path], places: np.ndarray):
        self.files, self.places = files, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, k: int) -> list[Entry]: ...

    @overload
    def __getitem__(self, k: slice) -> StoredRows: ...

    def __getitem__(self, k: int | slice) -> list[Entry] | StoredRows:
        if isinstance(k, slice):
            return StoredRows(self.files, self.places[k])
        place = self.places[k]
        return next(iter(StoredRows(self.files, place[None])))

    def __iter__(self) -> Iterator[list[Entry]]:
        changes = np.flatnonzero(np.diff(self.places["file"])) + 1  # each file is opened once while its rows last
        for start, end in zip([0, *changes], [*changes, len(self)], strict=True):
            places = self.places[start:end]
            if not len(places):
                return
            path = self.files[places["file"][0]]
            try:
                with path.open("rb") as file:
                    for place in places:
                        file.seek(place["start"])
                        yield [_parse(line) for line in file.read(place["size"]).splitlines()]
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: changed while it was read ({error}); {AGAIN}") from None


def select_images(images: Sequence[list[Entry]], numbers: np.ndarray) -> Sequence[list[Entry]]:
    """Return those of `images` that have these numbers; of tar shards, as `StoredRows`."""
    if isinstance(images, StoredRows):
        return StoredRows(images.files, images.places[numbers])
    return [images[k] for k in numbers]


def by_image(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Group the captions of each image, in the order in which the images appear."""
    images: dict[str, list[Entry]] = {}
    for entry in entries:
        images.setdefault(entry.image, []).append(entry)
    return list(images.values())


def read_source(folder: Path) -> dict[str, Any]:
    """Read `folder`'s source.json: the settings that it was made from.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "source.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {AGAIN}") from None


@dataclass(frozen=True)
class _Index:
    """What metadata.json says of rows in files of their own."""

    files: list[Path]
    images: int
    captions: int


def _read_index(folder: Path) -> list[Entry] | _Index:
    """Read metadata.json: all rows, or where they are."""
    path = folder / "metadata.json"
    try:
        # Each row becomes an Entry as soon as it is read: 590,000 rows of COCO would be several times as large as dicts.
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_entry)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {AGAIN}") from None
    if isinstance(content, dict):
        names, counts = content.get("files"), (content.get("images"), content.get("captions"))
        if isinstance(names, list) and names and all(isinstance(name, str) and not check_name(name) for name in names):
            images, captions = counts
            if isinstance(images, int) and isinstance(captions, int):
                return _Index([folder / name for name in names], images, captions)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: expected a list of captions, or of files with captions; {AGAIN}")
    for k, row in enumerate(content):
        _check(row, path, f"row {k}")
    return content


def _read_lines(path: Path) -> Iterator[tuple[int, int, Entry]]:
    """Yield where each line of a file of rows begins and ends, and what it says."""
    end = 0
    last = ("", "")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                row = _parse(line)
                if not isinstance(row, Entry) or (row.image, row.stored) != last or row.split not in ("train", "val"):
                    _check(row, path, f"line {number}")
                    last = row.image, row.stored
                yield start, end, row
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is not readable as JSON ({error}); {AGAIN}") from None


def _parse(line: bytes) -> Any:
    return DECODER.decode(line.decode())


def _check(row: Any, path: Path, where: str) -> None:
    """Raise a `UserError` unless what was read is a row, and stays in the folder."""
    if not isinstance(row, Entry):
        raise UserError(f"{path}: {where}: expected image, text and split; {AGAIN}")
    problem = check_name(row.image) or check_name(row.stored)
    if problem or row.split not in ("train", "val"):
        raise UserError(f"{path}: {where}: {problem or 'split must be train or val'}: {row}; {AGAIN}")


def _entry(row: dict[str, Any]) -> Entry | dict[str, Any]:
    """Return the row as an Entry; as it is if it cannot be one."""
    values = row.get("image"), row.get("text"), row.get("split"), row.get("stored", row.get("image"))
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        return row
    image, text, split, stored = texts
    return Entry(sys.intern(image), text, sys.intern(split), sys.intern(stored))


DECODER = json.JSONDecoder(object_hook=_entry)
