"""Downloads that retry, resume where they broke off, check their length, and never leave half a file under its final name.

Only what the server says it does not have (404, 410) is reported as missing. Whatever else goes wrong for longer than the
retries last ends the download with a `UserError`: the same settings must not make another data set because a server was busy.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError, ContentDecodingError, InvalidHeader, ReadTimeout
from tqdm import tqdm
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError, SSLError
from urllib3.util import Retry

from dit.errors import UserError, without_password

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
CHUNK = 1 << 14  # bytes; a body that breaks off loses less
TRIES = 6  # of a body
BACK_OFF = 0.2  # seconds before the second try, twice as long before each further one
GONE = (404, 410)  # the server does not have it, and will not have it tomorrow
BUSY = (408, 425, 429, *range(500, 600))  # may be better in a while
RETRIES = Retry(
    total=5,
    connect=2,
    read=2,
    backoff_factor=0.5,
    status_forcelist=BUSY,
    raise_on_status=False,
    retry_after_max=60,  # seconds of a Retry-After, which is heeded
)
# A body that stalls is a ConnectionError for requests (psf/requests#4882), as is a host that is not there.
BROKE_OFF = (requests.ConnectionError, ReadTimeout, ChunkedEncodingError, ContentDecodingError, InvalidHeader)
NOT_THERE = (NewConnectionError, ConnectTimeoutError, ProxyError, SSLError)
LATER = "try again later; what was downloaded stays, and the next run fetches only what is missing"


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
        self._head(url)

    def version(self, url: str) -> tuple[int, str] | None:
        """Return the bytes at `url` and their ETag, or when they were changed last; None if the server does not have them.

        Raises:
            UserError: the server cannot be reached, or refuses.
        """
        answer = self._head(url, but=GONE)
        if answer.status_code in GONE:
            return None
        headers = answer.headers
        return int(headers.get("Content-Length", 0)), headers.get("ETag") or headers.get("Last-Modified", "")

    def _head(self, url: str, but: tuple[int, ...] = ()) -> requests.Response:
        """Ask for the headers of `url`; raise a `UserError` unless it answers, or refuses with one of the statuses `but`."""
        try:
            answer = self._session().head(url, timeout=TIMEOUT, allow_redirects=True, headers={"Accept-Encoding": "identity"})
        except requests.RequestException as error:
            raise self._unreachable(url, error) from None
        if answer.status_code >= 400 and answer.status_code not in but:
            raise self._refused(url, answer)
        return answer

    def cached(
        self, url: str, check: Callable[[Path], str | None] = lambda path: None, progress: bool = False, version: str = ""
    ) -> tuple[Path, str | None]:
        """Download `url` once, into a folder that is kept between runs and that DVC does not own.

        A file with which something is wrong, as `check` returns it, is downloaded once more: the way may have damaged it. So is
        one that was downloaded as another `version`.

        Returns:
            where the file is, and why it cannot be had or used, if so.

        Raises:
            UserError: the server cannot be reached, refuses, or breaks off again and again.
        """
        address, _, query = url.partition("?")
        folder, name = address.rsplit("/", 1)
        place = hashlib.sha256((folder + query + version).encode()).hexdigest()[:12]
        target = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "downloads" / place / name
        problem = None
        for _ in range(2):
            if not target.exists() and (problem := self.save(url, target, progress)):
                break
            if (problem := check(target)) is None:
                break
            target.unlink()
        return target, problem

    def save(self, url: str, target: Path, progress: bool = False) -> str | None:
        """Download `url` to `target`; return None, or why the server does not have it.

        A body that ends early or stalls is resumed, `TRIES` times in all; so is one that an earlier, killed run has left. The
        request states which version the beginning is of (If-Range, RFC 9110 section 13.1.5): if the file has changed since, the
        server sends all of it.

        Raises:
            UserError: the server cannot be reached, refuses, or breaks off again and again.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part, version = (target.with_name(target.name + end) for end in (".part", ".version"))
        problem = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(BACK_OFF * 2 ** (attempt - 1))
            try:
                with self._session().get(url, timeout=TIMEOUT, stream=True, headers=_resume_headers(part, version)) as answer:
                    if answer.status_code in GONE:
                        return f"the server answers {answer.status_code} {answer.reason}"
                    if answer.status_code in (206, 416) and not _fits(answer, part):
                        version.unlink(missing_ok=True)
                        problem = "the server does not resume where the file broke off"
                    elif answer.status_code not in (200, 206):
                        raise self._refused(url, answer)
                    else:
                        problem = _receive(answer, part, version, progress)
            except requests.RequestException as error:
                reason = getattr(next(iter(error.args), None), "reason", None)  # why urllib3 has given up
                if isinstance(reason, NOT_THERE) or not isinstance(error, BROKE_OFF):
                    raise self._unreachable(url, error) from None
                problem = f"the connection broke off ({type(error).__name__})"
            if problem is None:
                version.unlink(missing_ok=True)
                part.replace(target)
                return None
            if not version.exists():
                part.unlink(missing_ok=True)
        raise UserError(f"{self.key}: {without_password(url)}: {problem}, {TRIES} times; {LATER}")

    def _refused(self, url: str, answer: requests.Response) -> UserError:
        if answer.status_code in BUSY:
            advice = LATER
        elif answer.status_code in (401, 403, 407):
            advice = "check the address, and whether it wants a name and password (http://name:password@…)"
        else:
            advice = "check the address"
        return UserError(f"{self.key}: {without_password(url)} answers {answer.status_code} {answer.reason}; {advice}")

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
        headers |= {"Range": f"bytes={_size(part)}-", "If-Range": version.read_text(encoding="latin-1")}
    return headers


def _fits(answer: requests.Response, part: Path) -> bool:
    """Return whether a partial answer begins where `part` ends."""
    return answer.headers.get("Content-Range", "").startswith(f"bytes {_size(part)}-")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _receive(answer: requests.Response, part: Path, version: Path, progress: bool) -> str | None:
    """Append the body to `part`, or write it from the start; return None, or what is wrong with it.

    Raises:
        requests.RequestException: it is shorter than announced, or does not arrive.
    """
    resumed = answer.status_code == 206
    before = _size(part) if resumed else 0
    if not resumed:
        etag = answer.headers.get("ETag", "")
        known = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
        version.write_text(known, encoding="latin-1") if known else version.unlink(missing_ok=True)
    length = answer.raw.length_remaining  # of the body; None where it is not announced
    total = None if length is None else before + length
    bar = tqdm(total=total, initial=before, desc=part.stem, unit="B", unit_scale=True, disable=not progress)
    with part.open("ab" if resumed else "wb") as file, bar:
        for chunk in answer.iter_content(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    with part.open("rb") as file:
        if file.read(CHUNK).lstrip()[:1] == b"<":  # of HTML or XML; images and archives begin otherwise
            version.unlink(missing_ok=True)
            return "a web page came instead of the file, from a proxy, a login page or the server"
    return None
