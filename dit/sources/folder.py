"""Source `folder`: your own images, with captions in .txt files beside them or in lists.

A .txt has its image's name and a caption a line. A list is a metadata.jsonl or metadata.csv, as the Hugging Face data sets
of type imagefolder have them (a `file_name`, relative to the list, and a `text` or `caption`), or a metadata.json as this
project writes it (`image` and `text`). An image may have several captions, in several places.

Names are compared as people mean them: with Windows' separators, in upper or lower case, and with é in one character or in two.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit.config import FolderData, Runtime
from dit.dataset.decode import check_image
from dit.dataset.filters import check_captions, check_name, clean_caption, printable
from dit.errors import UserError, one_line
from dit.sources.writer import DatasetWriter, FetchResult
from dit.utils.files import expand_home

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")
# What operating systems and programs keep beside images; names that begin with a dot (._0.jpg, .DS_Store) are left out, too.
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SYSTEM_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"}
NAME_COLUMNS, TEXT_COLUMNS = ("file_name", "image"), ("text", "caption")


@dataclass
class ImageCaptions:
    """An image file, and where its captions are: some in a .txt, some as the lists have them.

    Attributes:
        path: where the file is.
        shown: the same as the settings write it, with ~ for the home folder: metrics name no user.
        name: in the data set.
        text_file: the .txt beside it.
        listed: captions of lists.
    """

    path: Path
    shown: Path
    name: str
    text_file: Path | None = None
    listed: list[str] = field(default_factory=list)


def fetch(data: FolderData, folder: Path, runtime: Runtime) -> FetchResult:
    """Copy every usable image, byte for byte, and its captions into `folder`."""
    found, result = find_images(data)
    writer = DatasetWriter(folder, data, len(found))
    for image in tqdm(found, desc="copy", unit="image"):
        problem = check_name(image.name)
        if problem:
            result.reject(str(image.shown), problem)
            continue
        try:
            content = image.path.read_bytes()
        except OSError as error:
            result.reject(str(image.shown), f"not readable: {error.strerror}")
            continue
        captions, problem = read_captions(image)
        problem = check_image(content) or problem
        if problem:
            result.reject(str(image.shown), problem)
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
        root = project_path(name)
        if not root.is_dir():
            raise UserError(f"folder.data.paths: {name} is not a folder; set it to where your images and captions are")
        prefix = f"images/{number}/" if len(data.paths) > 1 else "images/"
        found += _find_in(root, Path(name), prefix, result)
    if not found:
        raise UserError(
            f"folder.data.paths: no image with a .txt beside it in {', '.join(data.paths)}; "
            "put cat.jpg and cat.txt (a caption a line) there, or a metadata.jsonl"
        )
    result.unpaired.sort()
    return found, result


def project_path(name: str) -> Path:
    """Return a path of the settings: `~` is the home folder, and a relative one lies in the project.

    `dvc exp run --temp` runs in a copy of what git tracks, and names the project in DVC_ROOT.
    """
    return Path(os.environ.get("DVC_ROOT", "."), expand_home(name))


def _find_in(root: Path, shown: Path, prefix: str, result: FetchResult) -> list[ImageCaptions]:
    """Find the images with captions in the folder `root`, which the settings write as `shown`; names begin with `prefix`."""
    files = list_files(root)
    images = {
        path: ImageCaptions(root / path, shown / path, prefix + path.as_posix())
        for path in files
        if path.suffix.lower() in SUFFIXES
    }
    by_name, by_stem = ByName(), ByName()
    for path, image in images.items():
        by_name.add(path, image)
        by_stem.add(path.with_suffix(""), image)
    for path in files:
        if path.suffix.lower() == ".txt":
            partners = by_stem.find(path.with_suffix(""))
            for image in partners:
                image.text_file = root / path
            if not partners:
                result.leave_unpaired(shown / path)
        elif path.name.lower() in LISTS:
            for row, file_name, text in read_list(root / path):
                problem, listed = _find_listed(root, path.parent, file_name, by_name)
                if listed:
                    listed.listed.append(text)
                else:
                    result.reject(str(shown / path.parent / file_name), f"{path.name}, {row}: {problem}")
        elif path not in images:
            result.leave_out(shown / path)
    for image in images.values():
        if not (image.text_file or image.listed):
            result.leave_unpaired(image.shown)
    return [image for image in images.values() if image.text_file or image.listed]


def _find_listed(root: Path, folder: Path, file_name: str, images: ByName) -> tuple[str | None, ImageCaptions | None]:
    """Return what is wrong with the name of an image in a list that lies in `folder`, or the image."""
    problem = check_name(file_name.strip())
    if problem:
        return problem, None
    path = folder / file_name.strip().replace("\\", "/")
    found = images.find(path)
    if len(found) == 1:
        return None, found[0]
    if found:
        return f"{len(found)} images have this name, but for upper and lower case", None
    return f"not one of {', '.join(SUFFIXES)}" if (root / path).is_file() else "no such image", None


class ByName:
    """Images by a name: by exactly this one, or else by one that differs in case or in how accents are encoded."""

    def __init__(self) -> None:
        self._exact: dict[str, list[ImageCaptions]] = {}
        self._folded: dict[str, list[ImageCaptions]] = {}

    def add(self, path: Path, image: ImageCaptions) -> None:
        """Add an image, which may share its name with others."""
        self._exact.setdefault(path.as_posix(), []).append(image)
        self._folded.setdefault(_fold(path), []).append(image)

    def find(self, path: Path) -> list[ImageCaptions]:
        """Return the images of this name."""
        return self._exact.get(path.as_posix()) or self._folded.get(_fold(path), [])


def _fold(path: Path) -> str:
    return unicodedata.normalize("NFC", path.as_posix()).casefold()


def list_files(root: Path) -> list[Path]:
    """List the files in `root` and its folders, relative to it, sorted; links to folders are followed, each folder once.

    What is hidden or an operating system's own is left out.

    Raises:
        UserError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"folder.data.paths: {printable(error.filename)}: {error.strerror}")

    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # more are added on the way: links come after what lies in the folder itself
        for folder, folders, files in os.walk(start, onerror=fail):
            if (identity := _identity(Path(folder))) in entered:
                folders.clear()
                continue
            entered.add(identity)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS)
            starts += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
            names = (name for name in files if not name.startswith(".") and name.lower() not in SYSTEM_FILES)
            found += [path.relative_to(root) for path in (Path(folder, name) for name in names) if path.is_file()]
    # By parts, as POSIX paths are sorted anyway: Windows would ignore upper and lower case.
    return sorted(found, key=lambda path: path.parts)


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def read_list(path: Path) -> Iterator[tuple[str, str, str]]:
    """Read a list: yield (which row, file name, caption) for each caption; a caption that is a list of texts is several.

    Raises:
        UserError: it is not UTF-8, not of its format, or has no column for names or captions; one line that names the row.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            table = csv.DictReader(io.StringIO(content, newline=""), strict=True)
            _check_columns(path, list(table.fieldnames or []))
            rows = [(f"line {table.line_num}", row) for row in table]
        elif path.suffix == ".jsonl":
            lines = enumerate(content.split("\n"), start=1)
            rows = [(f"line {k}", json.loads(line)) for k, line in lines if line.strip()]
        else:
            listed = json.loads(content)
            rows = [(f"row {k}", row) for k, row in enumerate(listed if isinstance(listed, list) else [listed])]
    except OSError as error:
        raise UserError(f"folder.data.paths: {path} is not readable: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"folder.data.paths: {path} is not UTF-8; save it as UTF-8") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise UserError(f"folder.data.paths: {path} is not readable as {path.suffix[1:].upper()}: {one_line(error)}") from None
    for where, row in rows:
        if isinstance(row, dict) and None in row:
            raise UserError(
                f"folder.data.paths: {path}, {where}: more fields than the {len(row) - 1} columns; "
                'put a caption with a comma in it into quotes: "a cat, sitting on a mat"'
            )
        file_name, text = _column(row, NAME_COLUMNS), _column(row, TEXT_COLUMNS)
        texts = text if isinstance(text, list) else [text]
        if not isinstance(file_name, str) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"folder.data.paths: {path}, {where}: expected file_name and text (a text or a list of texts)")
        for each in texts:
            yield where, file_name, each


def _check_columns(path: Path, columns: list[str]) -> None:
    """Raise a `UserError` where a table has no column for names, or none for captions."""
    for names in (NAME_COLUMNS, TEXT_COLUMNS):
        if not set(names) & set(columns):
            separated = len(columns) == 1 and any(mark in columns[0] for mark in ";\t")
            listed = ", ".join(repr(column[:40]) for column in columns[:8])
            remedy = "separate the columns by commas" if separated else f"it has {listed or 'nothing'}"
            raise UserError(f"folder.data.paths: {path}, line 1: no column {' or '.join(names)}; {remedy}")


def _column(row: Any, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None) if isinstance(row, dict) else None


def read_captions(image: ImageCaptions) -> tuple[list[str], str | None]:
    """Return the captions of an image, lists first, and what is wrong with them, if anything."""
    texts = list(image.listed)
    if image.text_file:
        try:
            texts += image.text_file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError:
            return [], f"{image.text_file.name} is not UTF-8"
        except OSError as error:
            return [], f"{image.text_file.name} is not readable: {error.strerror}"
    captions = [caption for caption in map(clean_caption, texts) if caption]
    if not captions and image.text_file:
        return [], f"no caption in {image.text_file.name}"
    return captions, check_captions(captions)
