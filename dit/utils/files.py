"""Writing files so that nothing incomplete is ever seen under its final name; hashing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`: first to a neighbour, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def expand_home(path: str) -> str:
    """Return a path of the settings with the home folder for a leading `~`; they record it as it is, without anybody's name."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except (RuntimeError, ValueError):  # nobody of that name
        return path


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return sha256_files([path])


def sha256_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the files' bytes, one file after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, without a second copy on disk where the file system can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def warn_stale_state(stage: str, own: Path) -> None:
    """Print what the unfinished work of other settings, in the neighbours of the folder `own`, takes on the disk."""
    others = [path for path in own.parent.glob("*") if path != own]
    size = sum(file.stat().st_size for path in others for file in path.rglob("*") if file.is_file())
    if others:
        print(
            f"{stage}: {own.parent} holds unfinished work of other settings, {size / 1e9:.1f} GB; delete what you do not need",
            flush=True,
        )
