"""Find, open and read tar shards of a WebDataset: here, on an HTTP server, or wherever else fsspec reads (a bucket, a host).

A sample is the members whose names are the same up to the first dot, one after the other (github.com/webdataset/webdataset).
Members are read one by one. A shard of an HTTP server is downloaded whole first, as images of COCO are: that resumes, and is
kept. fsspec streams, `BLOCK` bytes at a time.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from dit.errors import UserError, one_line, without_password
from dit.sources.folder import project_path
from dit.sources.http import LATER, Downloader
from dit.utils.files import expand_home

KEY = "webdataset.data.shards"
BLOCK = 2**23  # bytes that are read ahead from a bucket
CONNECTIONS = 16  # at a time, where many shards are asked for their version
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # name of a sample, and what the member is of it
HTTP = ("http://", "https://")


class ShardError(UserError):
    """Why a shard cannot be used, or not all of it, without its name."""


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        address: a path, or an address with `://`.
        shown: the same as the settings write it, without passwords and without the name of the home folder.
    """

    address: str
    shown: str = field(compare=False)


@dataclass
class Sample:
    """What a shard has of one name.

    Attributes:
        name: up to the first dot.
        parts: of each member, by its ending in lower case, the bytes; None where nobody asked for them.
    """

    name: str
    parts: dict[str, bytes | None]


def find_shards(patterns: tuple[str, ...]) -> list[Shard]:
    """List the shards that `patterns` name, in their order, each once; a glob's are sorted. Whether they are there is open.

    Raises:
        UserError: a pattern is not right, or nothing matches it.
    """
    return list(dict.fromkeys(shard for pattern in patterns for shard in expand(pattern)))


def expand(pattern: str) -> list[Shard]:
    """List the shards that one pattern names: a path or an address, with {00000..00012}, *, ? and [] in it.

    Raises:
        UserError: it is not right, or nothing matches it.
    """
    found = [shard for name in _expand_braces(pattern) for shard in (_find_remote(name) if "://" in name else _find_here(name))]
    if not found:
        raise UserError(f"{KEY}: nothing matches {pattern}; set it to where your tar files are")
    return found


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError:
        raise UserError(
            f"{KEY}: braces need the library braceexpand; pip install -c constraints.txt -e '.[webdataset]'"
        ) from None
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"{KEY}: {pattern}: a brace is missing; {{00000..00012}}.tar would be right") from None


def _find_here(name: str) -> list[Shard]:
    if not glob.has_magic(name) or project_path(name).exists():
        return [Shard(str(project_path(name)), name)]
    home = name.split("/")[0] if name.startswith("~") else ""
    root = expand_home(home) + name.removeprefix(home) if home else name
    found = sorted(glob.glob(root, root_dir=os.environ.get("DVC_ROOT"), recursive=True))  # noqa: PTH207 (pathlib: relative alone)
    shown = [home + path.removeprefix(expand_home(home)) if home else path for path in found]
    return [Shard(str(project_path(path)), path) for path in shown]


def _find_remote(name: str) -> list[Shard]:
    if name.startswith(HTTP):
        if "*" in name:
            raise UserError(f"{KEY}: {name}: an HTTP server does not list its files; {{00000..00012}}.tar would be right")
        return [Shard(name, without_password(name))]
    if not glob.has_magic(name):
        return [Shard(name, without_password(name))]
    system, path = _file_system(name)
    with _remote_errors(name):
        system.invalidate_cache()
        found = [system.unstrip_protocol(path) for path in sorted(system.glob(path))]
    return [Shard(address, without_password(address)) for address in found]


def _file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and what the address is called in it."""
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{KEY}: {address}: {one_line(error)}; for s3: pip install -c constraints.txt -e '.[s3]'") from None
    except ValueError as error:
        raise UserError(f"{KEY}: {address}: {one_line(error)}") from None


@contextmanager
def _remote_errors(address: str) -> Iterator[None]:
    """Make a line of whatever a file system raises, but for what says that something is not there."""
    try:
        yield
    except (FileNotFoundError, UserError, tarfile.TarError):
        raise
    except Exception as error:  # each has its own: botocore's, asyncssh's …
        advice = "check the address and your credentials" if isinstance(error, PermissionError) else LATER.split(";")[0]
        raise UserError(f"{KEY}: {address} cannot be read ({one_line(error, with_type=True)}); {advice}") from None


def find_version(shard: Shard, downloader: Downloader) -> tuple[int, str] | None:
    """Return the bytes of a shard, and what changes when it is another one: a time or an ETag; None if it is not there.

    Raises:
        UserError: that cannot be told now.
    """
    if shard.address.startswith(HTTP):
        return downloader.version(shard.address)
    try:
        if "://" not in shard.address:
            about = Path(shard.address).stat()
            return about.st_size, str(about.st_mtime_ns)
        system, path = _file_system(shard.address)
        with _remote_errors(shard.shown):
            system.invalidate_cache()
            known = system.info(path)
            return known["size"] or 0, " ".join(f"{key}={known[key]}" for key in sorted(known))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{KEY}: {shard.shown} is not readable: {error.strerror}") from None


def find_versions(shards: list[Shard]) -> list[tuple[int, str] | None]:
    """Return the version of each shard, as `find_version` does."""
    downloader = Downloader(KEY)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(lambda shard: find_version(shard, downloader), shards))


@contextmanager
def _opened(shard: Shard, downloader: Downloader) -> Iterator[BinaryIO]:
    """Open a shard; raise FileNotFoundError if it is not there."""
    if shard.address.startswith(HTTP):
        version = downloader.version(shard.address)
        if version is None:
            raise FileNotFoundError
        kept, problem = downloader.cached(shard.address, progress=True, version=str(version))
        if problem:
            raise FileNotFoundError
        with kept.open("rb") as file:
            yield file
    elif "://" not in shard.address:
        with Path(shard.address).open("rb") as file:
            yield file
    else:
        system, path = _file_system(shard.address)
        with system.open(path, "rb", block_size=BLOCK) as file:
            yield file


def read_shard(shard: Shard, wanted: set[str], downloader: Downloader) -> Generator[Sample]:
    """Yield the samples of a shard, one after the other; of their members, only those with the endings `wanted` are read.

    Raises:
        ShardError: it is not there, is no tar file, or breaks off; what was yielded before is whole.
        UserError: it cannot be read now.
    """
    try:
        with _remote_errors(shard.shown), _opened(shard, downloader) as file:
            yield from read_samples(file, wanted)
    except FileNotFoundError:
        raise ShardError("no such shard") from None
    except tarfile.TarError as error:
        raise ShardError(f"a damaged shard: {one_line(error)}") from None


def read_samples(file: BinaryIO, wanted: set[str]) -> Iterator[Sample]:
    """Yield the samples of a tar file that can be read from any place; the bytes of one are dropped when the next is read.

    Raises:
        tarfile.TarError: it is no tar file, or breaks off.
    """
    sample = Sample("", {})
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # it grows with the tar file, and is not needed
                found = MEMBER.fullmatch(member.name)
                if not member.isfile() or found is None:
                    continue
                name, end = found[1], found[2].lower()
                if name != sample.name:
                    if sample.parts:
                        yield sample
                        sample.parts.clear()
                    sample = Sample(name, {})
                content = archive.extractfile(member) if end in wanted else None
                sample.parts[end] = content.read() if content else None
            file.seek(archive.offset)
            end_mark = file.read(tarfile.BLOCKSIZE)
    except (EOFError, ValueError, OverflowError) as error:  # of headers that are none
        raise tarfile.ReadError(one_line(error)) from None
    if sample.parts:
        yield sample
    if end_mark != bytes(tarfile.BLOCKSIZE):  # tarfile takes any end for the end
        raise tarfile.ReadError("it breaks off")
