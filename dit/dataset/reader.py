"""Read `metadata.json`, which every source writes beside the images: a row per caption.

Rows are `{"image": "images/x.jpg", "text": "…", "split": "train" | "val"}`, with the address of the image's "licence" where
the source knows it, and where the image is "stored" if that is not under its own name; several may share an image.
`source.json` holds the settings that the folder was made from.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.dataset.filters import check_name
from dit.errors import UserError

AGAIN = "run `dvc repro download`"


@dataclass(frozen=True, slots=True)
class Entry:
    """One caption of one image: the image's name, the text, "train" or "val", and where in the folder the image lies."""

    image: str
    text: str
    split: str
    stored: str


def read_metadata(folder: Path) -> list[Entry]:
    """Read the rows of `folder`'s metadata.json.

    Raises:
        UserError: it is missing or is not what `DatasetWriter` writes; one line that names the row.
    """
    path = folder / "metadata.json"
    try:
        # Each row becomes an Entry as soon as it is read: 590,000 rows of COCO would be several times as large as dicts.
        rows = json.loads(path.read_text(encoding="utf-8"), object_hook=_entry)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); {AGAIN}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of captions; {AGAIN}")
    for k, row in enumerate(rows):
        if not isinstance(row, Entry):
            raise UserError(f"{path}: row {k}: expected image, text and split; {AGAIN}")
        problem = check_name(row.image) or check_name(row.stored)
        if problem or row.split not in ("train", "val"):
            raise UserError(f"{path}: row {k}: {problem or 'split must be train or val'}: {row}; {AGAIN}")
    return rows


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


def _entry(row: dict[str, Any]) -> Entry | dict[str, Any]:
    """Return the row as an Entry; as it is if it cannot be one."""
    values = row.get("image"), row.get("text"), row.get("split"), row.get("stored", row.get("image"))
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(values):
        return row
    image, text, split, stored = texts
    return Entry(sys.intern(image), text, sys.intern(split), sys.intern(stored))


def by_image(entries: list[Entry]) -> list[list[Entry]]:
    """Group the captions of each image, in the order in which the images appear."""
    images: dict[str, list[Entry]] = {}
    for entry in entries:
        images.setdefault(entry.image, []).append(entry)
    return list(images.values())
