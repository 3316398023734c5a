"""Downloads that retry, resume where they broke off, check their length, and never leave half a file under its final name."""

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

from dit.errors import UserError, without_password

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
CHUNK = 1 << 14  # bytes; a body that breaks off loses less
BACK_OFF = 0.2  # seconds before the second try, twice as long before each further one
RETRIES = Retry(total=5, connect=2, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)


class Downloader:
    """Download files over HTTP, from several threads if need be; `key` is the setting that errors point to."""

    def __init__(self, key: str):
        self.key = key
        self._local = threading.local()

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            for scheme in ("http://", "https://"):
                self._local.session.mount(scheme, HTTPAdapter(max_retries=RETRIES))
        return self._local.session

    def check(self, url: str) -> None:
        """Raise a `UserError` unless `url` answers."""
        try:
            answer = self._session().head(url, timeout=TIMEOUT, allow_redirects=True)
        except requests.RequestException as error:
            raise self._unreachable(url, error) from None
        if answer.status_code >= 400:
            raise UserError(
                f"{self.key}: {without_password(url)} answers {answer.status_code} {answer.reason}; check the address"
            )

    def cached(self, url: str, progress: bool = False) -> tuple[Path, str | None]:
        """Download `url` once, into a folder that is kept between runs and that DVC does not own.

        Returns:
            where the file is, and why the server does not have it, if so.
        """
        folder, name = url.rsplit("/", 1)
        place = hashlib.sha256(folder.encode()).hexdigest()[:12]
        target = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "downloads" / place / name
        return target, None if target.exists() else self.save(url, target, progress)

    def save(self, url: str, target: Path, progress: bool = False, tries: int = 6) -> str | None:
        """Download `url` to `target`; return None, or why the server does not have it.

        A body that ends early is resumed, `tries` times in all; so is one that an earlier, killed run has left. The request
        states which version the beginning is of (If-Range, RFC 9110 section 13.1.5): if the file has changed since, the
        server sends all of it.

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
                with self._session().get(url, timeout=TIMEOUT, stream=True, headers=_resume_headers(part, version)) as answer:
                    if answer.status_code in (206, 416) and not _fits(answer, part):
                        version.unlink(missing_ok=True)
                        problem = "the server does not resume where the file broke off"
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
        parts = urlsplit(without_password(url))
        return UserError(
            f"{self.key}: cannot reach {parts.scheme}://{parts.netloc} ({reason}); check the address and your network"
        )


def _resume_headers(part: Path, version: Path) -> dict[str, str]:
    """Return headers that ask for what is missing of `part`, or for all of it if its version is not known."""
    headers = {"Accept-Encoding": "identity"}
    if part.exists() and version.exists():
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": version.read_text(encoding="ascii")}
    return headers


def _fits(answer: requests.Response, part: Path) -> bool:
    """Return whether a partial answer begins where `part` ends."""
    return answer.headers.get("Content-Range", "").startswith(f"bytes {part.stat().st_size}-")


def _receive(answer: requests.Response, part: Path, version: Path, progress: bool) -> str | None:
    """Append the body to `part`, or write it from the start; return None, or what is wrong with it."""
    resumed = answer.status_code == 206
    before = part.stat().st_size if resumed else 0
    if not resumed:
        etag = answer.headers.get("ETag", "")
        known = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        version.write_text(known, encoding="ascii") if known else version.unlink(missing_ok=True)
    length = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
    total = None if length is None else before + length
    received = before
    bar = tqdm(total=total, initial=before, desc=part.stem, unit="B", unit_scale=True, disable=not progress)
    with part.open("ab" if resumed else "wb") as file, bar:
        for chunk in answer.iter_content(CHUNK):
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    return None if total in (None, received) else f"{received} of {total} bytes arrived"
