"""MLflow: one run per trained model, one child run per evaluation of it.

Tracking never stops a training and loses nothing: what the store does not take goes into a store of the project's own, from
which `dit sync-runs` sends it (dit/tracking/sync.py).
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from mlflow.utils.file_utils import local_file_uri_to_path
from PIL import Image

from dit.errors import one_line, without_password, without_passwords

EXPERIMENT = "dit"
PARENT = "mlflow.parentRunId"
BELONGS_TO = "dit.belongs_to"  # of an unsent run: the run of the store that it continues
SENT_FROM = "dit.sent_from"  # of a run of the store: the run of another store, mostly the unsent one, that it is a copy of
HAS_FILES = "dit.has_files"  # of an unsent run: images or other files belong to it, and are missing where none are found
LOCATIONS = (  # where MLflow's database holds absolute paths
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def project_root() -> Path:
    """Return the project's folder, also where DVC runs a stage in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    """Return `MLFLOW_TRACKING_URI`, or else a database file in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(project_root())


def unsent_folder() -> Path:
    """Return the folder of the runs that the store did not take."""
    return project_root() / ".state" / "unsent"


def unsent_uri() -> str:
    """Return the address of the store of unsent runs."""
    return _sqlite_uri(unsent_folder())


def _sqlite_uri(folder: Path) -> str:
    """Return the address of the database in `folder`. SQLAlchemy decodes it, and takes what follows a `?` for options."""
    path = (folder / "mlflow.db").as_posix()
    encoded = path.replace("%", "%25").replace("?", "%3F")
    # Of an address that begins with sqlite:, MLflow makes the folder, and does not decode it.
    return f"sqlite:///{path}" if encoded == path else f"sqlite+pysqlite:///{encoded}"


def sqlite_file(uri: str) -> Path | None:
    """Return the database file that `uri` names; None if it names a server."""
    named = re.fullmatch(r"sqlite(\+pysqlite)?:///(.*)", uri, re.DOTALL)
    return Path(unquote(named[2])).resolve() if named else None


def flatten(prefix: str, settings: Any) -> dict[str, Any]:
    """Flatten settings to `model.hidden_size: 192`, the way params.yaml is read aloud."""
    values = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else settings
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(f"{prefix}.{key}", value) if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat


@dataclass(frozen=True)
class Store:
    """A store of MLflow that is reachable: its address, its client, and the id of the experiment `dit` in it."""

    uri: str
    client: MlflowClient
    experiment: str


def store_lock() -> FileLock:
    """Return the lock under which the project's stores are made, moved and removed. Who holds it may take it again."""
    lock = project_root() / ".state" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock, is_singleton=True)


def limit_waiting() -> None:
    """Let a server that is away hold up a training for seconds, and not for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def open_store(uri: str, restore: bool = True) -> Store:
    """Open the store at `uri`, with the experiment `dit`, made on first use. Under a lock: two first writers would both make it.

    The project's own stores find their artifacts again after its folder has moved.

    Args:
        uri: the store.
        restore: whether to restore the experiment if somebody has deleted it; nothing can be written into a deleted one.

    Raises:
        MlflowException, OSError: it cannot be reached, is none that this version of MLflow takes, or its experiment is deleted.
    """
    limit_waiting()
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that it may hold
    warnings.filterwarnings("ignore", module="mlflow")
    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    database = sqlite_file(uri)
    is_own = database in [(folder / "mlflow.db").resolve() for folder in (project_root(), unsent_folder())]
    folder = database.parent if database and is_own else project_root()
    artifacts = folder / "mlartifacts"
    # As a URI, since MLflow decodes a path, too: of `a%20b` it makes `a b`. A server knows where it wants them.
    location = artifacts.as_uri() if uri.startswith("sqlite") else None
    with store_lock():
        folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri, registry_uri=uri)
        for attempt in (1, 2):
            experiment = client.get_experiment_by_name(EXPERIMENT)
            try:
                if experiment and experiment.lifecycle_stage == LifecycleStage.DELETED:
                    _restore_experiment(client, uri, experiment.experiment_id, restore)
                if experiment:
                    if database and is_own and Path(local_file_uri_to_path(experiment.artifact_location)) != artifacts:
                        _relocate(database, experiment.artifact_location, artifacts)
                    return Store(uri, client, experiment.experiment_id)
                client.create_experiment(EXPERIMENT, location, tags={"mlflow.experimentKind": "custom_model_development"})
            except MlflowException:  # another machine may have been faster
                if attempt == 2:
                    raise
    raise AssertionError("unreachable")


def _restore_experiment(client: MlflowClient, uri: str, experiment: str, restore: bool) -> None:
    if not restore:
        raise MlflowException(
            f"its experiment {EXPERIMENT} is deleted; `mlflow experiments restore -x {experiment}` brings it back, "
            "and so does the next training"
        )
    client.restore_experiment(experiment)
    place = without_password(uri)
    print(f"MLflow: the experiment {EXPERIMENT} had been deleted in {place}; it is restored, with its runs", flush=True)


def _relocate(database: Path, before: str, artifacts: Path) -> None:
    """Replace the path `before` by `artifacts` in all of a store: its folder has moved, and MLflow's database has absolute paths.

    What lies at the old place alone, since it was not moved with the database, is still found there.
    """
    artifacts.mkdir(exist_ok=True)
    with closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        for table, column in LOCATIONS:
            for row, location in connection.execute(f"SELECT rowid, {column} FROM {table} WHERE {column} NOTNULL").fetchall():
                rest = location[len(before) :]
                if location[: len(before)].lower() != before.lower() or rest[:1] not in ("", "/"):  # of C: MLflow makes c:
                    continue
                if Path(f"{artifacts}{rest}").exists() or not Path(local_file_uri_to_path(location)).exists():
                    connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (artifacts.as_uri() + rest, row))
    _artifact_repos_cache.clear()  # where this process has looked for a run's artifacts before


class Tracker:
    """Logs into one run; where the store does not take it, into an unsent one that continues it.

    Args:
        uri: the store.
        name: of the run, where one has to be made.
        tags: of the run, where one has to be made.
        run_id: an earlier run to log on in; None makes one at once.

    Attributes:
        name: of the run.
        run_id: by which `resume_run` finds the run again. None where not even the project's folder can be written.
    """

    def __init__(self, uri: str, name: str, tags: dict[str, str], run_id: str | None = None):
        self.uri, self.run_id = uri, run_id
        self.name, self._tags = name, tags
        self._store: Store | None = None
        self._run = run_id  # the run logged into; another than run_id where that is continued
        self._resumed = False
        self._has_files = False
        self._last_steps: dict[str, int] = {}
        self._monitor: SystemMetricsMonitor | None = None
        if run_id is None:
            self._do(lambda client, run: None)
            self.run_id = self._run

    def _do(self, action: Callable[[MlflowClient, str], Any]) -> None:
        while self.uri:
            try:
                if self._store is None:
                    self._store = self._open()
                assert self._run
                action(self._store.client, self._run)
                return
            except Exception as error:  # whatever it is: no training ends because of its log
                self._turn_away_from_store(error)

    def _open(self) -> Store:
        with store_lock():  # so that `dit sync-runs` does not remove the unsent store between the two
            store = open_store(self.uri)
            if self._run is None:
                tags = self._tags | ({BELONGS_TO: self.run_id} if self.run_id else {})
                self._run = store.client.create_run(store.experiment, run_name=self.name, tags=tags).info.run_id
        return store

    def _do_with_files(self, action: Callable[[MlflowClient, str], Any]) -> None:
        def mark(client: MlflowClient, run: str) -> None:
            if self.uri == unsent_uri() and not self._has_files:
                client.set_tag(run, HAS_FILES, "true")
                self._has_files = True
            action(client, run)

        self._do(mark)

    def _turn_away_from_store(self, error: Exception) -> None:
        problem = f"MLflow: {without_password(self.uri)} does not take this run ({one_line(error)}); "
        if self.uri == unsent_uri():
            print(problem + "logging nothing", flush=True)
            self.uri = ""
            return
        print(problem + f"it is kept in {unsent_folder()}, and `dit sync-runs` sends it", flush=True)
        self.uri, self._store, self._run = unsent_uri(), None, None
        if self._monitor:
            self._monitor.finish()
            self.log_system_metrics()

    def has_earlier_logs(self) -> bool:
        """Return whether the run holds what was logged before; False where its store is away and an unsent run continues it."""
        self._do(lambda client, run: client.get_run(run))
        return self._run == self.run_id

    def start_child(self, name: str) -> Tracker:
        """Start a run below this one, in the same store: an evaluation."""
        tags = self._tags | {"mlflow.source.name": "stages/evaluate.py"} | ({PARENT: self.run_id} if self.run_id else {})
        return Tracker(self.uri, name, tags)

    def log_params(self, values: dict[str, Any]) -> None:
        """Log settings; of addresses without the name and password that they may hold."""
        params = [Param(key, str(value)) for key, value in without_passwords(values).items()]
        self._do(lambda client, run: client.log_batch(run, params=params))

    def log_metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log a point of each curve in `values`."""
        now = int(pd.Timestamp.now("UTC").timestamp() * 1000)

        def log(client: MlflowClient, run: str) -> None:
            new = {key: value for key, value in values.items() if not self._resumed or step > self._last_step(client, run, key)}
            client.log_batch(run, [Metric(key, float(value), now, step) for key, value in new.items()])

        self._do(log)

    def _last_step(self, client: MlflowClient, run: str, key: str) -> int:
        """Return the last step of `key` that the run had when it was resumed."""
        if key not in self._last_steps:
            self._last_steps[key] = max((point.step for point in client.get_metric_history(run, key)), default=-1)
        return self._last_steps[key]

    def log_image(self, image: Image.Image | Path, name: str, step: int | None = None) -> None:
        """Log an image; with a `step`, as one of a series that MLflow shows over time."""
        image = Image.open(image) if isinstance(image, Path) else image

        def log(client: MlflowClient, run: str) -> None:
            if step is None:
                client.log_image(run, image, artifact_file=f"{name}.png")
            elif not (self._resumed and (name, "step", str(step)) in {key[:3] for key in image_keys(client, run)}):
                client.log_image(run, image, key=name, step=step)

        self._do_with_files(log)

    def log_json(self, values: Any, name: str) -> None:
        """Log `values` as a JSON file."""
        self._do_with_files(lambda client, run: client.log_dict(run, values, name))

    def log_dataset(self, name: str, digest: str, source: str) -> None:
        """Log what the run was trained on; MLflow keeps the first 36 characters of the digest."""
        origin = mlflow.data.dataset_source_registry.resolve_dataset_source(source)
        dataset = Dataset(name, digest[:36], origin._get_source_type(), origin.to_json())
        tags = [InputTag("mlflow.data.context", "training")]
        self._do(lambda client, run: client.log_inputs(run, [DatasetInput(dataset, tags)]))

    def log_model(self, folder: Path, registered: str, step: int) -> None:
        """Log a model, trained for `step` steps, and register it as the next version of `registered`."""
        from dit.tracking.registry import register_model

        def register(client: MlflowClient, run: str) -> None:
            if not (self._resumed and client.search_model_versions(f"run_id = '{run}'")):
                register_model(self.uri, run, folder, registered, step)

        self._do(register)

    def log_system_metrics(self) -> None:
        """Log use of processor, memory, disk and GPU every ten seconds, until `finish`."""

        def watch(client: MlflowClient, run: str) -> None:
            self._monitor = SystemMetricsMonitor(run, resume_logging=self._resumed, tracking_uri=self.uri)
            self._monitor.start()

        self._do(watch)

    def resume(self) -> None:
        """Set a run that had been stopped running again; what it has logged already it does not log twice."""
        self._resumed = True
        self._do(lambda client, run: client.update_run(run, status="RUNNING"))

    def finish(self, status: str = "FINISHED") -> None:
        """End the run: FINISHED, KILLED (it can be resumed) or FAILED. One that has ended keeps its status and its time."""
        if self._monitor:
            self._monitor.finish()
            self._monitor = None

        def end(client: MlflowClient, run: str) -> None:
            if client.get_run(run).info.status == "RUNNING":
                client.set_terminated(run, status)

        self._do(end)


def find_run_id(store: Store, run_id: str) -> str | None:
    """Find the run `run_id` in `store`, or the copy that was made of it there; return its id there.

    One that was deleted is restored, since it is about to be written into; in the store of unsent runs it has been sent.
    """
    found = []
    try:
        found.append(store.client.get_run(run_id))
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
    if not any(map(_is_active, found)):
        found += store.client.search_runs([store.experiment], f"tags.`{SENT_FROM}` = '{run_id}'", ViewType.ALL)
    active = [run.info.run_id for run in found if _is_active(run)]
    if active or not found or store.uri == unsent_uri():
        return active[0] if active else None
    deleted = found[0].info
    store.client.restore_run(deleted.run_id)
    print(
        f"MLflow: the run {deleted.run_name} ({deleted.run_id[:8]}) had been deleted in {without_password(store.uri)}; "
        "it is restored, since it goes on",
        flush=True,
    )
    return deleted.run_id


def _is_active(run: Run) -> bool:
    return run.info.lifecycle_stage == LifecycleStage.ACTIVE


def image_key(file: str) -> tuple[str, ...]:
    """Return (name, "step", step, "timestamp", time) of an image of a series, as MLflow writes it into the file's name."""
    return tuple(re.split("[+%]", Path(file).name)[:5])


def image_keys(client: MlflowClient, run: str) -> list[tuple[str, ...]]:
    """List the keys of all images of series that a run has."""
    return [image_key(item.path) for item in client.list_artifacts(run, "images")]
