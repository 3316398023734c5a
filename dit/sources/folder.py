"""Source `folder`: your own pictures, with captions in .txt files beside them or in lists.

A .txt has its picture's name and a caption a line. A list is a metadata.jsonl or metadata.csv, as the Hugging Face data sets
of type imagefolder have them (a `file_name`, relative to the list, and a `text` or `caption`), or a metadata.json as this
project writes it (`image` and `text`). An image may have several captions, in several places.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit.config import FolderData, Runtime
from dit.dataset.filters import check_captions, check_image, clean_caption, inside
from dit.errors import UserError
from dit.sources.writer import DatasetWriter, Report, refuse_too_many_bad

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")
NAME_COLUMNS, TEXT_COLUMNS = ("file_name", "image"), ("text", "caption")


@dataclass
class ImageCaptions:
    """A picture, its name in the data set, and where its captions are: some in a .txt, some as the lists have them."""

    picture: Path
    name: str
    text: Path | None = None
    listed: list[str] = field(default_factory=list)


def find_images(data: FolderData) -> tuple[list[ImageCaptions], Report]:
    """All pictures with captions in `data.paths`, nested folders too, sorted by name.

    The report names the pictures and .txt files that have no partner, and sets aside what lists name that is not there.

    Raises:
        UserError: a path is no folder, a list is not readable, or there is no picture with a caption at all.
    """
    found: list[ImageCaptions] = []
    report = Report()
    for number, name in enumerate(data.paths):
        root = Path(name)
        if not root.is_dir():
            raise UserError(f"folder.data.paths: {name} is not a folder; set it to where your pictures and captions are")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        prefix = f"images/{number}/" if len(data.paths) > 1 else "images/"
        pictures = {
            path: ImageCaptions(path, prefix + path.relative_to(root).as_posix()) for path in files if path.suffix.lower() in PICTURES
        }
        by_stem: dict[Path, list[ImageCaptions]] = {}
        for path, captioned in pictures.items():
            by_stem.setdefault(path.with_suffix(""), []).append(captioned)
        for path in files:
            if path.suffix.lower() == ".txt":
                for captioned in by_stem.get(path.with_suffix(""), []):
                    captioned.text = path
                if path.with_suffix("") not in by_stem:
                    report.unpaired.append(str(path))
            elif path.name in LISTS:
                for row, file_name, text in read_list(path):
                    target = path.parent / file_name
                    if not inside(file_name):
                        report.reject(file_name, f"{path.name}, {row}: does not stay in its folder")
                    elif target in pictures:
                        pictures[target].listed += [text]
                    else:
                        report.reject(str(target), f"{path.name}, {row}: no such picture")
        report.unpaired += [str(path) for path, captioned in pictures.items() if not (captioned.text or captioned.listed)]
        found += [captioned for captioned in pictures.values() if captioned.text or captioned.listed]
    if not found:
        raise UserError(
            f"folder.data.paths: no picture with a .txt beside it in {', '.join(data.paths)}; "
            "put cat.jpg and cat.txt (a caption a line) there, or a metadata.jsonl"
        )
    report.unpaired.sort()
    return found, report


def read_list(path: Path) -> Iterator[tuple[str, str, str]]:
    """(which row, file name, caption) for each caption of a list; a caption that is a list of texts is several.

    Raises:
        UserError: it is not UTF-8, not of its format, or has no column for names or captions; one line that names the row.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = [(f"line {k}", row) for k, row in enumerate(csv.DictReader(io.StringIO(content)), start=2)]
        elif path.suffix == ".jsonl":
            lines = enumerate(content.split("\n"), start=1)
            rows = [(f"line {k}", json.loads(line)) for k, line in lines if line.strip()]
        else:
            listed = json.loads(content)
            rows = [(f"row {k}", row) for k, row in enumerate(listed if isinstance(listed, list) else [listed])]
    except UnicodeDecodeError:
        raise UserError(f"folder.data.paths: {path} is not UTF-8; save it as UTF-8") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"folder.data.paths: {path} is not readable as {path.suffix[1:].upper()}: {error}") from None
    for where, row in rows:
        file_name, text = _column(row, NAME_COLUMNS), _column(row, TEXT_COLUMNS)
        texts = text if isinstance(text, list) else [text]
        if not isinstance(file_name, str) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"folder.data.paths: {path}, {where}: expected file_name and text (a text or a list of texts)")
        for each in texts:
            yield where, file_name, each


def _column(row: Any, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None


def read_captions(captioned: ImageCaptions) -> tuple[list[str], str | None]:
    """The captions of a picture, lists first, and what is wrong with them, if anything."""
    texts = list(captioned.listed)
    if captioned.text:
        try:
            texts += captioned.text.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            return [], f"{captioned.text.name} is not UTF-8"
    captions = [caption for caption in map(clean_caption, texts) if caption]
    if not captions and captioned.text:
        return [], f"no caption in {captioned.text.name}"
    return captions, check_captions(captions)


def fetch(data: FolderData, folder: Path, runtime: Runtime) -> Report:
    """Copy every usable picture, byte for byte, and its captions into `folder`."""
    found, report = find_images(data)
    total = len(found) + len(report.bad)
    writer = DatasetWriter(folder, data, len(found))
    for captioned in tqdm(found, desc="copy", unit="image"):
        content = captioned.picture.read_bytes()
        texts, problem = read_captions(captioned)
        problem = check_image(content) or problem
        if problem:
            report.reject(str(captioned.picture), problem)
            continue
        writer.add(captioned.name, content, texts)
    refuse_too_many_bad(report, total, data.max_bad_fraction, "folder.data.max_bad_fraction")
    return writer.close(report)
