"""A file server on loopback that plays tricks with some of its answers, and a COCO mirror to serve."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import threading
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dit.dataset.filters import check_name
from helpers.sources import noise_file

DELAY = 0.3  # seconds
LOGIN_PAGE = b"\n<!DOCTYPE html><html><body>Log in to the network of this hotel</body></html>"


@dataclass
class Log:
    """What a server did: (name, first byte asked for or None) of every request, and how often it played which trick."""

    asked: list[tuple[str, int | None]] = field(default_factory=list)
    tricks: Counter[str] = field(default_factory=Counter)

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder with ETag, Range and If-Range (RFC 9110, sections 13 and 14).

    Tricks: `drop` closes the connection instead of an answer; `delay` waits before it; `truncate` closes in the middle of the
    body; `stall` sends half of it, and nothing more for as long as the client waits; `overstate` announces a byte more than
    there is; `damage` sends half of the file as if it were all; `page` sends a web page instead; `moved` redirects to the same
    address; a number is a status, with what may follow it as Retry-After: `503`, `429 0`.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        with self.server.lock:
            self.server.log.asked.append((path.name, int(wanted[1]) if wanted else None))
            trick = self.server.choose(path.name)
            if trick:
                self.server.log.tricks[trick] += 1
        if trick == "drop":
            self.close_connection = True
            return
        if trick == "delay":
            time.sleep(DELAY)
        if not path.is_file():
            trick = "404"
        if trick and trick[0].isdigit():
            status, _, wait = trick.partition(" ")
            self.send_response(int(status))
            if wait:
                self.send_header("Retry-After", wait)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if trick == "moved":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = LOGIN_PAGE if trick == "page" else path.read_bytes()
        if trick == "damage":
            content = content[: len(content) // 2]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start = int(wanted[1]) if wanted and self.headers.get("If-Range") == etag else 0
        if start > len(content) or (start and start == len(content)):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(content) - start + (trick == "overstate")))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: len(body) // 2] if trick in ("truncate", "stall") else body)
        if trick == "stall":
            self.wfile.flush()
            self.rfile.read(1)  # returns when the client has closed the connection
        self.close_connection |= trick in ("truncate", "stall", "overstate")


@contextmanager
def listening(handler, **attributes):
    """Answer requests with `handler`, which finds `attributes` in its `server`; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serve(folder: Path, choose=lambda name: None):
    """Serve `folder`; yields its address and a `Log`. `choose(name)` returns which trick, if any, is played on a request."""
    log, handler = Log(), functools.partial(Handler, directory=str(folder))
    ignored = {"handle_error": lambda *_: None}  # a client that was killed is no news
    with listening(handler, log=log, lock=threading.Lock(), choose=choose, **ignored) as address:
        yield address, log


def bad_connection(share: float, seed: int = 0):
    """A `choose` that plays some trick on the share `share` of the requests."""
    rng = random.Random(seed)
    return lambda name: rng.choice(["drop", "delay", "truncate"]) if rng.random() < share else None


def once(trick: str, names):
    """A `choose` that plays `trick` on the first request for each of `names`."""
    left = set(names)

    def choose(name: str) -> str | None:
        if name in left:
            left.discard(name)
            return trick
        return None

    return choose


def always(trick: str, names):
    """A `choose` that plays `trick` on every request for one of `names`."""
    return lambda name: trick if name in names else None


def make_mirror(folder: Path, names: list[str], split: str = "val2017") -> None:
    """The layout of the COCO site; image k has licence k, of which the first three are known."""
    images = [{"id": 100 - k, "file_name": name, "license": k} for k, name in enumerate(names)]
    rows = [
        {"id": 10 * k + c, "image_id": 100 - k, "caption": f"caption {c} of {k}\n"} for k in range(len(names)) for c in range(3)
    ]
    licences = [{"id": k, "url": f"https://example.org/{k}"} for k in range(3)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir()
    with zipfile.ZipFile(folder / "annotations" / "annotations_trainval2017.zip", "a") as archive:
        content = {"licenses": licences, "images": images, "annotations": rows}
        archive.writestr(f"annotations/captions_{split}.json", json.dumps(content))
    for k, name in enumerate(names):
        if not check_name(name) and "/" not in name:
            (folder / split / name).write_bytes(noise_file(k, (320, 240)))
