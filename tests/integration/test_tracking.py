"""MLflow gets one run per model and one child per evaluation, in a real store, and never stops a training."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import ViewType
from PIL import Image

from dit import cli
from dit.config import Params, load_config
from dit.errors import UserError
from dit.tracking import mlflow as tracking
from dit.tracking import sync
from dit.tracking.runs import find_run, resume_run, start_run
from dit.utils.files import write_json
from helpers import REPO
from helpers.tracking_server import mlflow_server


@pytest.fixture
def store(tmp_path, monkeypatch) -> MlflowClient:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)  # left over by an old version of MLflow
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\n")
    return MlflowClient(tracking.tracking_uri())


def _log_steps(run: tracking.Tracker, steps: range) -> None:
    for step in steps:
        run.log_metrics({"train_loss": 1 / step}, step)
        run.log_image(Image.new("RGB", (8, 8)), "preview", step)


def _preview_steps(client: MlflowClient, run_id: str) -> list[int]:
    files = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    return sorted(int(tracking.image_key(file)[2]) for file in files)


def test_tracker_logs_params_curves_images_dataset(store, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-idea")
    run = start_run("shapes", tags={"data.latents": "abc"})
    run.log_params({"train.batch_size": 48})
    for step in (1, 2):
        run.log_metrics({"train_loss": 1 / step}, step)
        run.log_image(Image.new("RGB", (8, 8), "red"), "preview", step)
    run.log_image(Image.new("RGB", (8, 8)), "grid")
    run.log_dataset("shapes", "abc", "data/latents")
    run.finish()
    kept = store.get_run(run.run_id)
    assert kept.info.run_name == "brave-idea" and kept.info.status == "FINISHED"
    assert kept.data.params == {"train.batch_size": "48"}
    assert kept.data.tags["recipe"] == "shapes" and kept.data.tags["dvc.exp_name"] == "brave-idea"
    assert [(m.step, m.value) for m in store.get_metric_history(run.run_id, "train_loss")] == [(1, 1.0), (2, 0.5)]
    assert kept.inputs.dataset_inputs[0].dataset.digest == "abc"
    files = {item.path for item in store.list_artifacts(run.run_id)}
    assert "grid.png" in files and "images" in files
    assert (tmp_path / "mlartifacts").is_dir()
    assert [path.name for path in (tmp_path / "mlruns").rglob("*")] == ["0", "meta.yaml"]


def test_start_child_names_its_parent(store):
    parent = start_run("shapes")
    child = parent.start_child("shapes evaluation")
    assert store.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert resume_run(parent.run_id, "shapes").run_id == parent.run_id
    assert resume_run("0" * 32, "shapes") is None and resume_run(None, "shapes") is None


def test_resume_logs_nothing_twice(store):
    killed = start_run("shapes")
    _log_steps(killed, range(1, 5))
    again = resume_run(killed.run_id, "shapes")
    again.resume()
    _log_steps(again, range(3, 8))  # from the last checkpoint
    again.finish()
    assert [point.step for point in store.get_metric_history(killed.run_id, "train_loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert _preview_steps(store, killed.run_id) == [1, 2, 3, 4, 5, 6, 7]
    assert store.get_run(killed.run_id).info.status == "FINISHED"


def test_system_metrics_resume(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = start_run("shapes")
    for _ in range(2):
        run.log_system_metrics()
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1)"], check=True)
        run.finish("KILLED")
        run.resume()
    points = store.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert len(points) > 4 and len({point.step for point in points}) == len(points)


def _check_everything(client: MlflowClient, run_id: str, steps: range) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"} and run.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [point.step for point in client.get_metric_history(run_id, "train_loss")] == list(steps)
    assert _preview_steps(client, run_id) == list(steps)
    (child,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert child.data.metrics == {"prompt_accuracy": 0.5}


def _train_and_evaluate(run: tracking.Tracker, steps: range) -> None:
    _log_steps(run, steps)
    run.finish()
    child = resume_run(run.run_id, "shapes").start_child("evaluation")
    child.log_metrics({"prompt_accuracy": 0.5})
    child.finish()


def test_sync_runs_after_server_was_away(store, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = start_run("shapes")
    run.log_params({"a": 1})
    run.log_dataset("shapes", "abc", "data/latents")
    _train_and_evaluate(run, range(1, 4))
    printed = capsys.readouterr().out
    assert printed.count("MLflow: http://127.0.0.1:9 does not take this run") == 1 and "dit sync-runs" in printed
    with pytest.raises(UserError, match="does not take the runs .* what it did not take is kept"):
        sync.sync_runs()
    assert "secret" not in printed
    (tmp_path / "params.yaml").touch()  # as in a project
    assert cli.main(["where"]) == 0 and "dit sync-runs" in capsys.readouterr().out
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["sync-runs"]) == 0 and "2 runs sent" in capsys.readouterr().out
    assert not (tmp_path / ".state" / "unsent").exists()
    assert sync.sync_runs() == []
    known = resume_run(run.run_id, "shapes")  # by the id that the training noted
    _check_everything(store, known.run_id, range(1, 4))


def test_sync_runs_while_run_is_written(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")  # MLflow refuses the old file store
    run = start_run("shapes")
    run.log_params({"a": 1})
    run.log_dataset("shapes", "abc", "data/latents")
    _log_steps(run, range(1, 3))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (there,) = sync.sync_runs()
    assert store.get_run(there).info.status == "RUNNING"
    _train_and_evaluate(run, range(3, 5))
    assert sync.sync_runs()[0] == there
    _check_everything(store, there, range(1, 5))


NAMES = st.text(st.characters(exclude_categories=("C",), exclude_characters="/"), min_size=1, max_size=40).filter(
    lambda name: name.strip(".") and len(os.fsencode(name)) < 200
)


@pytest.fixture(scope="module")
def movable(tmp_path_factory) -> tuple[Path, str]:
    """A folder that holds a project under any name, and the id of a run in it, with a preview of step 1."""
    root = tmp_path_factory.mktemp("movable")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("DVC_ROOT", str(root / "first"))
        run = start_run("shapes")
        _log_steps(run, range(1, 2))
        run.finish()
    return root, run.run_id


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
@example(name="a%20b")  # which MLflow decodes to another folder
@example(name="two words")
@example(name="50% #1?")
def test_project_moves_to_any_name(movable, monkeypatch, name):
    root, run_id = movable
    (project,) = root.iterdir()
    project = project.rename(root / name)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = tracking.open_store(tracking.tracking_uri()).client
    steps = _preview_steps(client, run_id)
    assert steps == list(range(1, len(steps) + 1))
    _log_steps(resume_run(run_id, "shapes"), range(len(steps) + 1, len(steps) + 2))
    new = start_run("shapes")
    new.log_image(Image.new("RGB", (8, 8)), "grid")
    assert [path.name for path in root.iterdir()] == [name]
    assert len(list((project / "mlartifacts" / run_id).rglob("preview*.png"))) == len(steps) + 1
    assert (project / "mlartifacts" / new.run_id / "artifacts" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("experiment", "others"),
    [("C:\\p q\\mlartifacts", "c:\\p q\\mlartifacts"), ("file:///C:/p%20q/mlartifacts", "file:///C:/p%20q/mlartifacts")],
)
def test_project_moves_from_windows(store, tmp_path, experiment, others):
    """As MLflow writes its paths there: into the locations of runs, it appends to what it takes for a URI."""
    run = start_run("shapes")
    _log_steps(run, range(1, 3))
    here = (tmp_path / "mlartifacts").as_uri()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (experiment, here))
        database.execute("UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?)", (here, others))
    tracking.open_store(tracking.tracking_uri())
    assert _preview_steps(store, run.run_id) == [1, 2]


def test_copied_database_finds_artifacts_where_they_are(store, tmp_path, monkeypatch):
    run = start_run("shapes")
    _log_steps(run, range(1, 3))
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "copy"))
    copy = tracking.open_store(tracking.tracking_uri()).client
    assert _preview_steps(copy, run.run_id) == [1, 2]
    new = start_run("shapes")
    _log_steps(new, range(1, 2))
    assert (tmp_path / "copy" / "mlartifacts" / new.run_id).is_dir() and not (tmp_path / "mlartifacts" / new.run_id).exists()


@pytest.fixture
def unsent(store, monkeypatch) -> tracking.Tracker:
    """A run with a parameter, a curve, previews and a data set, and its evaluation, which wait to be sent."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")  # MLflow refuses the old file store
        run = start_run("shapes")
        run.log_params({"a": 1})
        run.log_dataset("shapes", "abc", "data/latents")
        _train_and_evaluate(run, range(1, 4))
    return run


def test_sync_runs_after_project_moved(unsent, monkeypatch, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / ".state").rename(moved / ".state")
    monkeypatch.setenv("DVC_ROOT", str(moved))
    there = sync.sync_runs()
    assert len(there) == 2 and not (moved / ".state" / "unsent").exists() and not (tmp_path / ".state").exists()
    _check_everything(MlflowClient(tracking.tracking_uri()), there[0], range(1, 4))


def test_sync_runs_keeps_what_it_cannot_read(unsent, store, tmp_path):
    artifacts = tmp_path / ".state" / "unsent" / "mlartifacts"
    artifacts.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="1 runs sent, but not all has arrived in .*: shapes .* lacks its images and files"):
        sync.sync_runs()
    (tmp_path / "elsewhere").rename(artifacts)
    (there,) = sync.sync_runs()
    _check_everything(store, there, range(1, 4))
    assert not artifacts.parent.exists()


def test_sync_runs_keeps_what_the_store_has_otherwise(unsent, store, tmp_path):
    tracking.open_store(tracking.tracking_uri())
    (experiment,) = store.search_experiments(filter_string="name = 'dit'")
    other = store.create_run(experiment.experiment_id, tags={tracking.SENT_FROM: unsent.run_id}).info.run_id
    store.log_param(other, "a", "2")
    with pytest.raises(UserError, match=r"lacks parameter a\. It is kept in .*unsent"):
        sync.sync_runs()
    assert resume_run(unsent.run_id, "shapes").uri == tracking.unsent_uri()


def test_sync_runs_keeps_files_of_no_run(unsent, store, tmp_path):
    stray = tmp_path / ".state" / "unsent" / "mlartifacts" / "0" / "a.png"
    stray.parent.mkdir()
    stray.write_bytes(b"image")
    with pytest.raises(UserError, match="2 runs sent, but not all .* 1 files are of no known run, the first .*a.png"):
        sync.sync_runs()
    assert stray.read_bytes() == b"image"


def _delete_experiment(store: MlflowClient) -> str:
    experiment = store.get_experiment_by_name("dit").experiment_id
    store.delete_experiment(experiment)
    return experiment


def test_deleted_experiment_is_restored(store, capsys):
    run = start_run("shapes")
    experiment = _delete_experiment(store)
    run.log_metrics({"train_loss": 1.0}, 1)  # goes into the unsent store
    assert "is kept in" in capsys.readouterr().out
    new = start_run("shapes")
    assert capsys.readouterr().out.count("the experiment dit had been deleted in sqlite:") == 1
    new.log_metrics({"train_loss": 1.0}, 1)
    _delete_experiment(store)
    assert sync.sync_runs() == [run.run_id]
    assert {each.info.run_id for each in store.search_runs([experiment])} == {run.run_id, new.run_id}
    assert store.get_metric_history(run.run_id, "train_loss")[0].value == 1.0


def test_deleted_run_is_restored_when_it_goes_on(store, capsys):
    run = start_run("shapes")
    _log_steps(run, range(1, 3))
    store.delete_run(run.run_id)
    again = resume_run(run.run_id, "shapes")
    assert again.run_id == run.run_id and "the run shapes" in capsys.readouterr().out
    _log_steps(again, range(3, 4))
    assert _preview_steps(store, run.run_id) == [1, 2, 3]


def test_deleted_copy_of_a_sent_run_is_restored(unsent, store):
    there = sync.sync_runs()[0]
    store.delete_run(there)
    assert resume_run(unsent.run_id, "shapes").run_id == there
    _check_everything(store, there, range(1, 4))


def test_log_params_without_password(store):
    run = start_run("shapes")
    run.log_params({"data.base_url": "http://anna:p@ss@example.org/coco", "a": 1})
    assert store.get_run(run.run_id).data.params == {"data.base_url": "http://example.org/coco", "a": "1"}


def test_tracker_where_nothing_can_be_written(store, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "unsent").write_text("no folder")
    run = start_run("shapes")
    run.log_params({"a": 1})
    _log_steps(run, range(1, 3))
    run.finish()
    run.start_child("evaluation").log_metrics({"prompt_accuracy": 0.5})
    assert resume_run(run.run_id, "shapes") is run.run_id is None
    assert capsys.readouterr().out.count("logging nothing") == 1


@pytest.fixture
def trained(store, tmp_path, model) -> Params:
    """A project with what DVC brings of a model that was trained into another store as the run "f" * 32."""
    write_json(tmp_path / "metrics" / "mlflow.json", {"run_id": "f" * 32})
    write_json(tmp_path / "metrics" / "train.json", {"steps": 2, "seconds": 7.5})
    (tmp_path / "metrics" / "curves.csv").write_text("step,train_loss,val_loss\n1,0.5,\n2,0.25,0.3\n")
    (tmp_path / "samples" / "progress").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "progress" / "step-000002.png")
    shutil.copytree(model, tmp_path / "models" / "dit")
    params = load_config(REPO / "params.yaml")
    return replace(params, recipe="shapes", runtime=replace(params.runtime, register_model=True))


def _check_trained(store: MlflowClient, run_id: str, status: str = "FINISHED") -> None:
    run = store.get_run(run_id)
    assert run.info.status == status and run.data.tags["data.latents"] == "abc"
    assert int(run.data.params["train.batch_size"]) > 0 and run.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [(point.step, point.value) for point in store.get_metric_history(run_id, "train_loss")] == [(1, 0.5), (2, 0.25)]
    assert [(point.step, point.value) for point in store.get_metric_history(run_id, "val_loss")] == [(2, 0.3)]
    assert [(point.step, point.value) for point in store.get_metric_history(run_id, "training_seconds")] == [(2, 7.5)]
    assert _preview_steps(store, run_id) == [2]
    assert [version.run_id for version in store.search_model_versions("name = 'dit-shapes'")] == [run_id]


def test_find_run_of_a_colleague(store, trained):
    run = find_run(trained, "abc")
    run.finish()
    _check_trained(store, run.run_id)
    assert find_run(trained, "abc").run_id == run.run_id


@pytest.mark.parametrize("known", [True, False])
def test_find_run_while_server_is_away(store, trained, monkeypatch, tmp_path, known):
    if known:
        run_id = find_run(trained, "abc").run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = find_run(trained, "abc")
    child = run.start_child("evaluation")
    run.finish()
    child.finish()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sent, child_id = sync.sync_runs()
    assert sent == (run_id if known else find_run(trained, "abc").run_id)
    _check_trained(store, sent)
    assert store.get_run(child_id).data.tags["mlflow.parentRunId"] == sent
    assert not (tmp_path / ".state" / "unsent").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_sync_runs_after_server_died(store, monkeypatch, tmp_path, capsys, backend):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(tmp_path / "server", backend) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        run = start_run("shapes")
        run.log_params({"a": 1})
        run.log_dataset("shapes", "abc", "data/latents")
        run.log_system_metrics()
        _log_steps(run, range(1, 4))
        time.sleep(1)
        server.kill()
        killed = time.time() * 1000
        run.log_params({"a": 1})
        time.sleep(1)
        _train_and_evaluate(run, range(4, 7))
        printed = capsys.readouterr().out
        assert printed.count("does not take this run") == 2  # the training, and its evaluation
        server.start()
        assert sync.sync_runs()[0] == run.run_id
        _check_everything(MlflowClient(server.address), run.run_id, range(1, 7))
        points = MlflowClient(server.address).get_metric_history(run.run_id, "system/cpu_utilization_percentage")
        assert {point.timestamp > killed for point in points} == {True, False}
        experiment = MlflowClient(server.address).get_experiment_by_name("dit")
        assert len(MlflowClient(server.address).search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 2


def _start(root: str, queue) -> None:
    os.environ["DVC_ROOT"] = root
    queue.put(start_run("shapes").run_id)


@pytest.mark.slow
def test_open_store_by_two_first_writers(store, tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    writers = [context.Process(target=_start, args=(str(tmp_path), queue)) for _ in range(2)]
    for writer in writers:
        writer.start()
    runs = [queue.get(timeout=120) for _ in writers]
    for writer in writers:
        writer.join()
    experiment = store.get_experiment_by_name("dit")
    assert {run.info.run_id for run in store.search_runs([experiment.experiment_id])} == set(runs)
    assert mlflow.active_run() is None
