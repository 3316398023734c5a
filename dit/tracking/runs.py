"""The run of a training: begun by the train stage, found again by the evaluate stage. It reports and changes no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dit.config import Params
from dit.tracking.mlflow import SENT_FROM, Tracker, flatten, resume_run, start_run

LATENTS, MODEL = "data/latents", Path("models/dit")


def begin_run(params: Params, latents_digest: str, state: Path) -> Tracker:
    """Begin the run of this training, or resume the one that it began with before it was killed.

    Args:
        params: all settings.
        latents_digest: hash of the latent cache, by which DVC and a colleague know it.
        state: the training's folder for unfinished work, where the run's id is noted.
    """
    noted = state / "run_id"
    run = resume_run(noted.read_text(encoding="utf-8"), params.recipe) if noted.exists() else None
    if run:
        run.resume()
    else:
        run = start_run(params.recipe, {"data.latents": latents_digest})
        _log_inputs(run, params, latents_digest)
        state.mkdir(parents=True, exist_ok=True)
        noted.write_text(run.run_id or "", encoding="utf-8")
    run.log_system_metrics()
    return run


def find_run(params: Params, latents_digest: str) -> Tracker:
    """Return the run of the trained model.

    Where the store does not know it (a colleague's model, pulled), or is away and cannot be asked, the whole run is logged again
    from what DVC tracks: settings, curves, previews and model. `dit sync-runs` sends of it only what the store does not have.
    """
    run_id = json.loads(Path("metrics/mlflow.json").read_text(encoding="utf-8"))["run_id"]
    tags = {"data.latents": latents_digest}
    run = resume_run(run_id, params.recipe, tags)
    if run and run.has_earlier_logs():
        return run
    run = run or start_run(params.recipe, tags | ({SENT_FROM: run_id} if run_id else {}))
    _log_inputs(run, params, latents_digest)
    for step, values in pd.read_csv("metrics/curves.csv", index_col="step").to_dict("index").items():
        run.log_metrics({str(name): value for name, value in values.items() if value == value}, int(str(step)))
    for preview in sorted(Path("samples/progress").glob("step-*.png")):
        run.log_image(preview, "preview", int(preview.stem.removeprefix("step-")))
    log_result(run, params, json.loads(Path("metrics/train.json").read_text(encoding="utf-8")))
    return run


def _log_inputs(run: Tracker, params: Params, latents_digest: str) -> None:
    run.log_params(settings_of_training(params))
    run.log_dataset(params.recipe, latents_digest, LATENTS)


def log_result(run: Tracker, params: Params, summary: dict[str, float]) -> None:
    """Log what a training ends with: its time and, with `runtime.register_model`, its model.

    Args:
        run: of the training.
        params: all settings.
        summary: of the training, as metrics/train.json has it: `steps`, `seconds`.
    """
    steps = int(summary["steps"])
    run.log_metrics({"training_seconds": summary["seconds"]}, steps)
    if params.runtime.register_model:
        run.log_model(MODEL, f"dit-{params.recipe}", steps)


def settings_of_training(params: Params) -> dict[str, Any]:
    """Return all settings that a model is the result of, flattened as MLflow shows them."""
    recipe = params.active
    blocks: dict[str, Any] = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "optim": recipe.optim}
    blocks["train"] = params.train
    return {name: value for block, settings in blocks.items() for name, value in flatten(block, settings).items()}
