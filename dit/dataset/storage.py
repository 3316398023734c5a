"""Store a data set's images as loose files or in WebDataset tar shards, and read both in the same way.

A shard holds, for each image, its bytes as they came and a .json with its name, captions and licence under the same
number, as the WebDataset library reads them. So `dvc push` moves tens of files, not a hundred thousand.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit.errors import UserError
from dit.utils.files import link_or_copy

SHARDS_FROM = 20_000  # images from which on storage "auto" means shards
SHARD_BYTES = 256 * 2**20


def choose_storage(storage: str, count: int) -> str:
    """Return "files" or "shards", where `storage` may leave that to the number of images."""
    if storage == "auto":
        return "shards" if count >= SHARDS_FROM else "files"
    return storage


class LooseFiles:
    """Write each image under its own name."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, name: str, content: bytes, about: dict[str, Any], cached: Path | None = None) -> str:
        """Store an image; return where. A `cached` file with the same bytes is linked: no second copy on disk."""
        if cached:
            link_or_copy(cached, self.folder / name)
        else:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        return name

    def close(self) -> None:
        """Do nothing: every file is complete."""


class TarShards:
    """Write images one after the other into `shards/00000.tar` …, of at most `SHARD_BYTES` each."""

    def __init__(self, folder: Path):
        self.folder = folder / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images = self.shards = self.size = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, name: str, content: bytes, about: dict[str, Any], cached: Path | None = None) -> str:
        """Store an image and, as JSON, what there is to say `about` it; return where: shard/member."""
        text = json.dumps({"file_name": name} | about, ensure_ascii=False).encode()
        needed = sum(tarfile.BLOCKSIZE * (1 + -(-len(part) // tarfile.BLOCKSIZE)) for part in (content, text))
        if self._tar and self.size + needed > SHARD_BYTES:
            self.close()
        if not self._tar:
            self._tar = tarfile.TarFile(self._path(".part"), "w", format=tarfile.USTAR_FORMAT)
        key = f"{self.images:08d}"
        member = key + Path(name).suffix.lower()
        for file, part in ((member, content), (f"{key}.json", text)):
            header = tarfile.TarInfo(file)  # no time, no owner: the same images give the same bytes
            header.size = len(part)
            self._tar.addfile(header, io.BytesIO(part))
        self.images += 1
        self.size += needed
        return f"shards/{self.shards:05d}.tar/{member}"

    def _path(self, end: str = "") -> Path:
        return self.folder / f"{self.shards:05d}.tar{end}"

    def close(self) -> None:
        """Complete the current shard; only now it gets its final name."""
        if self._tar:
            self._tar.close()
            self._path(".part").replace(self._path())
            self._tar, self.size = None, 0
            self.shards += 1


class StoredImages:
    """Read the bytes of the images in a data set's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._members = lru_cache(maxsize=4)(_index)  # images are read in the order of their shards

    def __reduce__(self) -> tuple[type[StoredImages], tuple[Path]]:
        return StoredImages, (self.folder,)  # a worker process reads the shards' headers for itself

    def read(self, stored: str) -> bytes:
        """Read the image that lies at `stored`, as a writer's `add` returned it.

        Raises:
            UserError: it is not there.
        """
        shard, ending, member = stored.partition(".tar/")
        try:
            if not ending:
                return (self.folder / stored).read_bytes()
            path = self.folder / f"{shard}.tar"
            start, size = self._members(path)[member]
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(size)
            if len(content) < size:
                raise EOFError
            return content
        except (OSError, EOFError, KeyError, tarfile.TarError):
            where = self.folder / stored
            raise UserError(f"{where}: missing or not readable; `dvc checkout` brings it back, if DVC has it") from None


def _index(shard: Path) -> dict[str, tuple[int, int]]:
    """Return where in `shard` each member's content begins, and its size in bytes."""
    with tarfile.open(shard, "r:") as archive:
        return {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}
