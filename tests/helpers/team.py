"""Users who share a git repository and a DVC storage."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from helpers.clones import Project
from helpers.remotes import Storage


@dataclass
class Team:
    """Users, each with a home in `place`, who share the git repository `hub` and a storage. The owner has run the pipeline."""

    place: Path
    storage: Storage
    owner: Project

    @property
    def hub(self) -> Path:
        return self.place / "hub.git"

    def colleague(self) -> Project:
        """Somebody new, with a clone of the hub."""
        colleague = clone_of(self.hub, Path(tempfile.mkdtemp(prefix="colleague-", dir=self.place)))
        set_own(colleague, self.storage)
        return colleague


def clone_of(url: Path, home: Path) -> Project:
    """`git clone`, in a home of its own."""
    subprocess.run(["git", "clone", "-q", url, home / "project"], check=True)
    return Project(home / "project")


def set_own(project: Project, storage: Storage) -> None:
    """What a user sets beside what git brings."""
    for key, value in storage.own.items():
        project.dvc("remote", "modify", "--local", "storage", key, value)


def form_team(clone: Project, place: Path, storage: Storage) -> Team:
    """A team whose owner has all that was run in `clone`, and has set up the storage and pushed to git as the README says."""
    owner = clone_of(clone.root, place / "owner")
    shutil.copytree(clone.root / ".dvc" / "cache", owner.root / ".dvc" / "cache")
    owner.dvc("checkout")
    owner.dvc("remote", "add", "-d", "storage", storage.url)
    for key, value in {**storage.settings, "verify": "true"}.items():
        owner.dvc("remote", "modify", "storage", key, value)
    set_own(owner, storage)
    owner.run("git", "commit", "-qam", "a storage")
    owner.run("git", "clone", "-q", "--bare", ".", str(place / "hub.git"))
    owner.run("git", "remote", "set-url", "origin", str(place / "hub.git"))
    owner.run("git", "fetch", "-q")
    return Team(place, storage, owner)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
