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
SYSTEM_FILES = {
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "picasa.ini",
    "icon\r",
    "desktop db",
    "desktop df",
}
SYSTEM_ENDS = (":zone.identifier", ":encryptable")  # of files that Windows' streams become on other file systems
SYSTEM_FOLDERS = {
    *("__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle"),
    *("network trash folder", "temporary items"),
}
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
    entered: set[tuple[int, int]] = set()
    for number, name in enumerate(data.paths):
        root = project_path(name)
        if not root.is_dir():
            raise UserError(f"folder.data.paths: {name} is not a folder; set it to where your images and captions are")
        prefix = f"images/{number}/" if len(data.paths) > 1 else "images/"
        found += _find_in(root, Path(name), prefix, result, entered)
    if not found:
        problem = (
            f"folder.data.paths: no image with a .txt beside it in {', '.join(data.paths)}; "
            "put cat.jpg and cat.txt (a caption a line) there, or a metadata.jsonl"
        )
        raise UserError("; ".join([problem, *result.left_out()]))
    result.unpaired.sort()
    return found, result


def project_path(name: str) -> Path:
    """Return a path of the settings: `~` is the home folder, and a relative one lies in the project.

    `dvc exp run --temp` runs in a copy of what git tracks, and names the project in DVC_ROOT.
    """
    return Path(os.environ.get("DVC_ROOT", "."), expand_home(name))


def _find_in(root: Path, shown: Path, prefix: str, result: FetchResult, entered: set[tuple[int, int]]) -> list[ImageCaptions]:
    """Find the images with captions in the folder `root`, which the settings write as `shown`; names begin with `prefix`."""
    unusable: list[Path] = []
    files = list_files(root, entered, unusable)
    images = {
        path: ImageCaptions(root / path, shown / path, prefix + path.as_posix())
        for path in files
        if path.suffix.lower() in SUFFIXES
    }
    by_name, by_stem = ByName(), ByName()
    for path, image in images.items():
        by_name.add(path, image)
        by_stem.add(path.with_suffix(""), image)
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    for path in texts:
        for image in by_stem.exact(path.with_suffix("")):
            image.text_file = root / path
    for path in texts:
        if not by_stem.exact(path.with_suffix("")):
            partners = [image for image in by_stem.find(path.with_suffix("")) if image.text_file is None]
            for image in partners:
                image.text_file = root / path
            if not partners:
                result.leave_unpaired(shown / path)
    for path in files:
        if path.name.lower() in LISTS:
            for row, file_name, text in read_list(root / path):
                problem, listed = _find_listed(root, path.parent, file_name, by_name)
                if listed:
                    listed.listed.append(text)
                else:
                    result.reject(str(shown / path.parent / file_name), f"{path.name}, {row}: {problem}")
        elif path.suffix.lower() != ".txt" and path not in images:
            result.leave_out(shown / path)
    for path in sorted(unusable):
        result.leave_out(shown / path, "links to nothing and other things that are no files")
    for image in images.values():
        if not (image.text_file or image.listed):
            result.leave_unpaired(image.shown)
    return [image for image in images.values() if image.text_file or image.listed]


def _find_listed(root: Path, folder: Path, file_name: str, images: ByName) -> tuple[str | None, ImageCaptions | None]:
    """Return what is wrong with the name of an image in a list that lies in `folder`, or the image."""
    found = images.exact(folder / file_name)  # which lies in the folder, whatever it looks like
    if not found:
        problem = check_name(file_name.strip())
        if problem:
            return problem, None
        path = folder / file_name.strip().replace("\\", "/")
        found = images.find(path)
    if len(found) == 1:
        return None, found[0]
    if found:
        return f"{len(found)} images have this name, but for upper and lower case", None
    if not (root / path).exists():
        return "no such image", None
    known = path.suffix.lower() in SUFFIXES
    return "hidden, or there under another name by a link" if known else f"not one of {', '.join(SUFFIXES)}", None


class ByName:
    """Images by a name: by exactly this one, or else by one that differs in case, in blanks or in how accents are encoded."""

    def __init__(self) -> None:
        self._exact: dict[str, list[ImageCaptions]] = {}
        self._folded: dict[str, list[ImageCaptions]] = {}

    def add(self, path: Path, image: ImageCaptions) -> None:
        """Add an image, which may share its name with others."""
        self._exact.setdefault(path.as_posix(), []).append(image)
        self._folded.setdefault(_fold(path), []).append(image)

    def exact(self, path: Path) -> list[ImageCaptions]:
        """Return the images of exactly this name."""
        return self._exact.get(path.as_posix(), [])

    def find(self, path: Path) -> list[ImageCaptions]:
        """Return the images of this name."""
        return self.exact(path) or self._folded.get(_fold(path), [])


def _fold(path: Path) -> str:
    return " ".join(unicodedata.normalize("NFC", path.as_posix()).casefold().replace("\\", "/").split())


def list_files(root: Path, entered: set[tuple[int, int]] | None = None, unusable: list[Path] | None = None) -> list[Path]:
    """List the files in `root` and its folders, relative to it, sorted; links to folders are followed, each folder once.

    What is hidden or an operating system's own is left out.

    Args:
        root: the folder.
        entered: folders that are not entered again, by device and number; those that are entered are added.
        unusable: what is no file that can be read, links to nothing for instance, is added.

    Raises:
        UserError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"folder.data.paths: {printable(error.filename)}: {error.strerror}")

    found: list[Path] = []
    entered = set() if entered is None else entered
    starts = [root]
    for start in starts:  # more are added on the way: links come after what lies in the folder itself
        for folder, folders, files in os.walk(start, onerror=fail):
            if (identity := _identity(Path(folder))) in entered:
                folders.clear()
                continue
            entered.add(identity)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS)
            starts += [Path(folder, name) for name in folders if Path(folder, name).is_symlink()]
            for name in files:
                if name.startswith(".") or name.lower() in SYSTEM_FILES or name.lower().endswith(SYSTEM_ENDS):
                    continue
                usable = os.path.isfile(Path(folder, name))  # noqa: PTH113 (Path.is_file raises where a link leads out of reach)
                if usable:
                    found.append(Path(folder, name).relative_to(root))
                elif unusable is not None:
                    unusable.append(Path(folder, name).relative_to(root))
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
    except OSError as error:
        raise UserError(f"folder.data.paths: {path} is not readable: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"folder.data.paths: {path} is not UTF-8; save it as UTF-8") from None
    rows: Iterator[tuple[str, Any]] = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[path.suffix.lower()](
        path, content
    )
    for where, row in rows:
        file_name, text = _column(row, NAME_COLUMNS), _column(row, TEXT_COLUMNS)
        texts = [each or "" for each in text] if isinstance(text, list) else [text or ""]  # null is no caption
        has_text = isinstance(row, dict) and any(name in row for name in TEXT_COLUMNS)
        if not has_text or not isinstance(file_name, str) or not all(isinstance(each, str) for each in texts):
            raise UserError(f"folder.data.paths: {path}, {where}: expected file_name and text (a text or a list of texts)")
        for each in texts:
            yield where, file_name, each


def _csv_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    table = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        table.fieldnames = columns = [column.strip() for column in table.fieldnames or []]
        _check_columns(path, columns)
        for row in table:
            if None in row or row.get(""):
                raise UserError(
                    f"folder.data.paths: {path}, line {table.line_num}: more fields than the {len(list(filter(None, columns)))} "
                    'columns; put a caption with a comma in it into quotes: "a cat, sitting on a mat"'
                )
            yield f"line {table.line_num}", row
    except csv.Error as error:
        raise _unreadable(path, f"line {table.reader.line_num}", error) from None


def _jsonl_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(path, f"line {number}", error) from None
            yield f"line {number}", row


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "", error) from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield f"row {number}", row


def _unreadable(path: Path, where: str, error: Exception) -> UserError:
    place = f"{path}, {where}" if where else str(path)
    return UserError(f"folder.data.paths: {place} is not readable as {path.suffix[1:].upper()}: {one_line(error)}")


def _check_columns(path: Path, columns: list[str]) -> None:
    """Raise a `UserError` where a table has no column for names, or none for captions, or two of a name."""
    for names in (NAME_COLUMNS, TEXT_COLUMNS):
        if not set(names) & set(columns):
            separated = len(columns) == 1 and any(mark in columns[0] for mark in ";\t")
            listed = ", ".join(repr(column[:40]) for column in columns[:8])
            remedy = "separate the columns by commas" if separated else f"it has {listed or 'nothing'}"
            raise UserError(f"folder.data.paths: {path}, line 1: no column {' or '.join(names)}; {remedy}")
    double = next((column for column in columns if column and columns.count(column) > 1), None)
    if double:
        raise UserError(
            f"folder.data.paths: {path}, line 1: two columns {double[:40]!r}; several captions of an image go into rows"
        )


def _column(row: Any, names: tuple[str, ...]) -> Any:
    """Return the value of the first of these columns that has one."""
    values = [row[name] for name in names if name in row] if isinstance(row, dict) else []
    return next((value for value in values if value not in (None, "")), values[0] if values else None)


def read_captions(image: ImageCaptions) -> tuple[list[str], str | None]:
    """Return the captions of an image, lists first, and what is wrong with them, if anything."""
    texts = list(image.listed)
    if image.text_file:
        try:
            content = image.text_file.read_text(encoding="utf-8-sig")
            if "\0" in content:  # of UTF-16, which begins without a mark
                return [], f"{image.text_file.name} is not UTF-8"
            texts += content.split("\n")
        except UnicodeDecodeError:
            return [], f"{image.text_file.name} is not UTF-8"
        except OSError as error:
            return [], f"{image.text_file.name} is not readable: {error.strerror}"
    captions = list(dict.fromkeys(caption for caption in map(clean_caption, texts) if caption))
    if not captions and image.text_file:
        return [], f"no caption in {image.text_file.name}"
    return captions, check_captions(captions)
