"""The routes of the Hugging Face Hub that uploading needs: tokens, repositories, branches, preuploads, LFS and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants

from helpers.hub_server import LARGE, Handler, Hub, serve_hub

CARD = "README.md"
LICENCES = {"apache-2.0", "mit", "cc-by-4.0"}  # some that the Hub knows; it refuses a card with another one


@dataclass
class Uploads:
    """What was sent to the server, and how it answers.

    Attributes:
        requests: "METHOD route" of every request.
        objects: large files that have arrived whole, by their SHA-256; a commit may name no other.
        received: the SHA-256 of each large file as often as it arrived.
        commits: (repository, branch, what was added, what was deleted) of each.
        created: the bodies of the requests that made a repository.
        broken: large files that have still to arrive after which the server answers none: None for never.
        on_file: called when a large file has arrived.
        refusing: routes that are answered with a status, by a pattern of them.
    """

    folder: Path
    requests: list[str] = field(default_factory=list)
    objects: dict[str, Path] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    commits: list[tuple[str, str, list[str], list[str]]] = field(default_factory=list)
    created: list[dict] = field(default_factory=list)
    broken: int | None = None
    on_file: Callable[[], None] = lambda: None
    refusing: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class UploadHandler(Handler):
    """`Handler`, and what writes: POST and PUT."""

    ROUTES = (
        ("GET", r"/api/whoami-v2", "tell_who"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "take_file"),
        ("POST", r"/lfs/verify", "verify"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", "take_commit"),
    )

    def do_GET(self) -> None:
        self.route() or super().do_GET()

    def do_POST(self) -> None:
        self.route() or self.refuse(404, "", "no such route")

    do_PUT = do_POST

    def route(self) -> bool:
        """Answer the request, if one of `ROUTES` is for it."""
        uploads, path = self.server.hub.uploads, urlsplit(self.path).path
        uploads.requests.append(f"{self.command} {path}")
        status = next((status for pattern, status in uploads.refusing.items() if re.search(pattern, path)), None)
        if status:
            self.body()
            self.refuse(status, "", "refused by this test")
            return True
        for method, pattern, name in self.ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                getattr(self, name)(*map(unquote, found.groups()))
                return True
        return False

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def may_write(self, repository: str) -> bool:
        """Whether who asks may write to `repository`; answers if not."""
        who = self.who()
        if not who:
            self.refuse(401, "", "Invalid username or password.")
        elif who != (repository.split("/")[0], "write"):
            self.refuse(403, "", f"You don't have the rights to write to {repository}")
        return who == (repository.split("/")[0], "write")

    def tell_who(self) -> None:
        if who := self.who():
            self.send_json({"type": "user", "name": who[0], "orgs": [], "auth": {"accessToken": {"role": who[1]}}})
        else:
            self.refuse(401, "", "Invalid credentials in Authorization header")

    def create(self) -> None:
        wanted, hub = json.loads(self.body()), self.server.hub
        repository = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(repository):
            return
        answer = {"url": f"http://127.0.0.1:{self.server.server_port}/{repository}"}
        if hub.exists(repository):
            return self.send_json(answer | {"error": "You already created this model repo"}, 409)
        hub.uploads.created.append(wanted)
        if wanted.get("visibility") == "private":
            hub.private.add(repository)
        self.store(repository, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send_json(answer)

    def validate(self) -> None:
        card = json.loads(self.body())["content"]
        front = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        wrong = [] if front.get("license") in LICENCES else [{"message": '"license" must be one of those of the list'}]
        wrong += [] if card.startswith("---\n") else [{"message": "empty or missing yaml metadata"}]
        self.send_json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def create_branch(self, repository: str, branch: str) -> None:
        self.body()
        if not self.may_write(repository):
            return
        hub = self.server.hub
        if (repository, branch) in hub.branches:
            return self.refuse(409, "", "Reference already exists")
        hub.branches[repository, branch] = hub.branches[repository, "main"]
        self.send_json({})

    def preupload(self, repository: str, branch: str) -> None:
        files = json.loads(self.body())["files"]
        if not self.may_write(repository):
            return
        found = self.known(repository, branch)
        if not found:
            return
        answers = []
        for file in files:
            mode, there = "lfs" if file["size"] > LARGE else "regular", found[1] / file["path"]
            assert len(base64.b64decode(file["sample"])) == min(512, file["size"])
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            if there.is_file():
                content = there.read_bytes()
                answer["oid"] = git_hash(content) if mode == "regular" else hashlib.sha256(content).hexdigest()
            answers.append(answer)
        self.send_json({"files": answers})

    def batch(self, repository: str) -> None:
        wanted, uploads = json.loads(self.body()), self.server.hub.uploads
        if not self.may_write(repository):
            return
        place, objects = f"http://127.0.0.1:{self.server.server_port}/lfs", []
        for row in wanted["objects"]:
            actions = {"upload": {"href": f"{place}/{row['oid']}"}, "verify": {"href": f"{place}/verify"}}
            objects.append(row | ({} if row["oid"] in uploads.objects else {"actions": actions}))
        self.send_json({"transfer": "basic", "objects": objects})

    def take_file(self, oid: str) -> None:
        """Take a large file if it is what its address says; as on the Hub, that address is of a storage that sees no token."""
        uploads = self.server.hub.uploads
        assert "Authorization" not in self.headers
        with uploads.lock:
            if uploads.broken == 0:
                self.rfile.read(1000)
                self.close_connection = True
                self.connection.close()
                return
            content = self.body()
            if hashlib.sha256(content).hexdigest() != oid:
                return self.refuse(400, "", "the file is not what its SHA-256 says")
            uploads.broken = uploads.broken and uploads.broken - 1
            path = uploads.folder / oid
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            uploads.received.append(oid)
            uploads.objects[oid] = path
            uploads.on_file()
        self.send_json({})

    def verify(self) -> None:
        wanted = json.loads(self.body())
        path = self.server.hub.uploads.objects.get(wanted["oid"])
        if path and path.stat().st_size == wanted["size"]:
            self.send_json({})
        else:
            self.refuse(404, "", "it has not arrived")

    def take_commit(self, repository: str, branch: str) -> None:
        lines, hub = [json.loads(line) for line in self.body().splitlines()], self.server.hub
        if not self.may_write(repository):
            return
        found = self.known(repository, branch)
        if not found:
            return
        files = {path.relative_to(found[1]).as_posix(): path.read_bytes() for path in found[1].rglob("*") if path.is_file()}
        added, deleted = [], []
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "deletedFile":
                del files[value["path"]]
                deleted.append(value["path"])
                continue
            if kind == "lfsFile" and value["oid"] not in hub.uploads.objects:
                return self.refuse(400, "", f"{value['path']} has not been uploaded")
            large = hub.uploads.objects[value["oid"]] if kind == "lfsFile" else None
            files[value["path"]] = large.read_bytes() if large else base64.b64decode(value["content"])
            added.append(value["path"])
        hub.uploads.commits.append((repository, branch, added, deleted))
        commit = self.store(repository, branch, files)
        self.send_json({"commitUrl": f"http://127.0.0.1/{repository}/commit/{commit}", "commitOid": commit, "success": True})

    def store(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        """Store a commit and let the branch be it; return the commit."""
        hub: Hub = self.server.hub
        number = len(hub.uploads.commits)
        commit = hashlib.sha1(f"{repository} {branch} {number}".encode()).hexdigest()
        root = hub.folder / ".commits" / commit
        shutil.rmtree(root, ignore_errors=True)
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        hub.branches[repository, branch] = commit, root
        return commit


@contextmanager
def serve_uploads(folder: Path):
    """Serve a Hub that takes uploads; yields the address and the `Hub`, which has `uploads`."""
    folder.mkdir(parents=True, exist_ok=True)
    with serve_hub(folder, UploadHandler) as (address, hub):
        hub.uploads = Uploads(folder / ".lfs")
        yield address, hub


def use_hub(monkeypatch, address: str, home: Path, token: str | None = None, **others: object) -> None:
    """Let the Hub's library in this process be as if it had been started with these settings, which it reads when imported.

    Xet is off: without it the library sends files as Git LFS does, which is what this server understands.
    """
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in (settings | {"HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False} | others).items():
        assert hasattr(constants, name)
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
