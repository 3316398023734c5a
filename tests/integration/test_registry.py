"""A trained model in MLflow's registry loads and generates where this project is not installed, and nothing of it is pickled."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from dit.commands.demo.models import Models, find_models
from dit.config import DEFAULTS
from dit.encoders.loading import BUILTIN, EncoderSource, find_encoder
from dit.errors import UserError
from dit.pipeline.generate import load_pipeline
from dit.pipeline.model_folder import weights_hash
from dit.tracking import mlflow as tracking
from dit.tracking import sync
from dit.tracking.registry import registered_folder, registered_models
from dit.tracking.runs import resume_run, start_run
from helpers import REPO

PROMPTS = ["a red circle", "a blue star"]
USE = """
import json, sys
import mlflow, numpy, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/dit-shapes/1")
table = pandas.DataFrame({"prompt": json.loads(sys.argv[2])})
images = model.predict(table, params={"seed": 3, "num_inference_steps": 2, "scheduler": "euler"})
import dit
print(json.dumps({"dit": dit.__file__, "pixels": [numpy.asarray(image).tolist() for image in images]}))
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The folder that holds MLflow's database."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def register(model: Path) -> tracking.Tracker:
    run = start_run("shapes")
    run.log_metrics({"val_loss": 0.5}, 9)
    run.log_model(model, "dit-shapes", 9)
    run.finish()
    return run


def check(project: Path, model: Path, run_id: str) -> None:
    store = tracking.tracking_uri()
    (registered,) = MlflowClient(store).search_model_versions("name = 'dit-shapes'")
    assert int(registered.version) == 1 and registered.run_id == run_id
    logged = MlflowClient(store).get_logged_model(registered.source.removeprefix("models:/"))
    assert {metric.key: metric.value for metric in logged.metrics} == {"val_loss": 0.5}
    folder = Path(local_file_uri_to_path(logged.artifact_location))
    assert folder.is_relative_to(project / "mlartifacts")
    used = subprocess.run(
        [sys.executable, "-c", USE, store, json.dumps(PROMPTS)], cwd=project, capture_output=True, text=True, check=False
    )
    assert used.returncode == 0, used.stderr
    result = json.loads(used.stdout)
    assert Path(result["dit"]).is_relative_to(folder)
    pipeline = load_pipeline(model, "euler")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipeline(PROMPTS, num_inference_steps=2, guidance_scale=DEFAULTS.guidance_scale, generator=generators).images
    assert np.array_equal(np.array(result["pixels"]), np.stack([np.asarray(image) for image in expected]))
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    needed = (folder / "requirements.txt").read_text().split()
    assert f"torch=={version('torch').split('+')[0]}" in needed
    assert not [line for line in needed if line.startswith(("dit", "latent-dit"))]


def test_registered_model_generates_as_pipeline(project, model):
    run = register(model)
    again = resume_run(run.run_id, "shapes")  # killed before it was done
    again.resume()
    again.log_model(model, "dit-shapes", 9)
    again.finish()
    check(project, model, run.run_id)


@pytest.mark.slow
def test_registered_model_has_its_local_encoders(project, model, tmp_path_factory):
    """The project with its folders of encoders may be gone, or on another machine."""
    own = tmp_path_factory.mktemp("own")
    (own / "dvc.yaml").touch()
    mine = shutil.copytree(model, own / "models" / "dit")
    index = json.loads((mine / "model_index.json").read_text())
    for kind in ("vae", "clip"):
        shutil.copytree(BUILTIN / kind, own / "encoders" / kind)
        _, resolved = find_encoder(kind, EncoderSource("builtin"))
        index["encoders"][kind] = {"name": f"encoders/{kind}", "revision": None, "resolved": resolved}
    (mine / "model_index.json").write_text(json.dumps(index))
    run = register(mine)
    shutil.rmtree(own)
    check(project, model, run.run_id)


@pytest.mark.slow
def test_registered_model_after_project_moved(project, model, monkeypatch):
    run = register(model)
    (project / "moved").mkdir()
    for name in ("mlflow.db", "mlartifacts"):
        (project / name).rename(project / "moved" / name)
    monkeypatch.setenv("DVC_ROOT", str(project / "moved"))
    tracking.open_store(tracking.tracking_uri())
    check(project / "moved", model, run.run_id)


@pytest.mark.slow
def test_deleted_registered_model_is_made_again(project, model):
    run = register(model)
    store = MlflowClient(tracking.tracking_uri())
    store.delete_registered_model("dit-shapes")
    again = resume_run(run.run_id, "shapes")
    again.resume()
    again.log_model(model, "dit-shapes", 9)
    check(project, model, run.run_id)


@pytest.mark.parametrize("deleted", ["logged model", "registered model"])
def test_sync_runs_registers_a_deleted_model_again(project, model, monkeypatch, deleted):
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
        start_run("shapes").log_model(model, "dit-shapes", 9)  # a run that is not finished is sent, and kept
    (run_id,) = sync.sync_runs()
    store = MlflowClient(tracking.tracking_uri())
    (version,) = store.search_model_versions("name = 'dit-shapes'")
    if deleted == "logged model":
        store.delete_logged_model(version.source.removeprefix("models:/"))
    else:
        store.delete_registered_model("dit-shapes")
    for _ in range(2):
        assert sync.sync_runs() == [run_id]
        newest = max(store.search_model_versions("name = 'dit-shapes'"), key=lambda version: int(version.version))
        assert int(newest.version) == (2 if deleted == "logged model" else 1)
        assert store.get_logged_model(newest.source.removeprefix("models:/")).source_run_id == run_id


@pytest.mark.slow
def test_sync_runs_keeps_a_run_whose_model_is_gone(project, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
        register(model)
    models = project / ".state" / "unsent" / "mlartifacts" / "models"
    models.rename(project / "elsewhere")
    with pytest.raises(UserError, match="0 runs sent, but not all .* lacks its model dit-shapes, which is not in"):
        sync.sync_runs()
    (project / "elsewhere").rename(models)
    (run_id,) = sync.sync_runs()
    check(project, model, run_id)


LOG = """
import sys
from pathlib import Path
from dit.tracking.runs import start_run
run = start_run("shapes")
run.log_model(Path(sys.argv[1]), "dit-shapes", 1)
print(run.run_id)
"""


def test_registered_model_names_no_user_and_no_git_address(project, model, monkeypatch):
    """MLflow adds both by itself, of the repository that the running script is in; git's address may hold a token."""
    (project / "log.py").write_text(LOG)
    for command in (["init", "-q"], ["remote", "add", "origin", "https://anna:planted-token@example.org/dit.git"], ["add", "."]):
        subprocess.run(["git", *command], cwd=project, check=True)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *author, "commit", "-qm", "a"], cwd=project, check=True)
    monkeypatch.setenv("LOGNAME", "planted-user")  # which getpass takes first
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "planted-login")
    subprocess.run([sys.executable, str(project / "log.py"), str(model)], cwd=project, check=True)
    files = [project / "mlflow.db", *(project / "mlartifacts").rglob("*")]
    assert len(files) > 50
    assert [path for path in files if path.is_file() and b"planted-" in path.read_bytes()] == []


@pytest.mark.parametrize("layout", ["new", "old"])
def test_sync_runs_registers_model(project, model, monkeypatch, layout):
    """Also one that was logged when `pyfunc.py` was at the top of the package."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    register(model)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if layout == "old":
        (loader,) = (project / ".state" / "unsent").rglob("code/dit/tracking/pyfunc.py")
        loader.rename(loader.parent.parent / "pyfunc.py")
    (run_id,) = sync.sync_runs()
    check(project, model, run_id)


def test_registered_models_are_listed_and_found(project, model):
    assert registered_models() == [] and not (project / "mlflow.db").exists()  # nothing is made by looking
    register(model), register(model)
    assert registered_models() == ["models:/dit-shapes/2", "models:/dit-shapes/1"]
    folder = registered_folder("models:/dit-shapes/2")
    assert weights_hash(folder) == weights_hash(model)
    assert list(find_models(project, [model])) == [str(model), "models:/dit-shapes/2", "models:/dit-shapes/1"]
    assert Models(find_models(project, [])).load("models:/dit-shapes/1").weights == weights_hash(model)
    with pytest.raises(UserError, match="models:/dit-shapes/9: cannot be fetched"):
        registered_folder("models:/dit-shapes/9")


def test_without_any_model_the_page_says_what_to_do(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match="models/dit: no such folder"):
        find_models(Path(), [])
