"""The watch stage: what changes behind the settings, in the user's folders and on the Hub, is seen by the real `dvc`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import pytest
import yaml

from dit.config import RECIPES, Train
from helpers import REPO
from helpers.clones import Clone, Project
from helpers.hub_server import commit_of, serve_hub
from helpers.sources import add_pair, noise_file, write_shards
from helpers.team import clone_of

NEW = "f" * 40  # a commit


def set_recipe(project: Project, recipe: str, **data) -> None:
    path = project.root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["recipe"] = recipe
    values[recipe]["data"].update(data)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def ran(project: Project) -> list[str]:
    """Run download and what is before it; return the stages that were run, and not skipped or taken from the run cache."""
    output = project.dvc("repro", "download").stdout
    return [stage for stage in ("watch", "download") if f"Running stage '{stage}'" in output]


def images(project: Project) -> list[str]:
    return sorted(path.name for path in (project.root / "data" / "raw" / "images").iterdir())


def save_again(folder: Path) -> None:
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes())


def add_image(folder: Path) -> None:
    add_pair(folder / "nested", "new.jpg", "new", noise_file(9))


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Clone:
    """A project whose download stage has fetched five of the user's own images, from a folder that git ignores."""
    project = Clone(tmp_path_factory.mktemp("fetched") / "project")
    (project.root / ".git" / "info" / "exclude").write_text("/custom_data\n")
    for k in range(5):
        add_pair(project.root / "custom_data", f"{k}.jpg", f"caption {k}", noise_file(k))
    set_recipe(project, "folder", val_fraction=0.3)
    assert ran(project) == ["watch", "download"]
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "run")
    return project


@pytest.fixture
def project(fetched, tmp_path) -> Project:
    """A copy of it."""
    shutil.copytree(fetched.root, tmp_path / "project")
    return Project(tmp_path / "project")


def test_watch_removed_image_stays_removed(project):
    for suffix in ("jpg", "txt"):
        (project.root / "custom_data" / f"0.{suffix}").unlink()
    assert ran(project) == ["watch", "download"]
    assert images(project) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    set_recipe(project, "shapes")
    assert ran(project) == ["watch", "download"]
    set_recipe(project, "folder")
    assert ran(project) == ["watch"]  # the run cache has what belongs to the folder as it is now
    assert images(project) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]


def test_watch_sees_another_shard(project):
    write_shards(project.root / "custom_shards", count=2)
    set_recipe(project, "webdataset", num_samples=None, val_fraction=0.3, storage="shards")
    assert ran(project) == ["watch", "download"]
    assert ran(project) == ["watch"]
    write_shards(project.root / "custom_shards", count=3)
    assert ran(project) == ["watch", "download"]
    assert project.json("data/raw/metadata.json")["images"] == project.json("metrics/download.json")["images"] == 12


def test_watch_unchanged_folder_is_not_fetched_again(project):
    assert "watch:\n" in project.dvc("status").stdout  # it would look
    assert ran(project) == ["watch"]
    assert project.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("change", [save_again, add_image])
def test_watch_sees_changes(project, change):
    change(project.root / "custom_data")
    assert ran(project) == ["watch", "download"]


def test_watch_has_nothing_to_do_for_rendered_scenes(project):
    set_recipe(project, "shapes")
    assert ran(project) == ["watch", "download"]
    shutil.rmtree(project.root / "custom_data")
    assert ran(project) == []
    assert project.dvc("status", "watch", "download").stdout == "Data and pipelines are up to date.\n"
    assert project.json("data/watch/shapes.json") == {}


def test_watch_keeps_what_was_found_where_the_folder_is_missing(project, tmp_path):
    """As for a colleague who has git's files and those that DVC has stored."""
    colleague = clone_of(project.root, tmp_path / "colleague")
    shutil.copytree(project.root / ".dvc" / "cache", colleague.root / ".dvc" / "cache")
    without = colleague.dvc("repro", "download", check=False)
    assert without.returncode != 0 and "watch: folder.data.paths: custom_data is not a folder" in without.stderr
    colleague.dvc("checkout", "watch", "download")
    output = colleague.dvc("repro", "download").stdout
    assert "watch: custom_data is not here; taken for unchanged" in output and "Running stage 'download'" not in output
    assert len(images(colleague)) == 5 and colleague.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_watch_finds_the_folder_in_an_experiment_aside(project):
    (project.root / "custom_data" / "0.jpg").unlink()
    project.dvc("exp", "run", "--temp", "-n", "aside", "download")
    kept = project.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/**/aside").stdout.strip()
    metrics = json.loads(project.run("git", "show", f"{kept}:metrics/download.json").stdout)
    assert metrics["images"] == 4 and metrics["unpaired"] == ["custom_data/0.txt"]
    assert ran(project) == ["watch"]  # the run cache has it


@pytest.mark.slow
def test_watch_asks_the_hub_for_the_commit(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "some" / "set"
    folder.mkdir(parents=True)
    rows = {"image": [{"bytes": noise_file(k), "path": None} for k in range(4)], "text": [f"caption {k}" for k in range(4)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    project = Clone(tmp_path / "project")
    set_recipe(project, "hub", dataset="some/set", num_samples=4, val_fraction=0.3)
    for name, value in {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    with serve_hub(tmp_path / "hub") as (address, hub):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert ran(project) == ["watch", "download"]
        assert project.json("metrics/download.json")["revision"] == commit_of("some/set")
        assert ran(project) == ["watch"]
        hub.pushed["some/set"] = NEW
        hub.revisions.clear()
        project.run("python", "-m", "stages.download")
        assert hub.revisions == {commit_of("some/set")}  # the commit that was found, and not what main is by now
        assert ran(project) == ["watch", "download"]
        assert project.json("metrics/download.json")["revision"] == NEW
        hub.down = True
        output = project.dvc("repro", "download").stdout
    assert "the Hub does not tell the commit of some/set (" in output and "Running stage 'download'" not in output


def test_watch_file_names_all_recipes():
    text = (REPO / "stages" / "watch.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    methods = values.pop("init")
    assert list(values) == list(RECIPES) and tuple(methods) == get_args(get_type_hints(Train)["method"])
    assert methods.pop("scratch") == {} and all(value != value for value in methods.values())


def test_watch_writes_no_names_of_a_machine(fetched):
    found = fetched.json("data/watch/folder.json")["folders"]
    assert list(found) == ["custom_data"] and set(found["custom_data"]) == {"files", "bytes", "sha256"}
