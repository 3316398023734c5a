"""MLflow gets one run per model and one child per evaluation, in a real store, and never stops a training."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from PIL import Image

from dit import cli
from dit.errors import UserError
from dit.tracking import mlflow as tracking
from dit.tracking import sync
from helpers.tracking_server import mlflow_server


@pytest.fixture
def store(tmp_path, monkeypatch) -> MlflowClient:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns" / "0").mkdir(parents=True)  # left over by an old version of MLflow
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("experiment_id: '0'\n")
    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_run_holds_parameters_curves_pictures_and_the_data_set(store, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-idea")
    run = tracking.start_run("shapes", tags={"data.latents": "abc"})
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


def test_an_evaluation_is_a_child_of_its_training(store):
    parent = tracking.start_run("shapes")
    child = parent.start_child("shapes evaluation")
    assert store.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert tracking.resume_run(parent.run_id, "shapes").run_id == parent.run_id
    assert tracking.resume_run("0" * 32, "shapes") is None and tracking.resume_run(None, "shapes") is None


def test_a_run_that_goes_on_notes_no_point_and_no_picture_twice(store):
    def log(run: tracking.Tracker, steps: range) -> None:
        for step in steps:
            run.log_metrics({"train_loss": 1 / step}, step)
            run.log_image(Image.new("RGB", (8, 8)), "preview", step)

    killed = tracking.start_run("shapes")
    log(killed, range(1, 5))
    again = tracking.resume_run(killed.run_id, "shapes")
    again.resume()
    log(again, range(3, 8))  # from the last checkpoint
    again.finish()
    assert [point.step for point in store.get_metric_history(killed.run_id, "train_loss")] == [1, 2, 3, 4, 5, 6, 7]
    pictures = [item.path for item in store.list_artifacts(killed.run_id, "images") if item.path.endswith(".png")]
    assert len(pictures) == 7
    assert store.get_run(killed.run_id).info.status == "FINISHED"


def test_the_machine_is_watched_and_goes_on_being_watched(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    run = tracking.start_run("shapes")
    for _ in range(2):
        run.watch_machine()
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1)"], check=True)
        run.finish("KILLED")
        run.resume()
    points = store.get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert len(points) > 4 and len({point.step for point in points}) == len(points)


def _log_everything(run: tracking.Tracker, steps: range) -> None:
    for step in steps:
        run.log_metrics({"train_loss": 1 / step}, step)
        run.log_image(Image.new("RGB", (8, 8)), "preview", step)


def _check_everything(client: MlflowClient, run_id: str, steps: range) -> None:
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a": "1"} and run.inputs.dataset_inputs[0].dataset.digest == "abc"
    assert [point.step for point in client.get_metric_history(run_id, "train_loss")] == list(steps)
    pictures = [item.path for item in client.list_artifacts(run_id, "images") if item.path.endswith(".png")]
    assert len(pictures) == len(steps)
    (child,) = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert child.data.metrics == {"prompt_accuracy": 0.5}


def _train_and_evaluate(run: tracking.Tracker, steps: range) -> None:
    _log_everything(run, steps)
    run.finish()
    child = tracking.resume_run(run.run_id, "shapes").start_child("evaluation")
    child.log_metrics({"prompt_accuracy": 0.5})
    child.finish()


def test_a_server_that_is_away_costs_a_line_and_no_point(store, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tracking.start_run("shapes")
    run.log_params({"a": 1})
    run.log_dataset("shapes", "abc", "data/latents")
    _train_and_evaluate(run, range(1, 4))
    said = capsys.readouterr().out
    assert said.count("MLflow: http://127.0.0.1:9 does not take this run") == 1 and "dit sync-runs" in said
    with pytest.raises(UserError, match="does not take the runs .* what it did not take is kept"):
        sync.sync_runs()
    assert "secret" not in said
    (tmp_path / "params.yaml").touch()  # as in a project
    assert cli.main(["where"]) == 0 and "dit sync-runs" in capsys.readouterr().out
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert cli.main(["sync-runs"]) == 0 and "2 runs sent" in capsys.readouterr().out
    assert not (tmp_path / ".state" / "unsent").exists()
    assert sync.sync_runs() == []
    known = tracking.resume_run(run.run_id, "shapes")  # by the id that the training noted
    _check_everything(store, known.run_id, range(1, 4))


def test_what_is_still_written_is_sent_as_far_as_it_is_and_once(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")  # MLflow refuses the old file store
    run = tracking.start_run("shapes")
    run.log_params({"a": 1})
    run.log_dataset("shapes", "abc", "data/latents")
    _log_everything(run, range(1, 3))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (there,) = sync.sync_runs()
    assert store.get_run(there).info.status == "RUNNING"
    _train_and_evaluate(run, range(3, 5))
    assert sync.sync_runs()[0] == there
    _check_everything(store, there, range(1, 5))


def test_where_nothing_can_be_written_a_training_goes_on(store, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:./mlruns")
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "unsent").write_text("no folder")
    run = tracking.start_run("shapes")
    run.log_params({"a": 1})
    _log_everything(run, range(1, 3))
    run.finish()
    run.start_child("evaluation").log_metrics({"prompt_accuracy": 0.5})
    assert tracking.resume_run(run.run_id, "shapes") is run.run_id is None
    assert capsys.readouterr().out.count("logging nothing") == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_a_server_that_dies_in_between_loses_nothing(store, monkeypatch, tmp_path, capsys, backend):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with mlflow_server(tmp_path / "server", backend) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        run = tracking.start_run("shapes")
        run.log_params({"a": 1})
        run.log_dataset("shapes", "abc", "data/latents")
        _log_everything(run, range(1, 4))
        server.kill()
        _train_and_evaluate(run, range(4, 7))
        said = capsys.readouterr().out
        assert said.count("does not take this run") == 2  # the training, and its evaluation
        server.start()
        assert sync.sync_runs()[0] == run.run_id
        _check_everything(MlflowClient(server.address), run.run_id, range(1, 7))
        experiment = MlflowClient(server.address).get_experiment_by_name("dit")
        assert len(MlflowClient(server.address).search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)) == 2


def _start(root: str, queue) -> None:
    os.environ["DVC_ROOT"] = root
    queue.put(tracking.start_run("shapes").run_id)


@pytest.mark.slow
def test_two_first_writers_at_once_make_one_store(store, tmp_path):
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
