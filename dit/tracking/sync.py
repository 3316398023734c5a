"""Send what the store of MLflow did not take: `dit sync-runs`. What has been sent is not sent twice."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, FileInfo, LoggedModel, Metric, Param, Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from tqdm import tqdm

from dit.errors import UserError, one_line, without_password
from dit.tracking.mlflow import (
    BELONGS_TO,
    HAS_FILES,
    PARENT,
    SENT_FROM,
    Store,
    find_run_id,
    image_key,
    image_keys,
    open_store,
    store_lock,
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
    """Send every unsent run to the store; those that have ended and arrived are then dropped here. Returns their ids there.

    A run that is still being written is sent as far as it has come, and kept. May be interrupted and repeated.

    Raises:
        UserError: the store is still away, or refuses a run; or something of a run did not arrive, and is kept.
    """
    if not (unsent_folder() / "mlflow.db").exists():
        return []
    unsent = open_store(unsent_uri())
    sent, kept = [], []
    try:
        store = open_store(tracking_uri())
        for run in tqdm(unsent_runs(unsent), desc="send", unit="run"):
            target, missing = _send(unsent.client, run, store)
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                kept.append(f"{run.info.run_name} ({run.info.run_id[:8]}) lacks {missing[0]}{more}")
                continue
            sent.append(target)
            if run.info.status != "RUNNING":
                unsent.client.delete_run(run.info.run_id)
    except Exception as error:  # MLflow raises its own, requests' and the database's
        problem = f"{without_password(tracking_uri())} does not take the runs ({one_line(error)})"
        raise UserError(f"{problem}; what it did not take is kept") from error
    with store_lock():  # no run begins meanwhile
        if not unsent_runs(unsent):
            kept += _strays(unsent.client, unsent.experiment)
            if not kept:
                shutil.rmtree(unsent_folder())
    if kept:
        raise UserError(
            f"{len(sent)} runs sent, but not all has arrived in {without_password(tracking_uri())}: {'; '.join(kept)}. "
            f"It is kept in {unsent_folder()}: run `dit sync-runs` again, or delete that folder if you do not want it"
        )
    return sent


def _strays(client: MlflowClient, experiment: str) -> list[str]:
    """Return what is in the folder of unsent artifacts and of no run that was sent: at most one line."""
    runs = client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY, max_results=50_000)
    sent = [_local(run.info.artifact_uri) for run in runs]
    sent += [_local(model.artifact_location) for run in runs for _, model, _ in _models(client, run.info.run_id)]
    files = [path for path in (unsent_folder() / "mlartifacts").rglob("*") if path.is_file()]
    strays = [path for path in files if not any(path.is_relative_to(folder) for folder in sent)]
    return [f"{len(strays)} files are of no known run, the first {strays[0]}"] if strays else []


def _local(location: str) -> Path:
    return Path(local_file_uri_to_path(location))


def _send(client: MlflowClient, run: Run, store: Store) -> tuple[str, list[str]]:
    """Copy one run into `store`; return its id there, and what of it has not arrived: nothing, if all is well."""
    source, tags = run.info.run_id, dict(run.data.tags)
    original = tags.pop(BELONGS_TO, source)
    has_files = bool({HAS_FILES, MLFLOW_LOGGED_IMAGES} & set(tags))
    tags.pop(HAS_FILES, None)
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
        points = _new_points(client, source, store, target, key)
        for start in range(0, len(points), POINTS_AT_ONCE):
            store.client.log_batch(target, points[start : start + POINTS_AT_ONCE])
    if not _data_sets(known):
        store.client.log_inputs(target, [DatasetInput(each.dataset, each.tags) for each in _data_sets(run)])
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(client.download_artifacts(source, "", folder))
        if has_files and not any(files.iterdir()):
            missing.append(f"its images and files, which are not in {_local(run.info.artifact_uri)}")
        images = {key[:3]: key for key in image_keys(store.client, target)}
        for path in (files / "images").glob("*"):
            if images.get(image_key(path.name)[:3], image_key(path.name)) != image_key(path.name):
                path.unlink()  # the target has another one of this step
        store.client.log_artifacts(target, str(files))
        there = _sizes(partial(store.client.list_artifacts, target))
        missing += [name for name, size in _local_sizes(files).items() if there.get(name) != size]
    missing += _send_models(client, source, store, target)
    arrived = store.client.get_run(target)
    missing += [f"parameter {key}" for key, value in run.data.params.items() if arrived.data.params.get(key) != value]
    missing += [f"points of {key}" for key in run.data.metrics if _new_points(client, source, store, target, key)]
    missing += ["its data set"] if _data_sets(run) and not _data_sets(arrived) else []
    if run.info.status != "RUNNING" and known.info.status != "FINISHED":
        store.client.set_terminated(target, run.info.status, run.info.end_time)
    return target, missing


def _new_points(client: MlflowClient, source: str, store: Store, target: str, key: str) -> list[Metric]:
    """Return the points of the curve `key` of the run `source` that the run `target` does not have."""
    # System metrics count their steps anew in each store.
    identity = attrgetter("timestamp" if key.startswith("system/") else "step")
    there = {identity(point) for point in store.client.get_metric_history(target, key)}
    return [point for point in client.get_metric_history(source, key) if identity(point) not in there]


def _data_sets(run: Run) -> list[DatasetInput]:
    return run.inputs.dataset_inputs if run.inputs else []


def _sizes(list_folder: Callable[[str | None], list[FileInfo]], folder: str | None = None) -> dict[str, int]:
    """Return the sizes in bytes of all artifacts below `folder`, as `list_folder` lists them, by their paths."""
    found: dict[str, int] = {}
    for item in list_folder(folder):
        found |= _sizes(list_folder, item.path) if item.is_dir else {item.path: item.file_size or 0}
    return found


def _local_sizes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _models(client: MlflowClient, run: str) -> list[tuple[ModelVersion, LoggedModel, int]]:
    """List the registered models of a run that nobody has deleted: the version, the files and the step of each."""
    outputs = client.get_run(run).outputs
    steps = {model.model_id: model.step for model in (outputs.model_outputs if outputs else [])}
    found = []
    for version in client.search_model_versions(f"run_id = '{run}'"):
        model = str(version.source).removeprefix("models:/")
        try:
            found.append((version, client.get_logged_model(model), steps[model]))
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
    return found


def _send_models(client: MlflowClient, source: str, store: Store, target: str) -> list[str]:
    """Register the models of the run `source` as results of the run `target`, with the code that they came with.

    Returns what has not arrived.
    """
    missing = []
    for registered, logged, step in _models(client, source):
        folder = _local(logged.artifact_location)
        if not (folder / "artifacts").is_dir():
            missing.append(f"its model {registered.name}, which is not in {folder}")
            continue
        if not _has_model(store, target, folder):
            (weights,) = (folder / "artifacts").iterdir()
            register_model(store.uri, target, weights, registered.name, step, package=folder / "code" / "dit")
        if not _has_model(store, target, folder):
            missing.append(f"its model {registered.name}")
    return missing


def _has_model(store: Store, target: str, folder: Path) -> bool:
    """Return whether a registered model of the run `target` has the weights of `folder`."""
    here = {name: size for name, size in _local_sizes(folder).items() if name.startswith("artifacts/")}
    for _, logged, _ in _models(store.client, target):
        there = _sizes(partial(store.client.list_logged_model_artifacts, logged.model_id), "artifacts")
        if here.items() <= there.items():
            return True
    return False
