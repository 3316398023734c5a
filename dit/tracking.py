"""MLflow: one run per trained model, one child run per evaluation of it. No other file talks to MLflow.

A tracker never stops a training: what MLflow raises is said once, and the run goes on without it.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from PIL import Image

EXPERIMENT = "dit"


def project_root() -> Path:
    """The project's folder, also where DVC runs a stage in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or else a database file in the project's folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def flatten(prefix: str, settings: Any) -> dict[str, Any]:
    """Nested settings as `model.hidden_size: 192`, the way params.yaml is read aloud."""
    values = asdict(settings) if is_dataclass(settings) else settings
    return {f"{prefix}.{key}": value for key, value in values.items()}


class Tracker:
    """Logs into one run. `run_id` is None while there is no store to log to."""

    def __init__(self, client: MlflowClient | None, run_id: str | None):
        self.client, self.run_id = client, run_id
        self._silent = client is None

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, OSError) as error:
            if not self._silent:
                print(f"MLflow: cannot log to {tracking_uri()} ({_first_line(error)}); going on without", flush=True)
            self._silent = True

    def params(self, values: dict[str, Any]) -> None:
        if self.run_id:
            with self._tolerant():
                self.client.log_batch(self.run_id, params=[mlflow.entities.Param(k, str(v)) for k, v in values.items()])

    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        if self.run_id:
            with self._tolerant():
                now = int(pd.Timestamp.now("UTC").timestamp() * 1000)
                self.client.log_batch(self.run_id, [mlflow.entities.Metric(k, float(v), now, step) for k, v in values.items()])

    def picture(self, image: Image.Image | Path, name: str, step: int | None = None) -> None:
        """Log a picture; with a `step`, as one of a series that MLflow shows over time."""
        if self.run_id:
            with self._tolerant():
                image = Image.open(image) if isinstance(image, Path) else image
                if step is None:
                    self.client.log_image(self.run_id, image, artifact_file=f"{name}.png")
                else:
                    self.client.log_image(self.run_id, image, key=name, step=step)

    def file(self, path: Path) -> None:
        if self.run_id:
            with self._tolerant():
                self.client.log_artifact(self.run_id, str(path))

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Say what the run was trained on; MLflow keeps the first 36 characters of the digest."""
        if self.run_id:
            with self._tolerant():
                dataset = MetaDataset(mlflow.data.dataset_source_registry.resolve_dataset_source(source), name, digest[:36])
                tags = [InputTag("mlflow.data.context", "training")]
                self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags)])

    def go_on(self) -> None:
        """A run that had been stopped is running again."""
        if self.run_id:
            with self._tolerant():
                self.client.update_run(self.run_id, status="RUNNING")

    def finish(self, status: str = "FINISHED") -> None:
        if self.run_id:
            with self._tolerant():
                self.client.set_terminated(self.run_id, status)


def start_run(recipe: str, tags: dict[str, str] | None = None, parent: str | None = None) -> Tracker:
    """Begin a run in the experiment `dit`, made on first use; named after the DVC experiment where there is one."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a server that is away shall not hold up a training
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    tracker = Tracker(None, None)
    tracker._silent = False
    with tracker._tolerant():
        client, experiment = _open_store()
        name = os.environ.get("DVC_EXP_NAME") or recipe
        all_tags = {"recipe": recipe, **_code_tags(), **(tags or {})}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
            name = f"{name} evaluation"
        run = client.create_run(experiment, run_name=name, tags=all_tags)
        tracker = Tracker(client, run.info.run_id)
    return tracker


def resume_run(run_id: str | None) -> Tracker | None:
    """Log on in a run of before; None if this store does not know it (a colleague's model, pulled)."""
    if not run_id:
        return None
    try:
        client, _ = _open_store()
        client.get_run(run_id)
    except (MlflowException, OSError):
        return None
    return Tracker(client, run_id)


def _open_store() -> tuple[MlflowClient, str]:
    """The client, and the id of the experiment. Under a lock: two first writers would both create the tables."""
    warnings.filterwarnings("ignore", module="mlflow")
    root = project_root()
    lock = root / ".state" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        client = MlflowClient(tracking_uri())
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment:
            return client, experiment.experiment_id
        local = tracking_uri().startswith("sqlite:")
        return client, client.create_experiment(EXPERIMENT, str(root / "mlartifacts") if local else None)


def _code_tags() -> dict[str, str]:
    """Which code and which DVC experiment this is."""
    tags = {"dvc.exp_name": os.environ.get("DVC_EXP_NAME"), "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV")}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags |= {"git.commit": commit, "git.dirty": str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()}
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
