"""Going on from a trained model through the real `dvc`: what is looked at, what runs again, and what goes on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.clones import Clone, Project
from helpers.small_models import save

CLEAN = "Data and pipelines are up to date.\n"
WEIGHTS = Path("transformer/diffusion_pytorch_model.safetensors")


def change(project: Project, **blocks: dict) -> None:
    path = project.root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    for name, settings in blocks.items():
        (values["shapes"] if name in values["shapes"] else values)[name].update(settings)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def retrain(folder: Path) -> None:
    """Write other weights in the place of those in `folder`."""
    weights = load_file(folder / WEIGHTS)
    save_file({name: value + 1 for name, value in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [stage for stage in ("watch", "download", "encode", "train") if f"Running stage '{stage}'" in done.stdout]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Clone:
    """A project in which the watch stage alone has run, with a small model beside."""
    project = Clone(tmp_path_factory.mktemp("watched") / "project")
    save(project.root.parent)
    shutil.copytree(project.root.parent / "dit", project.root / "models" / "base")
    assert ran(project.dvc("repro", "watch")) == ["watch"]
    return project


@pytest.fixture
def project(watched, tmp_path) -> Project:
    shutil.copytree(watched.root, tmp_path / "project")
    return Project(tmp_path / "project")


def test_watch_looks_for_a_model_only_where_one_is_named(project):
    assert project.json("data/watch/init.json") == {} and project.dvc("status", "watch").stdout == CLEAN
    change(project, train={"method": "lora", "init_from": "models/base"})
    assert ran(project.dvc("repro", "watch")) == ["watch"]
    first = project.json("data/watch/init.json")
    assert first["init_from"] == "models/base" and str(project.root) not in str(first)
    retrain(project.root / "models" / "base")
    assert ran(project.dvc("repro", "watch")) == ["watch"]
    second = project.json("data/watch/init.json")
    assert second["sha256"] != first["sha256"]
    shutil.rmtree(project.root / "models" / "base")
    assert "models/base is not there" in (output := project.dvc("repro", "watch").stdout) and "taken for unchanged" in output
    assert project.json("data/watch/init.json") == second
    change(project, train={"method": "scratch", "init_from": None})
    project.dvc("repro", "watch")
    assert project.json("data/watch/init.json") == {} and project.dvc("status", "watch").stdout == CLEAN


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("models/dit", "train.init_from: models/dit is what this training writes, and DVC deletes it before; copy it (`cp -r "),
        ("models/none", "train.init_from: models/none is not there, there is no "),
        ("models:/dit-shapes", "train.init_from: models:/dit-shapes: a name and a number would be right"),
        ("models:/dit-shapes/9", "models:/dit-shapes/9: cannot be fetched from MLflow's store"),
    ],
)
def test_watch_refuses_what_is_no_model_to_begin_with(project, name, says):
    change(project, train={"method": "full", "init_from": name})
    failed = project.run("python", "-m", "stages.watch", check=False)
    assert failed.returncode == 1 and says in failed.stderr and failed.stderr.count("\n") == 1
    assert project.json("data/watch/init.json") == {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Clone:
    """A project with a trained model, a copy of it in models/base, and its last state kept."""
    project = Clone(tmp_path_factory.mktemp("trained") / "project")
    change(project, train={"lr_scheduler": "constant", "warmup_steps": 0}, runtime={"keep_state": True, "register_model": True})
    assert ran(project.dvc("repro", "train"))[-1] == "train"
    shutil.copytree(project.root / "models" / "dit", project.root / "models" / "base")
    return project


@pytest.mark.slow
def test_train_goes_on_from_the_kept_state_to_the_same_bits(trained, tmp_path):
    shutil.copytree(trained.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    change(project, optim={"num_epochs": 7})
    output = project.dvc("repro", "train").stdout
    assert "goes on after the 4 epochs whose state was kept; the same weights as all epochs at once" in output
    further = load_file(project.root / "models" / "dit" / WEIGHTS)
    shutil.rmtree(project.root / ".state" / "kept")
    output = project.dvc("repro", "-f", "-s", "train").stdout
    assert "train: goes on after" not in output
    at_once = load_file(project.root / "models" / "dit" / WEIGHTS)
    assert all((further[name] == at_once[name]).all() for name in at_once)


@pytest.mark.slow
def test_train_begins_with_a_folder_and_again_when_it_changes(trained, tmp_path):
    shutil.copytree(trained.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    assert project.dvc("status", "watch", "train").stdout == CLEAN
    change(project, train={"method": "lora", "init_from": "models/base"})
    done = project.dvc("repro", "train")
    assert ran(done) == ["watch", "train"] and "begins with the EMA weights and the text statistics of models/base" in done.stdout
    assert (project.root / "models" / "dit" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    base, merged = (load_file(project.root / "models" / name / WEIGHTS) for name in ("base", "dit"))
    changed = {name for name in base if not (base[name] == merged[name]).all()}
    assert changed and all(name.startswith("blocks.") and name.endswith(".weight") for name in changed)
    assert ran(project.dvc("repro", "train")) == ["watch"]
    retrain(project.root / "models" / "base")
    assert ran(project.dvc("repro", "train")) == ["watch", "train"]
    change(project, train={"method": "full", "init_from": "models:/dit-shapes/1"})
    assert "statistics of models:/dit-shapes/1" in project.dvc("repro", "train").stdout
    change(project, train={"method": "scratch", "init_from": None})
    assert ran(project.dvc("repro", "train")) == ["watch"]  # the run cache has the model of before
    assert "Running stage 'watch'" not in project.dvc("repro", "train").stdout


@pytest.mark.slow
def test_train_that_does_not_fit_ends_before_its_first_step(trained, tmp_path):
    shutil.copytree(trained.root, tmp_path / "project")
    project = Project(tmp_path / "project")
    change(project, train={"method": "full", "init_from": "models/base"}, model={"num_layers": 3})
    failed = project.dvc("repro", "train", check=False)
    assert (
        "train: train.init_from: models/base does not fit the settings and the latents: num_layers 2 (wanted: 3)" in failed.stderr
    )
    assert not any((project.root / ".state" / "train").glob("*/step-*"))
