"""One user trains and pushes; others, who have nothing but a git clone and the storage, go on from there."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import yaml
from PIL import Image

from dit.pipeline.pipeline import DiTTextToImagePipeline
from helpers.clones import Project
from helpers.remotes import folder_storage, s3_storage, ssh_storage
from helpers.team import Team, clone_of, files, form_team

VARIANT = ("-S", "shapes.optim.num_epochs=2")
NOTHING_TO_DO = "Data and pipelines are up to date."


@pytest.fixture
def team(clone, tmp_path) -> Team:
    """A team with a folder for storage."""
    with folder_storage(tmp_path) as storage:
        return form_team(clone, tmp_path, storage)


@pytest.fixture(scope="module")
def variant(clone, tmp_path_factory) -> Iterator[tuple[Team, dict]]:
    """A team with a bucket for storage, whose owner has run the experiment `variant` and gone back; and what it had left."""
    place = tmp_path_factory.mktemp("variant")
    with s3_storage(place) as storage:
        team = form_team(clone, place, storage)
        team.owner.dvc("push")
        team.owner.dvc("exp", "run", "-n", "variant", *VARIANT)
        left = results(team.owner)
        team.owner.run("git", "checkout", "-q", ".")
        team.owner.dvc("checkout")
        yield team, left


def results(project: Project) -> dict[str, dict[str, bytes]]:
    """All that the pipeline leaves."""
    return {name: files(project.root / name) for name in ("data", "models", "samples", "metrics")}


def records(project: Project) -> set[str]:
    """Those of the run cache."""
    return set(files(project.root / ".dvc" / "cache" / "runs"))


@pytest.mark.parametrize(
    "kind", [folder_storage, pytest.param(ssh_storage, marks=pytest.mark.slow), pytest.param(s3_storage, marks=pytest.mark.slow)]
)
def test_pull_brings_everything(clone, tmp_path, kind):
    with kind(tmp_path) as storage:
        team = form_team(clone, tmp_path, storage)
        team.owner.dvc("push", "--run-cache")
        colleague = team.colleague()
        colleague.dvc("pull", "--run-cache")
        again = colleague.dvc("repro").stdout
        assert NOTHING_TO_DO in again and "Running stage" not in again
        assert results(colleague) == results(team.owner)
        assert records(colleague) == records(team.owner) != set()
        for project in (team.owner, colleague):
            assert project.run("git", "status", "--porcelain").stdout == ""
            for value in storage.own.values():
                assert value in (project.root / ".dvc" / "config.local").read_text()
                assert project.run("git", "grep", "-F", "-e", value, "HEAD", check=False).returncode == 1  # not found


@pytest.mark.slow
def test_exp_push_brings_results(variant):
    team, left = variant
    team.owner.dvc("exp", "push", "origin", "variant")
    colleague = team.colleague()
    assert "variant" in colleague.dvc("exp", "list", "origin").stdout
    colleague.dvc("exp", "pull", "origin", "variant")
    colleague.dvc("exp", "apply", "variant")
    assert results(colleague) == left != results(team.owner)
    assert "num_epochs: 2" in colleague.run("git", "diff", "params.yaml").stdout
    assert NOTHING_TO_DO in colleague.dvc("repro").stdout


@pytest.mark.slow
def test_run_cache_is_shared(variant, tmp_path):
    team, left = variant
    elsewhere = str(tmp_path / "storage")
    team.owner.dvc("remote", "add", "--local", "elsewhere", elsewhere)
    team.owner.run(sys.executable, "tools/push_runs.py", "elsewhere")
    colleague = team.colleague()
    colleague.dvc("remote", "add", "--local", "-d", "elsewhere", elsewhere)
    colleague.dvc("pull", "--run-cache")
    output = colleague.dvc("exp", "run", "--pull", *VARIANT).stdout
    assert output.count("Running stage") == output.count("Running stage 'report'") == 1  # all of it is in git
    for stage in ("train", "sample", "evaluate"):
        assert f"Stage '{stage}' is cached - skipping run" in output
    assert results(colleague) == left


@pytest.mark.slow
def test_push_runs_unknown_remote_is_one_line(team):
    done = team.owner.run(sys.executable, "tools/push_runs.py", "nowhere", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["push_runs: config file error: remote 'nowhere' doesn't exist"]


@pytest.mark.slow
def test_push_runs_leaves_out_lost_outputs(team):
    (model,) = [
        out
        for out in yaml.safe_load((team.owner.root / "dvc.lock").read_text())["stages"]["train"]["outs"]
        if out["path"] == "models/dit"
    ]
    (team.owner.root / ".dvc" / "cache" / "files" / "md5" / model["md5"][:2] / model["md5"][2:]).unlink()
    said = team.owner.run(sys.executable, "tools/push_runs.py").stdout
    assert said.startswith(f"{len(records(team.owner))} runs, ")
    assert said.endswith("; of 1 of them the outputs are no longer in the cache\n")
    colleague = team.colleague()
    colleague.dvc("pull", "data/latents", "samples/images")
    assert files(colleague.root / "data" / "latents") == files(team.owner.root / "data" / "latents")


@pytest.mark.slow
def test_pull_model_alone_generates(team):
    team.owner.dvc("push")
    colleague = team.colleague()
    colleague.dvc("pull", "models/dit", "samples/images")
    assert files(colleague.root / "samples" / "images") == files(team.owner.root / "samples" / "images")
    assert not (colleague.root / "data").exists()
    colleague.run(sys.executable, "-m", "dit.cli", "generate", "--prompt", "a red circle", "--output", "p.png")
    assert Image.open(colleague.root / "p.png").size == (64, 64)


@pytest.mark.slow
def test_get_and_import_model(team):
    team.owner.dvc("push")
    other = Project(team.place / "other" / "project")
    other.root.mkdir(parents=True)
    other.run("git", "init", "-q")
    other.dvc("init")
    other.dvc("get", str(team.hub), "models/dit", "--out", "got")
    other.dvc("import", str(team.hub), "models/dit", "--out", "imported")
    for name in ("got", "imported"):
        assert files(other.root / name) == files(team.owner.root / "models" / "dit")
        image = DiTTextToImagePipeline.from_pretrained(other.root / name)("a red circle", num_inference_steps=2).images[0]
        assert image.size == (64, 64)
    other.run("git", "add", "-A")
    other.run("git", "commit", "-qm", "a model")
    assert "got/model_index.json" in other.run("git", "ls-files").stdout
    assert "imported/model_index.json" not in other.run("git", "ls-files").stdout
    user = clone_of(other.root, team.place / "user")
    user.dvc("pull")
    assert files(user.root / "imported") == files(other.root / "imported")


@pytest.mark.slow
def test_pull_refuses_damaged_file(team):
    team.owner.dvc("push")
    log = (team.owner.root / "models" / "train.log").read_bytes()
    (damaged,) = [path for path in team.storage.files.rglob("*") if path.is_file() and path.read_bytes() == log]
    damaged.chmod(0o644)
    damaged.write_bytes(log[:-1])
    damaged.chmod(0o444)  # as DVC leaves it; a file that can be written to DVC checks anyway
    colleague = team.colleague()
    pulled = colleague.dvc("pull", check=False)
    assert pulled.returncode != 0 and "models/train.log" in pulled.stderr
    assert not (colleague.root / "models" / "train.log").exists()
