"""The run of a training: begun by the train stage, found again by the evaluate stage. It reports and changes no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dit.config import Params
from dit.tracking.mlflow import Tracker, flatten, resume_run, start_run

LATENTS = "data/latents"


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
        run = _new_run(params, latents_digest)
        state.mkdir(parents=True, exist_ok=True)
        noted.write_text(run.run_id or "", encoding="utf-8")
    run.watch_machine()
    return run


def find_run(params: Params, latents_digest: str) -> Tracker:
    """Return the run of the trained model.

    Where the store does not know it (a colleague's model, pulled) it is made again from what DVC tracks: settings, curves and
    previews.
    """
    run_id = json.loads(Path("metrics/mlflow.json").read_text(encoding="utf-8"))["run_id"]
    known = resume_run(run_id, params.recipe)
    if known:
        return known
    run = _new_run(params, latents_digest, recreated_from=str(run_id))
    for step, values in pd.read_csv("metrics/curves.csv", index_col="step").to_dict("index").items():
        run.log_metrics({str(name): value for name, value in values.items() if value == value}, int(str(step)))
    for preview in sorted(Path("samples/progress").glob("step-*.png")):
        run.log_image(preview, "preview", int(preview.stem.removeprefix("step-")))
    run.finish()
    return run


def _new_run(params: Params, latents_digest: str, **tags: str) -> Tracker:
    run = start_run(params.recipe, tags={"data.latents": latents_digest, **tags})
    run.log_params(settings_of_training(params))
    run.log_dataset(params.recipe, latents_digest, LATENTS)
    return run


def settings_of_training(params: Params) -> dict[str, Any]:
    """Return all settings that a model is the result of, flattened as MLflow shows them."""
    recipe = params.active
    blocks: dict[str, Any] = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "optim": recipe.optim}
    blocks["train"] = params.train
    return {name: value for block, settings in blocks.items() for name, value in flatten(block, settings).items()}
