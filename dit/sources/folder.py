"""Source `folder`: your own pictures, each with a .txt of the same name beside it, one caption a line."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from dit.config import FolderData, Runtime
from dit.errors import UserError
from dit.sources.dataset import Report, check_image, clean_caption, refuse_too_many_bad, write_dataset

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def find_pairs(data: FolderData) -> tuple[list[tuple[Path, Path, str]], list[str]]:
    """All pictures with captions in `data.paths`, nested folders too: (picture, captions' file, name in the data set).

    Returns:
        the pairs, sorted by name, and the pictures and .txt files that have no partner.

    Raises:
        UserError: a path is no folder, or there is no pair at all.
    """
    pairs, alone = [], []
    for number, name in enumerate(data.paths):
        root = Path(name)
        if not root.is_dir():
            raise UserError(f"folder.data.paths: {name} is not a folder; set it to where your pictures and .txt files are")
        files = {path for path in root.rglob("*") if path.is_file()}
        texts = {path for path in files if path.suffix.lower() == ".txt"}
        captions = {path.with_suffix(""): path for path in texts}
        used = set()
        for picture in sorted(path for path in files if path.suffix.lower() in PICTURES):
            text = captions.get(picture.with_suffix(""))
            if text is None:
                alone.append(str(picture))
                continue
            used.add(text)
            prefix = f"{number}/" if len(data.paths) > 1 else ""
            pairs.append((picture, text, f"images/{prefix}{picture.relative_to(root).as_posix()}"))
        alone += sorted(str(path) for path in texts - used)
    if not pairs:
        raise UserError(
            f"folder.data.paths: no picture with a .txt beside it in {', '.join(data.paths)}; "
            "put cat.jpg and cat.txt (a caption a line) there"
        )
    return pairs, alone


def fetch(data: FolderData, folder: Path, runtime: Runtime) -> Report:
    """Copy every usable pair's picture, byte for byte, and its captions into `folder`."""
    pairs, alone = find_pairs(data)
    report = Report(unpaired=alone)
    captions: dict[str, list[str]] = {}
    for picture, text, name in tqdm(pairs, desc="copy", unit="image"):
        content = picture.read_bytes()
        problem = check_image(content)
        lines: list[str] = []
        if problem is None:
            try:
                lines = [line for line in map(clean_caption, text.read_text(encoding="utf-8-sig").splitlines()) if line]
                problem = None if lines else f"no caption in {text.name}"
            except UnicodeDecodeError:
                problem = f"{text.name} is not UTF-8"
        if problem:
            report.set_aside(str(picture), problem)
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        captions[name] = lines
    refuse_too_many_bad(report, len(pairs), data.max_bad_fraction, "folder.data.max_bad_fraction")
    return write_dataset(folder, captions, data, report)
