"""A stage that fails says why in one line and keeps its metrics; a defect of ours keeps its stack trace."""

from __future__ import annotations

import errno
import hashlib
import runpy
import shutil
import subprocess
import sys

import pytest
import yaml

from dit.errors import UserError
from helpers import REPO
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


def record(project, stage: str, digests: dict[str, str]) -> None:
    """What DVC writes after a good run."""
    outs = [{"path": path, "md5": digest} for path, digest in digests.items()]
    (project / "dvc.lock").write_text(yaml.safe_dump({"stages": {stage: {"outs": outs}}}))


def lock(project, content: str) -> None:
    record(project, "train", {"metrics/train.json": hashlib.md5(content.encode()).hexdigest()})


def commit(project) -> None:
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a run"]):
        subprocess.run(["git", *command], cwd=project, check=True)


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
    commit(project)

    def fail(_params) -> None:
        raise UserError("no")

    for recorded, back in (("{}", True), ("another run's", False)):
        lock(project, recorded)
        metrics.unlink(missing_ok=True)
        with pytest.raises(SystemExit):
            run_stage("train", fail, ["metrics/train.json"])
        assert metrics.exists() == back


def test_a_folder_of_before_is_back_as_it_was(project):
    """From the copy of a good run; after a clone, from the last commit."""
    pictures = project / "metrics" / "report"
    content = {"curves.webp": b"1", "of/a/folder.webp": b"2"}

    def draw(_params) -> None:
        for name, data in content.items():
            (pictures / name).parent.mkdir(parents=True, exist_ok=True)
            (pictures / name).write_bytes(data)

    def fail(_params) -> None:
        pictures.mkdir()
        (pictures / "begun.webp").write_bytes(b"3")
        raise UserError("no")

    run_stage("report", draw, ["metrics/report"])
    record(project, "report", {"metrics/report": "7e77e8fc6f3d3b1c98be276f4afde496.dir"})
    commit(project)
    for lost in (".state", None):
        shutil.rmtree(pictures)  # as DVC does before it starts a stage
        with pytest.raises(SystemExit):
            run_stage("report", fail, ["metrics/report"])
        assert {path.relative_to(pictures).as_posix(): path.read_bytes() for path in pictures.rglob("*.*")} == content
        if lost:
            shutil.rmtree(project / lost)


def test_the_hash_of_a_folder_is_dvcs(project):
    (project / "folder" / "b").mkdir(parents=True)
    for name in ("b/c.txt", "b.txt", "ä.txt"):
        (project / "folder" / name).write_text(name)
    dvc = [sys.executable, "-m", "dvc"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"], [*dvc, "add", "folder"]):
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    (out,) = yaml.safe_load((project / "folder.dvc").read_text())["outs"]
    run_stage("report", lambda params: None, ["folder"])
    assert [path.name for path in (project / ".state" / "metrics").iterdir()] == [out["md5"]]


def test_the_page_and_its_pictures_are_back_where_the_report_cannot_be_written(project):
    pictures, page = project / "metrics" / "report", project / "metrics" / "report.md"
    pictures.mkdir()
    (pictures / "curves.webp").write_text("picture")
    page.write_text("page")
    digests = {"metrics/report": "b6910d4a67ce87585c3995be33ff6faa.dir", "metrics/report.md": "71860c77c6745379b0d44304d66b6a13"}
    record(project, "report", digests)
    commit(project)
    shutil.rmtree(pictures)
    page.unlink()
    with pytest.raises(FileNotFoundError):  # there are no figures here
        runpy.run_module("stages.report", run_name="__main__")
    assert page.read_text() == "page" and (pictures / "curves.webp").read_text() == "picture"


def test_a_defect_keeps_its_stack_trace(project):
    with pytest.raises(ZeroDivisionError):
        run_stage("train", lambda params: 1 // 0, [])
