"""Send what the store of MLflow did not take: `dit sync-runs`. What has been sent is not sent twice."""

from __future__ import annotations

import shutil
import tempfile
from operator import attrgetter
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import DatasetInput, Param, Run, ViewType
from tqdm import tqdm

from dit.errors import UserError, one_line, without_password
from dit.tracking.mlflow import (
    BELONGS_TO,
    PARENT,
    SENT_FROM,
    Store,
    find_run_id,
    image_key,
    image_keys,
    open_store,
    tracking_uri,
    unsent_folder,
    unsent_uri,
)
from dit.tracking.registry import register_model

POINTS_AT_ONCE = 1000  # as many as MLflow takes in one request


def unsent_runs(unsent: Store) -> list[Run]:
    """List the runs that wait, the oldest first: a parent comes before its children."""
    found = unsent.client.search_runs(
        [unsent.experiment], run_view_type=ViewType.ACTIVE_ONLY, max_results=50_000, order_by=["attribute.start_time ASC"]
    )
    return list(found)


def sync_runs() -> list[str]:
    """Send every unsent run to the store; those that have ended are then dropped here. Returns their ids there.

    A run that is still being written is sent as far as it has come, and kept. May be interrupted and repeated.

    Raises:
        UserError: the store is still away, or refuses a run.
    """
    if not (unsent_folder() / "mlflow.db").exists():
        return []
    unsent = open_store(unsent_uri())
    try:
        store = open_store(tracking_uri())
        sent = []
        for run in tqdm(unsent_runs(unsent), desc="send", unit="run"):
            sent.append(_send(unsent.client, run, store))
            if run.info.status != "RUNNING":
                unsent.client.delete_run(run.info.run_id)
    except Exception as error:  # MLflow raises its own, requests' and the database's
        problem = f"{without_password(tracking_uri())} does not take the runs ({one_line(error)})"
        raise UserError(f"{problem}; what it did not take is kept") from error
    if not unsent_runs(unsent):
        shutil.rmtree(unsent_folder())
    return sent


def _send(client: MlflowClient, run: Run, store: Store) -> str:
    """Copy one run into `store`; return its id there."""
    source, tags = run.info.run_id, dict(run.data.tags)
    original = tags.pop(BELONGS_TO, source)
    target = find_run_id(store, original)
    if target is None:
        if PARENT in tags:
            tags[PARENT] = find_run_id(store, tags[PARENT]) or tags[PARENT]
        made = store.client.create_run(
            store.experiment, start_time=run.info.start_time, run_name=run.info.run_name, tags=tags | {SENT_FROM: original}
        )
        target = made.info.run_id
    known = store.client.get_run(target)
    new_params = [Param(key, value) for key, value in run.data.params.items() if key not in known.data.params]
    store.client.log_batch(target, params=new_params)
    for key in run.data.metrics:
        # System metrics count their steps anew in each store.
        identity = attrgetter("timestamp" if key.startswith("system/") else "step")
        there = {identity(point) for point in store.client.get_metric_history(target, key)}
        points = [point for point in client.get_metric_history(source, key) if identity(point) not in there]
        for start in range(0, len(points), POINTS_AT_ONCE):
            store.client.log_batch(target, points[start : start + POINTS_AT_ONCE])
    if not _data_sets(known):
        store.client.log_inputs(target, [DatasetInput(each.dataset, each.tags) for each in _data_sets(run)])
    with tempfile.TemporaryDirectory() as folder:
        files = Path(client.download_artifacts(source, "", folder))
        images = {key[:3]: key for key in image_keys(store.client, target)}
        for path in (files / "images").glob("*"):
            if images.get(image_key(path.name)[:3], image_key(path.name)) != image_key(path.name):
                path.unlink()  # the target has another one of this step
        store.client.log_artifacts(target, str(files))
    _send_models(client, source, store, target)
    if run.info.status != "RUNNING" and known.info.status != "FINISHED":
        store.client.set_terminated(target, run.info.status, run.info.end_time)
    return target


def _data_sets(run: Run) -> list[DatasetInput]:
    return run.inputs.dataset_inputs if run.inputs else []


def _send_models(client: MlflowClient, source: str, store: Store, target: str) -> None:
    """Register the models of the run `source` as results of the run `target`, with the code that they came with."""
    if store.client.search_model_versions(f"run_id = '{target}'"):
        return
    for registered in client.search_model_versions(f"run_id = '{source}'"):
        outputs = client.get_run(source).outputs
        (trained,) = outputs.model_outputs if outputs else []
        folder = Path(download_artifacts(artifact_uri=client.get_logged_model(trained.model_id).artifact_location))
        (weights,) = (folder / "artifacts").iterdir()
        register_model(store.uri, target, weights, registered.name, trained.step, package=folder / "code" / "dit")
