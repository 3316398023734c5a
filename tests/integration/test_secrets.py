"""Credentials that a user has in the environment or in DVC's local settings are in nothing that a run leaves behind."""

from __future__ import annotations

import pickle
import subprocess
import sys
from secrets import token_hex

import pytest
import yaml

from dit.errors import UserError
from helpers.clones import Clone, environment
from helpers.servers import make_mirror, serve
from helpers.tracking_server import mlflow_server

PLANTED = {name: f"planted-{token_hex(12)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD")}
PASSWORD, MIRROR, GIT = (f"planted-{token_hex(12)}" for _ in range(3))
IMAGES = [f"{k:012d}.jpg" for k in range(40)]


@pytest.mark.parametrize("password", ["secret", "se@cret", ""])
def test_user_error_has_no_password(password):
    error = UserError(f"coco.data.base_url: 'http://anna:{password}@example.org/coco' is wrong; anna@example.org can help")
    assert str(error) == "coco.data.base_url: 'http://example.org/coco' is wrong; anna@example.org can help"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes from a worker process


@pytest.mark.slow
@pytest.mark.parametrize("reachable", [True, False])
def test_run_leaves_no_credential(tmp_path, reachable):
    clone = Clone(tmp_path / "project")
    clone.run("git", "remote", "add", "origin", f"https://anna:{GIT}@example.org/dit.git")
    clone.dvc("remote", "add", "-d", "bucket", "s3://planted/data")
    clone.dvc("remote", "modify", "--local", "bucket", "secret_access_key", PLANTED["AWS_SECRET_ACCESS_KEY"])
    make_mirror(tmp_path / "mirror", IMAGES)
    with mlflow_server(tmp_path / "server") as server, serve(tmp_path / "mirror") as (url, _):
        params = yaml.safe_load((clone.root / "params.yaml").read_text())
        params["recipe"], coco = "coco", params["coco"]
        coco["data"].update(base_url=url.replace("//", f"//anna:{MIRROR}@"), split="val2017", num_samples=len(IMAGES))
        coco["encode"].update(vae="builtin", clip="builtin", image_size=64, precision="fp32")
        coco["model"].update(params["shapes"]["model"])
        coco["optim"].update(params["shapes"]["optim"])
        (clone.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        host = server.address.removeprefix("http://") if reachable else "127.0.0.1:9"
        variables = environment(clone.root) | PLANTED | {"MLFLOW_TRACKING_URI": f"http://anna:{PASSWORD}@{host}"}
        variables["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        printed = ""
        for command in (
            ["dvc", "repro"],
            ["dit.cli", "check"],
            ["dit.cli", "where"],
            ["dit.cli", "compare", "--metric", "val_loss"],
            ["dit.cli", "sync-runs"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", *command], cwd=clone.root, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0 or (command[0] == "dit.cli" and not reachable), done.stderr
            printed += done.stdout + done.stderr
        kept = "does not take this run" in printed
        assert kept != reachable
    secrets = [value.encode() for value in (*PLANTED.values(), PASSWORD, GIT, MIRROR)]
    allowed = clone.root / ".dvc" / "config.local"  # where DVC keeps them, and git does not
    assert secrets[1] in allowed.read_bytes() and clone.run("git", "check-ignore", str(allowed)).stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != allowed]
    assert len(files) > 100 and any("mlflow.db" in path.name or "server.db" in path.name for path in files)
    assert [path for path in files if any(secret in path.read_bytes() for secret in secrets[:-2])] == []
    assert [path for path in files if GIT.encode() in path.read_bytes()] == [clone.root / ".git" / "config"]
    # Whoever writes a password into params.yaml has it there and in what DVC notes of it; it goes no further.
    root, dvc = clone.root, clone.root / ".dvc"
    noted = [path for path in files if MIRROR.encode() in path.read_bytes()]
    noted = [path for path in noted if path not in (root / "params.yaml", root / "dvc.lock")]
    assert [path for path in noted if not path.is_relative_to(dvc / "cache" / "runs")] == []
    assert [line for line in printed.splitlines() if any(secret.decode() in line for secret in secrets)] == []
