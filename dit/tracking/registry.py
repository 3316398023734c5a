"""Put a trained model into MLflow's registry, in a form that loads anywhere: its weights, this package, what it needs."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_GIT_BRANCH, MLFLOW_GIT_REPO_URL, MLFLOW_SOURCE_NAME, MLFLOW_USER

from dit.config import DEFAULTS
from dit.errors import UserError, one_line
from dit.tracking.mlflow import limit_waiting, open_store, sqlite_file, tracking_uri

PACKAGE = Path(__file__).parent.parent  # dit/
# What generating needs, and no more. MLflow would guess, and find another package of the name dit on the public index.
REQUIREMENTS = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "requests",
    "ruamel.yaml",
    "safetensors",
    "torch",
    "tqdm",
    "transformers",
    "typing_extensions",
)
# What MLflow would add by itself: the user's name, and git's address, which may hold a token.
TAGS = {MLFLOW_USER: "unknown", MLFLOW_SOURCE_NAME: "stages/train.py", MLFLOW_GIT_REPO_URL: "", MLFLOW_GIT_BRANCH: ""}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt")]),
    params=ParamSchema(
        [
            ParamSpec("num_inference_steps", DataType.long, DEFAULTS.num_inference_steps),
            ParamSpec("guidance_scale", DataType.double, DEFAULTS.guidance_scale),
            ParamSpec("scheduler", DataType.string, DEFAULTS.scheduler),
            ParamSpec("seed", DataType.long, 0),
        ]
    ),
)


def register_model(uri: str, run: str, folder: Path, name: str, step: int, package: Path = PACKAGE) -> None:
    """Copy the model folder `folder` into the store at `uri`, as a result of `run` and as the next version of `name`.

    Args:
        uri: the store, which is also the registry.
        run: the id of the run that trained it.
        folder: what the train stage writes, `models/dit`.
        name: of the registered model: `dit-shapes`.
        step: of the training; its metrics at that step become the model's.
        package: the code that goes with it.
    """
    experiment = MlflowClient(uri).get_run(run).info.experiment_id
    # MLflow announces each version on stderr.
    with TemporaryDirectory() as aside, _addressed(uri, experiment), redirect_stderr(io.StringIO()):
        Model.log(
            None,
            mlflow.pyfunc,
            name="model",
            run_id=run,
            step=step,
            registered_model_name=name,
            python_model=str(_loader(package)),  # as code: nothing is pickled
            # MLflow takes a path for a part of an address, and decodes it.
            artifacts={"model": str(_self_contained(folder, Path(aside)).resolve()).replace("%", "%25")},
            code_paths=[str(package)],
            pip_requirements=[f"{each}=={version(each).split('+')[0]}" for each in REQUIREMENTS],
            signature=SIGNATURE,
            tags=TAGS,
        )


def registered_models() -> list[str]:
    """Return the addresses of the registered models, such as models:/dit-shapes/3, the newest versions first."""
    uri = tracking_uri()
    file = sqlite_file(uri)
    if file and not file.exists():  # MLflow would make it
        return []
    limit_waiting()
    try:
        versions = MlflowClient(uri).search_model_versions("name LIKE 'dit-%'")
    except MlflowException:  # a server that is away
        return []
    return [f"models:/{one.name}/{one.version}" for one in sorted(versions, key=lambda one: (one.name, -int(one.version)))]


def registered_folder(address: str) -> Path:
    """Return the model folder, as the train stage wrote it, of a registered model; it is downloaded where the store is elsewhere.

    Raises:
        UserError: it cannot be had, or was not registered by this project.
    """
    _, name, number = address.split("/")
    try:
        store = open_store(tracking_uri(), restore=False)  # whose files are found again after the project's folder has moved
        source = str(store.client.get_model_version(name, number).source)
        files = store.client.get_logged_model(source.removeprefix("models:/")).artifact_location
        folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=files, tracking_uri=store.uri))
    except (MlflowException, OSError) as error:
        raise UserError(f"{address}: cannot be fetched from MLflow's store: {one_line(error)}") from None
    found = sorted(folder.glob("artifacts/*/model_index.json"))
    if not found:
        raise UserError(f"{address}: holds no model of this project")
    return found[0].parent


def _self_contained(folder: Path, aside: Path) -> Path:
    """Return the model folder or, if its encoders are folders of this machine, a copy of it in `aside` that holds them."""
    from dit.encoders.loading import copy_folders, is_folder  # both take seconds, also where there is no model to register
    from dit.pipeline.loading import recorded_encoders

    sources = recorded_encoders(folder)
    if not any(map(is_folder, sources.values())):
        return folder
    copy = aside / folder.name
    shutil.copytree(folder, copy)
    copy_folders(copy, sources)
    return copy


def _loader(package: Path) -> Path:
    """Return the file that MLflow runs to load a model; version 0.1 had it at the top of the package."""
    return next(path for path in (package / "tracking" / "pyfunc.py", package / "pyfunc.py") if path.is_file())


@contextmanager
def _addressed(uri: str, experiment: str) -> Iterator[None]:
    """Set the store and the experiment where the code that logs models looks for them: in the process and the environment."""
    before = {key: os.environ.get(key) for key in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_ID")}
    os.environ["MLFLOW_EXPERIMENT_ID"] = experiment
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri("")
        mlflow.set_registry_uri("")
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
