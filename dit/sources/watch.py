"""What can change while the settings stay the same: the files in a folder, tar shards, and the commit of a branch of the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from dit.config import FolderData, HubData, WebdatasetData
from dit.errors import UserError, one_line, without_password
from dit.sources.folder import list_files, project_path
from dit.sources.hub import LOGIN, local_folder
from dit.sources.tar_shards import KEY, expand, find_versions

HUB_TIMEOUT = 30.0  # seconds; for one answer of a few kB


def identify(data: Any, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Find out which version of what `data` names would be fetched now.

    What is not here or cannot be reached is taken for unchanged: whoever has pulled data/raw needs no folder and no network.

    Args:
        data: the source's block of params.yaml.
        known: what was returned the last time; {} for nothing.

    Returns:
        The version, {} where the settings alone decide: `folders`, of each one the number and bytes of its files and a SHA-256 of
        their names, sizes and times; `shards`, of each pattern the same, with ETags where there are such; or the `dataset`,
        `asked` (a branch, tag or commit, or None) and `revision`, its commit.
        And lines for the terminal.

    Raises:
        UserError: something is not here, and nothing is known of it.
    """
    if isinstance(data, FolderData):
        return _identify_folders(data.paths, known, "folder.data.paths")
    if isinstance(data, HubData):
        if local_folder(data.dataset) or data.dataset in known.get("folders", {}):
            return _identify_folders((data.dataset,), known, "hub.data.dataset")
        return _identify_commit(data, known)
    if isinstance(data, WebdatasetData):
        return _identify_shards(data.shards, known)
    return {}, []


def _identify_folders(names: tuple[str, ...], known: dict[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    folders, lines = {}, []
    for name in names:
        if project_path(name).is_dir():
            folders[name] = describe_folder(project_path(name))
            lines.append(f"{name}: {folders[name]['files']:,} files, {folders[name]['bytes'] / 1e6:,.1f} MB")
        elif name in known.get("folders", {}):
            folders[name] = known["folders"][name]
            lines.append(f"{name} is not here; taken for unchanged")
        else:
            raise UserError(
                f"{key}: {name} is not a folder; set it to where your images and captions are, or `dvc pull` what was "
                "downloaded from it"
            )
    return {"folders": folders}, lines


def describe_folder(root: Path) -> dict[str, Any]:
    """Return the number and bytes of the files in `root`, and a SHA-256 of their names, sizes and times; no file is read."""
    digest, size, files = hashlib.sha256(), 0, list_files(root)
    for path in files:
        about = (root / path).stat()
        size += about.st_size
        digest.update(os.fsencode(path.as_posix()) + f"\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return {"files": len(files), "bytes": size, "sha256": digest.hexdigest()}


def _identify_shards(patterns: tuple[str, ...], known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    shards, lines = {}, []
    for pattern in patterns:
        name = without_password(pattern)
        try:
            shards[name] = describe_shards(pattern)
            lines.append(f"{name}: {shards[name]['files']:,} shards, {shards[name]['bytes'] / 1e6:,.1f} MB")
        except UserError as error:
            if name not in known.get("shards", {}):
                raise
            shards[name] = known["shards"][name]
            lines.append(f"{error}; {name} is taken for unchanged")
    return {"shards": shards}, lines


def describe_shards(pattern: str) -> dict[str, Any]:
    """Return the number and bytes of the shards that `pattern` names, and a SHA-256 of their names, sizes and times or ETags.

    Raises:
        UserError: none of them is there, or one cannot be reached.
    """
    shards = expand(pattern)
    versions = find_versions(shards)
    found = [version for version in versions if version]
    if not found:
        raise UserError(f"{KEY}: {pattern}: there is no such shard; set it to where your tar files are")
    digest = hashlib.sha256()
    for shard, version in zip(shards, versions, strict=True):
        digest.update(f"{shard.shown}\0{version}\0".encode(errors="surrogateescape"))
    return {"files": len(found), "bytes": sum(size for size, _ in found), "sha256": digest.hexdigest()}


def _identify_commit(data: HubData, known: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    asked = {"dataset": data.dataset, "asked": data.revision}
    if re.fullmatch("[0-9a-f]{40}", data.revision or ""):
        return asked | {"revision": data.revision}, []
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(data.dataset, revision=data.revision, timeout=HUB_TIMEOUT).sha
    except Exception as error:  # of the Hub's library, of its HTTP library, or of an id that is none
        problem = one_line(error, with_type=True)
        if asked.items() <= known.items():
            return known, [f"the Hub does not tell the commit of {data.dataset} ({problem}); taken for unchanged"]
        raise UserError(
            f"hub.data.dataset: {data.dataset!r} is not to be had ({problem}); check the id and the revision; {LOGIN}; "
            "check your network, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    return asked | {"revision": commit}, [f"{data.dataset}: commit {commit}"]


def pin(data: Any, version: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with which exactly `version` of `data` is fetched: the `revision` of a data set of the Hub, or none."""
    if isinstance(data, HubData) and (data.dataset, data.revision) == (version.get("dataset"), version.get("asked")):
        return {"revision": version["revision"]}
    return {}
