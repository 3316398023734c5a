"""A loopback server that speaks the Hugging Face Hub's routes, as far as downloading needs them; hub_uploads.py has the rest."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

from helpers.servers import listening

LARGE = 10_000  # bytes from which on a file is redirected, as large files are on the Hub


def commit_of(repository: str) -> str:
    """The one commit that `repository` has; its names are main, v1 and the commit itself."""
    return hashlib.sha1(repository.encode()).hexdigest()


@dataclass
class Hub:
    """A folder of repositories, owner/name/files, and what was asked for.

    Attributes:
        gated: repositories whose files nobody may download.
        cut: names of files whose first answer breaks off half-way; `always_cut` every answer.
        down: the status that every request is answered with, if not 0.
        asked: (file, first byte) of every request for a file's content.
        pushed: what main is since a push, by repository; its files stay as they are.
        revisions: those at which files were asked for.
        private: repositories that nobody sees without one of `tokens`.
        tokens: who has which, and whether it may "read" or "write".
        branches: (commit, folder of its files) of each branch of a repository that was really pushed, by (repository, branch).
    """

    folder: Path
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    always_cut: set[str] = field(default_factory=set)
    down: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list)
    pushed: dict[str, str] = field(default_factory=dict)
    revisions: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)
    branches: dict[tuple[str, str], tuple[str, Path]] = field(default_factory=dict)

    def find(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Return the commit that a revision of a repository is, and the folder of its files; None if there is none."""
        for (name, branch), (commit, folder) in self.branches.items():
            if name == repository and revision in (branch, commit):
                return commit, folder
        first, main = commit_of(repository), self.pushed.get(repository, commit_of(repository))
        commit = {"v1": first, first: first, "main": main, main: main}.get(revision)
        return (commit, self.folder / repository) if commit and (self.folder / repository).is_dir() else None

    def exists(self, repository: str) -> bool:
        return (self.folder / repository).is_dir() or any(name == repository for name, _ in self.branches)


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of model information, of trees and of files."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        if self.server.hub.down:
            return self.refuse(self.server.hub.down, "", "")
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", path):
            return self.describe(*found.groups())
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return self.list_files(*found.groups(), recursive="recursive=true" in query.lower())
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)", path):
            return self.describe(found[1], "main")
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*found.groups())
        if found := re.fullmatch(r"/cdn/(.+)", path):
            return self.send_file(self.server.hub.folder / found[1])
        return self.refuse(404, "", "no such route")

    def who(self) -> tuple[str, str] | None:
        """Return who asks, and whether the token may "read" or "write"; None without a token, or with one that nobody has."""
        return self.server.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def known(self, repository: str, revision: str) -> tuple[str, Path] | None:
        """Return the commit and the folder of a revision; answers if there is none, as the Hub does."""
        hub = self.server.hub
        if not hub.exists(repository) or (repository in hub.private and not self.who()):
            return self.refuse(401, "RepoNotFound", "Repository not found")  # as it says to one who is not logged in
        return hub.find(repository, revision) or self.refuse(404, "RevisionNotFound", "Revision not found")

    def describe(self, repository: str, revision: str) -> None:
        if found := self.known(repository, revision):
            sha, root = found
            siblings = [{"rfilename": path.relative_to(root).as_posix()} for path in sorted(root.rglob("*")) if path.is_file()]
            private = repository in self.server.hub.private
            self.send_json({"id": repository, "sha": sha, "siblings": siblings, "private": private, "tags": [], "downloads": 0})

    def list_files(self, repository: str, revision: str, within: str, recursive: bool) -> None:
        found = self.known(repository, revision)
        if not found:
            return
        root = found[1]
        rows = []
        for path in sorted((root / within).rglob("*") if recursive else (root / within).glob("*")):
            row = {"type": "directory", "path": path.relative_to(root).as_posix(), "size": 0, "oid": "0" * 40}
            if path.is_file():
                row |= {"type": "file", "size": path.stat().st_size}
            if row["size"] > LARGE:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                row["lfs"] = {"oid": digest, "size": row["size"], "pointerSize": 130}
            rows.append(row)
        self.send_json(rows)

    def send_json(self, answer: object, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def resolve(self, repository: str, revision: str, name: str) -> None:
        found = self.known(repository, revision)
        if not found:
            return
        commit, root = found
        self.server.hub.revisions.add(revision)
        path = root / name
        if repository in self.server.hub.gated:
            self.refuse(401, "GatedRepo", "Access to this model is restricted")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path.stat().st_size > LARGE:
            self.send_response(302)
            self.about(path, commit)
            # Another host, as on the Hub: the library follows a redirection to it for GET only.
            place = path.relative_to(self.server.hub.folder).as_posix()
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{place}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_file(path, commit)

    def about(self, path: Path, commit: str) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("ETag", f'"{digest}"')

    def send_file(self, path: Path, commit: str | None = None) -> None:
        hub = self.server.hub
        content = path.read_bytes()
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if self.command == "GET":
            hub.asked.append((path.relative_to(hub.folder).as_posix(), start))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if commit:
            self.about(path, commit)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start:]
        if path.name in hub.cut | hub.always_cut:
            hub.cut.discard(path.name)
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve_hub(folder: Path, handler: type[Handler] = Handler):
    """Serve the repositories in `folder`; yields the address and the `Hub`."""
    hub = Hub(folder)
    with listening(handler, hub=hub) as address:
        yield address, hub
