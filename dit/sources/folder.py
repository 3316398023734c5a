"""Source `folder`: your own images, with captions in .txt files beside them or in lists.

A .txt has its image's name and a caption a line. A list is a metadata.jsonl or metadata.csv, as the Hugging Face data sets
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
from dit.errors import UserError, one_line
from dit.sources.writer import DatasetWriter, FetchResult

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")
NAME_COLUMNS, TEXT_COLUMNS = ("file_name", "image"), ("text", "caption")


@dataclass
class ImageCaptions:
    """An image file, its name in the data set, and where its captions are: some in a .txt, some as the lists have them."""

    path: Path
    name: str
    text_file: Path | None = None
    listed: list[str] = field(default_factory=list)


def fetch(data: FolderData, folder: Path, runtime: Runtime) -> FetchResult:
    """Copy every usable image, byte for byte, and its captions into `folder`."""
    found, result = find_images(data)
    writer = DatasetWriter(folder, data, len(found))
    for image in tqdm(found, desc="copy", unit="image"):
        content = image.path.read_bytes()
        captions, problem = read_captions(image)
        problem = check_image(content) or problem
        if problem:
            result.reject(str(image.path), problem)
        else:
            writer.add(image.name, content, captions)
    return writer.close(result)


def find_images(data: FolderData) -> tuple[list[ImageCaptions], FetchResult]:
    """Find all images with captions in `data.paths`, nested folders too, sorted by name.

    The result names the images and .txt files that have no partner, and rejects what lists name that is not there.

    Raises:
        UserError: a path is no folder, a list is not readable, or there is no image with a caption at all.
    """
    found: list[ImageCaptions] = []
    result = FetchResult()
    for number, name in enumerate(data.paths):
        root = Path(name)
        if not root.is_dir():
            raise UserError(f"folder.data.paths: {name} is not a folder; set it to where your images and captions are")
        prefix = f"images/{number}/" if len(data.paths) > 1 else "images/"
        found += _find_in(root, prefix, result)
    if not found:
        raise UserError(
            f"folder.data.paths: no image with a .txt beside it in {', '.join(data.paths)}; "
            "put cat.jpg and cat.txt (a caption a line) there, or a metadata.jsonl"
        )
    result.unpaired.sort()
    return found, result


def _find_in(root: Path, prefix: str, result: FetchResult) -> list[ImageCaptions]:
    """Find the images with captions in one folder; their names begin with `prefix`."""
    # By parts, as POSIX paths are sorted anyway: Windows would ignore upper and lower case.
    files = sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.parts)
    images = {
        path: ImageCaptions(path, prefix + path.relative_to(root).as_posix()) for path in files if path.suffix.lower() in SUFFIXES
    }
    by_stem: dict[Path, list[ImageCaptions]] = {}
    for path, image in images.items():
        by_stem.setdefault(path.with_suffix(""), []).append(image)
    for path in files:
        if path.suffix.lower() == ".txt":
            for image in by_stem.get(path.with_suffix(""), []):
                image.text_file = path
            if path.with_suffix("") not in by_stem:
                result.unpaired.append(str(path))
        elif path.name in LISTS:
            for row, file_name, text in read_list(path):
                target = path.parent / file_name
                if not inside(file_name):
                    result.reject(file_name, f"{path.name}, {row}: does not stay in its folder")
                elif target in images:
                    images[target].listed.append(text)
                else:
                    result.reject(str(target), f"{path.name}, {row}: no such image")
    captioned = [image for image in images.values() if image.text_file or image.listed]
    result.unpaired += [str(image.path) for image in images.values() if not (image.text_file or image.listed)]
    return captioned


def read_list(path: Path) -> Iterator[tuple[str, str, str]]:
    """Read a list: yield (which row, file name, caption) for each caption; a caption that is a list of texts is several.

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
        raise UserError(f"folder.data.paths: {path} is not readable as {path.suffix[1:].upper()}: {one_line(error)}") from None
    for where, row in rows:
        file_name, text = _column(row, NAME_COLUMNS), _column(row, TEXT_COLUMNS)
        texts = text if isinstance(text, list) else [text]
        if not isinstance(file_name, str) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"folder.data.paths: {path}, {where}: expected file_name and text (a text or a list of texts)")
        for each in texts:
            yield where, file_name, each


def _column(row: Any, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None


def read_captions(image: ImageCaptions) -> tuple[list[str], str | None]:
    """Return the captions of an image, lists first, and what is wrong with them, if anything."""
    texts = list(image.listed)
    if image.text_file:
        try:
            texts += image.text_file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            return [], f"{image.text_file.name} is not UTF-8"
    captions = [caption for caption in map(clean_caption, texts) if caption]
    if not captions and image.text_file:
        return [], f"no caption in {image.text_file.name}"
    return captions, check_captions(captions)
