"""Downloads that retry, go on where they broke off, check their length, and never leave half a file under its final name."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from dit.errors import UserError

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
CHUNK = 1 << 14  # bytes; what is lost of a body that breaks off is less
BACK_OFF = 0.2  # seconds before the second try, twice as long before each further one
RETRIES = Retry(total=5, connect=2, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)


class Downloader:
    """Fetches files over HTTP, from several threads if need be; `key` is the setting that errors point to."""

    def __init__(self, key: str):
        self.key = key
        self._local = threading.local()

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.mount("http://", HTTPAdapter(max_retries=RETRIES))
            self._local.session.mount("https://", HTTPAdapter(max_retries=RETRIES))
        return self._local.session

    def check(self, url: str) -> None:
        """Raise a `UserError` unless `url` answers."""
        try:
            answer = self._session().head(url, timeout=TIMEOUT, allow_redirects=True)
        except requests.RequestException as error:
            raise self._unreachable(url, error) from None
        if answer.status_code >= 400:
            raise UserError(f"{self.key}: {url} answers {answer.status_code} {answer.reason}; check the address")

    def cached(self, url: str, progress: bool = False) -> tuple[Path, str | None]:
        """The file at `url`, kept between runs in a folder that DVC does not own, and why the server does not have it."""
        folder, name = url.rsplit("/", 1)
        place = hashlib.sha256(folder.encode()).hexdigest()[:12]
        target = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "downloads" / place / name
        return target, None if target.exists() else self.save(url, target, progress)

    def save(self, url: str, target: Path, progress: bool = False, tries: int = 6) -> str | None:
        """Download `url` to `target`; returns None, or why the server does not have it.

        A body that ends early is gone on with, `tries` times in all; so is one that an earlier, killed run has left. The
        server is told which version the beginning is of (If-Range, RFC 9110 section 13.1.5): if it has changed since, it
        sends the whole file.

        Raises:
            UserError: the server cannot be reached.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part, version = (target.with_name(target.name + end) for end in (".part", ".version"))
        problem = None
        for attempt in range(tries):
            if attempt:
                time.sleep(BACK_OFF * 2 ** (attempt - 1))
            try:
                with self._session().get(url, timeout=TIMEOUT, stream=True, headers=_continue(part, version)) as answer:
                    if answer.status_code in (206, 416) and not _fits(answer, part):
                        version.unlink(missing_ok=True)
                        problem = "the server does not go on where the file broke off"
                    elif answer.status_code >= 400:
                        return f"the server answers {answer.status_code} {answer.reason}"
                    else:
                        problem = _receive(answer, part, version, progress)
            except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ReadTimeout) as error:
                problem = f"the connection broke off ({type(error).__name__})"
            except requests.RequestException as error:
                raise self._unreachable(url, error) from None
            if problem is None:
                version.unlink(missing_ok=True)
                part.replace(target)
                return None
            if not version.exists():
                part.unlink(missing_ok=True)
        return problem

    def _unreachable(self, url: str, error: requests.RequestException) -> UserError:
        text = str(error).lower()
        reason = "refused" if "refused" in text else "unknown name" if "resolve" in text else type(error).__name__
        parts = urlsplit(url)
        return UserError(
            f"{self.key}: cannot reach {parts.scheme}://{parts.netloc} ({reason}); check the address and your network"
        )


def _continue(part: Path, version: Path) -> dict[str, str]:
    """Headers that ask for what is missing of `part`, or for all of it if nobody knows of which version it is."""
    headers = {"Accept-Encoding": "identity"}
    if part.exists() and version.exists():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": version.read_text(encoding="ascii")}
    return headers


def _fits(answer: requests.Response, part: Path) -> bool:
    """Whether a partial answer begins where `part` ends."""
    return answer.headers.get("Content-Range", "").startswith(f"bytes {part.stat().st_size}-")


def _receive(answer: requests.Response, part: Path, version: Path, progress: bool) -> str | None:
    """Write the body behind what `part` has of it, or from the start; returns None, or what is wrong with it."""
    going_on = answer.status_code == 206
    before = part.stat().st_size if going_on else 0
    if not going_on:
        etag = answer.headers.get("ETag", "")
        known = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        version.write_text(known, encoding="ascii") if known else version.unlink(missing_ok=True)
    length = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
    total = None if length is None else before + length
    received = before
    bar = tqdm(total=total, initial=before, desc=part.stem, unit="B", unit_scale=True, disable=not progress)
    with part.open("ab" if going_on else "wb") as file, bar:
        for chunk in answer.iter_content(CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    return None if total in (None, received) else f"{received} of {total} bytes arrived"
