"""Credentials that a user has in the environment or in DVC's local settings are in nothing that a run leaves behind."""

from __future__ import annotations

import subprocess
import sys
from secrets import token_hex

import pytest

from helpers.clones import Clone, environment
from helpers.tracking_server import mlflow_server

PLANTED = {name: f"planted-{token_hex(12)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD")}
PASSWORD = f"planted-{token_hex(12)}"


@pytest.mark.slow
@pytest.mark.parametrize("reachable", [True, False])
def test_run_leaves_no_credential(tmp_path, reachable):
    clone = Clone(tmp_path / "project")
    clone.dvc("remote", "add", "-d", "bucket", "s3://planted/data")
    clone.dvc("remote", "modify", "--local", "bucket", "secret_access_key", PLANTED["AWS_SECRET_ACCESS_KEY"])
    with mlflow_server(tmp_path / "server") as server:
        host = server.address.removeprefix("http://") if reachable else "127.0.0.1:9"
        variables = environment(clone.root) | PLANTED | {"MLFLOW_TRACKING_URI": f"http://anna:{PASSWORD}@{host}"}
        variables["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        printed = ""
        for command in (["dvc", "repro"], ["dit.cli", "where"], ["dit.cli", "compare"], ["dit.cli", "sync-runs"]):
            done = subprocess.run(
                [sys.executable, "-m", *command], cwd=clone.root, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0 or (command[0] == "dit.cli" and not reachable), done.stderr
            printed += done.stdout + done.stderr
        kept = "does not take this run" in printed
        assert kept != reachable
    secrets = [value.encode() for value in (*PLANTED.values(), PASSWORD)]
    allowed = clone.root / ".dvc" / "config.local"  # where DVC keeps them, and git does not
    assert secrets[1] in allowed.read_bytes() and clone.run("git", "check-ignore", str(allowed)).stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != allowed]
    assert len(files) > 100 and any("mlflow.db" in path.name or "server.db" in path.name for path in files)
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets)] == []
    assert [line for line in printed.splitlines() if any(secret.decode() in line for secret in secrets)] == []
