"""A stage that fails says why in one line and keeps its metrics; a defect of ours keeps its stack trace."""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dit.config import load_config
from dit.errors import UserError
from helpers import REPO
from stages import RANKS, dvc_files, run_stage
from stages.train import finished_epochs

DVC = [sys.executable, "-m", "dvc"]
COMMIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a run"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A DVC project in which the stage `train` has been run and committed."""
    root = tmp_path_factory.mktemp("ran")
    (root / "params.yaml").write_text((REPO / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (root / "metrics").mkdir()
    stage = {"cmd": "python write.py", "outs": ["model"], "metrics": [{"metrics/train.json": {"cache": False}}]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": {"deps": ["write.py"], **stage}}}))
    (root / "write.py").write_text("for name in ('model', 'metrics/train.json'): open(name, 'w').write('{}')")
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"], [*DVC, "repro", "-q"], ["git", "add", "."], COMMIT):
        subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


@pytest.fixture
def project(ran, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose metrics are as DVC leaves them: locked and cached; the test runs in it."""
    root = tmp_path / "project"
    shutil.copytree(ran, root, symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    dvc_files._cache_folder.cache_clear()
    return root


def fail(error: BaseException) -> None:
    """Run the stage as DVC does, which deletes its outs first, and let it end with `error`."""

    def stage(_params) -> None:
        raise error

    for name in ("model", "metrics/train.json"):
        Path(name).unlink(missing_ok=True)
    run_stage("train", stage, ["metrics/train.json"])


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("train.batch_size: too large"), "train: train.batch_size: too large"),
        (KeyboardInterrupt(), "train: stopped"),
        (OSError(errno.ENOSPC, "No space left on device"), "train: the disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), "train: the GPU ran out of memory; a smaller train.batch_size may fit; "),
        (MemoryError(), "train: memory ran out; a smaller train.batch_size may fit; "),
    ],
)
def test_run_stage_reports_failure_in_lines(project, capsys, error, says):
    with pytest.raises(SystemExit) as end:
        fail(error)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and lines[0].startswith(says)
    assert lines[1:] == ["train: `dvc checkout --force` brings the earlier outputs back"]


def test_run_stage_keeps_stack_trace_of_a_defect(project):
    with pytest.raises(ZeroDivisionError):
        run_stage("train", lambda params: 1 // 0, [])


@pytest.mark.parametrize(
    ("changed", "epochs"),
    [
        ({"shapes": {"optim": {"num_epochs": 100}}}, 52),
        ({}, None),  # the same training again
        ({"shapes": {"optim": {"num_epochs": 100, "learning_rate": 1e-3}}}, None),  # another one
        ({"train": {"seed": 1}, "shapes": {"optim": {"num_epochs": 100}}}, None),
    ],
)
def test_train_finds_the_finished_training_that_was_shorter(tmp_path, monkeypatch, changed, epochs):
    """Its epochs are all trained again, which whoever sets more of them should read."""
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
    values["shapes"]["optim"]["num_epochs"] = 52
    locked = {"recipe": "shapes", "train": values["train"]}
    locked |= {f"shapes.{block}": values["shapes"][block] for block in ("model", "optim")}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"params": {"params.yaml": locked}}}}))
    for settings in (values["shapes"]["optim"], values["train"]):
        settings.update(changed.get("train", {}) if settings is values["train"] else changed.get("shapes", {}).get("optim", {}))
    Path("params.yaml").write_text(yaml.safe_dump(values))
    assert finished_epochs(load_config()) == epochs
    Path("dvc.lock").unlink()
    assert finished_epochs(load_config()) is None


def test_restore_metrics_from_dvcs_cache(project):
    (project / "metrics/train.json").write_text('{"of": "an experiment"}')  # which the lock knows nothing of
    with pytest.raises(SystemExit):
        fail(UserError("no"))
    assert (project / "metrics/train.json").read_text() == "{}"


@pytest.mark.parametrize(("committed", "restored"), [("{}", True), ("another run's", False)])
def test_restore_metrics_after_a_clone(project, committed, restored):
    """There is no cache; the last commit has the file, if it is of the run that dvc.lock records."""
    shutil.rmtree(project / ".dvc" / "cache")
    (project / "metrics/train.json").write_text(committed)
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run([*COMMIT, "--allow-empty"], check=True)
    with pytest.raises(SystemExit):
        fail(UserError("no"))
    assert (project / "metrics/train.json").exists() == restored


def test_report_that_fails_leaves_the_earlier_one(project):
    images, page = project / "metrics" / "report", project / "metrics" / "report.md"
    images.mkdir()
    (images / "curves.webp").write_text("image")
    page.write_text("page")
    with pytest.raises(FileNotFoundError):  # there are no metrics here
        runpy.run_module("stages.report", run_name="__main__")
    assert page.read_text() == "page" and (images / "curves.webp").read_text() == "image"
    assert not list((project / "metrics").glob(".report-*"))


def test_code_digest_ignores_comments_and_docstrings(project):
    before = dvc_files.code_digest("train")
    code = (project / "write.py").read_text()
    (project / "write.py").write_text(f'"""A docstring."""\n# a comment\n{code}')
    assert dvc_files.code_digest("train") == before
    (project / "write.py").write_text(code.replace("'w'", "'x'"))
    assert dvc_files.code_digest("train") != before


@pytest.mark.parametrize("links", ["hardlink", "symlink"])
def test_stage_by_hand_writes_into_no_link(project, links):
    """DVC deletes outs before it runs a stage; by hand they are there, and may be links into its cache."""
    for command in (["config", "--local", "cache.type", links], ["checkout", "--relink", "model"]):
        subprocess.run([*DVC, *command], check=True, capture_output=True)
    model, content = Path("model"), Path("model").read_text()
    assert model.is_symlink() or model.stat().st_nlink > 1

    def stage(_params) -> None:
        with model.open("a") as file:
            file.write("more")

    run_stage("train", stage, ["metrics/train.json"])
    assert model.read_text() == content + "more"
    assert [path.read_text() for path in Path(".dvc/cache/files/md5").rglob("*") if path.is_file()] == [content]


def test_stage_among_the_ranks_of_a_cluster(project, monkeypatch, capsys):
    """It is none of several, so it does what the one that started them does; accelerate is not misled, either."""
    for name in RANKS:
        monkeypatch.setenv(name, "0" if name.endswith("RANK") else "2")
    with pytest.raises(SystemExit):
        fail(UserError("no"))
    assert Path("metrics/train.json").exists() and "dvc checkout --force" in capsys.readouterr().err
    assert not set(RANKS) & set(os.environ)
