"""MLflow gets one run per model and one child per evaluation, in a real store, and never stops a training."""

from __future__ import annotations

import multiprocessing

import pytest
from mlflow import MlflowClient
from PIL import Image

from dit import tracking


@pytest.fixture
def store(tmp_path, monkeypatch) -> MlflowClient:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_run_holds_parameters_curves_pictures_and_the_data_set(store, tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-idea")
    run = tracking.start_run("shapes", tags={"data.latents": "abc"})
    run.params({"train.batch_size": 48})
    for step in (1, 2):
        run.metrics({"train_loss": 1 / step}, step)
        run.picture(Image.new("RGB", (8, 8), "red"), "preview", step)
    run.picture(Image.new("RGB", (8, 8)), "grid")
    run.dataset("shapes", "abc", "data/latents")
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


def test_an_evaluation_is_a_child_of_its_training(store):
    parent = tracking.start_run("shapes")
    child = tracking.start_run("shapes", parent=parent.run_id)
    assert store.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert tracking.resume_run(parent.run_id).run_id == parent.run_id
    assert tracking.resume_run("0" * 32) is None and tracking.resume_run(None) is None


def test_a_server_that_is_away_is_said_once_and_stops_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = tracking.start_run("shapes")
    run.params({"a": 1})
    run.metrics({"b": 1.0}, 1)
    run.finish()
    assert run.run_id is None
    assert capsys.readouterr().out.count("MLflow: cannot log to http://127.0.0.1:9") == 1


def _start(root: str, queue) -> None:
    import os

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
