"""Downloads that retry, check their length, and never leave half a file under its final name."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from dit.errors import UserError

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
CHUNK = 1 << 20
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

    def cached(self, url: str) -> Path:
        """The file at `url`, kept between runs in a folder that DVC does not own."""
        place = hashlib.sha256(url.encode()).hexdigest()[:12]
        target = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "downloads" / place / Path(urlsplit(url).path).name
        if not target.exists():
            problem = self.save(url, target, progress=True)
            if problem:
                raise UserError(f"{self.key}: {url}: {problem}")
        return target

    def save(self, url: str, target: Path, progress: bool = False, tries: int = 4) -> str | None:
        """Download `url` to `target`; returns None, or why the server does not have it.

        A body that ends early is asked for again, `tries` times in all.

        Raises:
            UserError: the server cannot be reached.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        problem = None
        for _ in range(tries):
            try:
                with self._session().get(url, timeout=TIMEOUT, stream=True, headers={"Accept-Encoding": "identity"}) as answer:
                    if answer.status_code >= 400:
                        return f"the server answers {answer.status_code} {answer.reason}"
                    problem = self._receive(answer, part, progress)
            except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ReadTimeout) as error:
                problem = f"the connection broke off ({type(error).__name__})"
            except requests.RequestException as error:
                part.unlink(missing_ok=True)
                raise self._unreachable(url, error) from None
            if problem is None:
                part.replace(target)
                return None
        part.unlink(missing_ok=True)
        return problem

    @staticmethod
    def _receive(answer: requests.Response, part: Path, progress: bool) -> str | None:
        length = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
        received = 0
        bar = tqdm(total=length, desc=part.name.removesuffix(".part"), unit="B", unit_scale=True, disable=not progress)
        with part.open("wb") as file, bar:
            for chunk in answer.iter_content(CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        return None if length in (None, received) else f"{received} of {length} bytes arrived"

    def _unreachable(self, url: str, error: requests.RequestException) -> UserError:
        text = str(error).lower()
        reason = "refused" if "refused" in text else "unknown name" if "resolve" in text else type(error).__name__
        parts = urlsplit(url)
        return UserError(
            f"{self.key}: cannot reach {parts.scheme}://{parts.netloc} ({reason}); check the address and your network"
        )
