"""A stage that fails says why in one line and keeps its metrics; a defect of ours keeps its stack trace."""

from __future__ import annotations

import errno
import hashlib
import shutil
import subprocess

import pytest
import yaml

from conftest import REPO
from dit.errors import UserError
from stages import run_stage


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copy(REPO / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "metrics").mkdir()
    return tmp_path


def succeed(project, content: str) -> None:
    run_stage("train", lambda params: (project / "metrics" / "train.json").write_text(content) and None, ["metrics/train.json"])


def lock(project, content: str) -> None:
    """What DVC writes after a good run."""
    out = {"path": "metrics/train.json", "md5": hashlib.md5(content.encode()).hexdigest()}
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"outs": [out]}}}))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("train.batch_size: too large"), "train: train.batch_size: too large"),
        (KeyboardInterrupt(), "train: stopped"),
        (OSError(errno.ENOSPC, "No space left on device"), "train: the disk is full"),
    ],
)
def test_a_failure_is_one_line_and_the_metrics_of_before_are_back(project, capsys, error, says):
    succeed(project, "{}")
    lock(project, "{}")
    succeed(project, '{"an": "experiment"}')  # of which the lock that was checked out since knows nothing

    def fail(_params) -> None:
        raise error

    (project / "metrics" / "train.json").unlink()  # as DVC does before it starts a stage
    with pytest.raises(SystemExit) as end:
        run_stage("train", fail, ["metrics/train.json"])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and lines[0].startswith(says) and len(lines) == 1
    assert (project / "metrics" / "train.json").read_text() == "{}"


def test_after_a_clone_the_metrics_of_before_are_those_of_the_last_commit(project):
    """No stage has run here yet, so there are no copies."""
    metrics = project / "metrics" / "train.json"
    metrics.write_text("{}")
    lock(project, "{}")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a run"]):
        subprocess.run(["git", *command], cwd=project, check=True)

    def fail(_params) -> None:
        raise UserError("no")

    for recorded, back in (("{}", True), ("another run's", False)):
        lock(project, recorded)
        metrics.unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            run_stage("train", fail, ["metrics/train.json"])
        assert metrics.exists() == back


def test_a_defect_keeps_its_stack_trace(project):
    with pytest.raises(ZeroDivisionError):
        run_stage("train", lambda params: 1 // 0, [])
