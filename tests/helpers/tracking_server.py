"""A real `mlflow server` on loopback, which can be killed and started again, with sqlite or PostgreSQL behind it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.remotes import free_port

PATIENCE = 90  # seconds for a server to answer


class TrackingServer:
    """`mlflow server` with its store and artifacts in `folder`."""

    def __init__(self, folder: Path, store: str, **variables: str):
        self._folder, self._store, self._variables = folder, store, variables
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store, "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self._port)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | self._variables
        self._log = (self._folder / "server.log").open("a")
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, start_new_session=True, env=environment, cwd=self._folder
        )
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        pytest.fail((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """End it without warning, with all its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()


@contextmanager
def mlflow_server(folder: Path, backend: str = "sqlite", **variables: str) -> Iterator[TrackingServer]:
    """Run a server; `backend` is sqlite or postgresql, and the latter skips the test where it is not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    with postgresql(folder) if backend == "postgresql" else _sqlite(folder) as store:
        server = TrackingServer(folder, store, **variables)
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def _sqlite(folder: Path) -> Iterator[str]:
    yield f"sqlite:///{folder / 'server.db'}"


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL server on loopback, as its own user where this one is root, which it refuses to run as."""
    initdb = shutil.which("initdb")
    if not initdb:
        pytest.skip("PostgreSQL is not installed: no initdb")
    programs = Path(initdb).resolve().parent
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    data = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    if user:
        shutil.chown(data, "postgres", "postgres")
    port = free_port()
    try:
        for command in (
            [programs / "initdb", "-D", data / "db", "-U", "dit", "-A", "trust"],
            [programs / "pg_ctl", "-D", data / "db", "-l", data / "log", "-w", "-o", f"-p {port} -k {data}", "start"],
        ):
            done = subprocess.run(
                [*user, *command], capture_output=True, text=True, cwd="/", close_fds=True, stdin=subprocess.DEVNULL
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield f"postgresql://dit@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*user, programs / "pg_ctl", "-D", data / "db", "-m", "immediate", "stop"], capture_output=True, cwd="/")
        shutil.rmtree(data, ignore_errors=True)
