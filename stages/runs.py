"""MLflow's run of a training: begun by train, found again by evaluate. It reports and changes no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dit.config import Params
from dit.tracking import Tracker, flatten, resume_run, start_run


def begin_run(params: Params, digest: str, state: Path) -> Tracker:
    """The run of this training: the one that it began with, also where it goes on after it was killed.

    Args:
        params: all settings.
        digest: of the latent cache.
        state: the training's folder for what is unfinished, where the run's id is noted.
    """
    noted = state / "run_id"
    known = resume_run(noted.read_text(encoding="utf-8")) if noted.exists() else None
    if known:
        known.go_on()
        return known
    tracker = start_run(params.recipe, tags={"data.latents": digest})
    tracker.params(settings_of_training(params))
    tracker.dataset(params.recipe, digest, "data/latents")
    state.mkdir(parents=True, exist_ok=True)
    noted.write_text(tracker.run_id or "", encoding="utf-8")
    return tracker


def find_run(params: Params) -> Tracker:
    """The run of the trained model; made again from the tracked curves where it was trained into another store."""
    run_id = json.loads(Path("metrics/mlflow.json").read_text(encoding="utf-8"))["run_id"]
    known = resume_run(run_id)
    if known:
        return known
    tracker = start_run(params.recipe, tags={"recreated_from": str(run_id)})
    tracker.params(settings_of_training(params))
    for step, values in pd.read_csv("metrics/curves.csv", index_col="step").iterrows():
        tracker.metrics(values.dropna().to_dict(), int(step))
    tracker.finish()
    return tracker


def settings_of_training(params: Params) -> dict[str, Any]:
    """All that a model is the result of, flattened as MLflow shows it."""
    recipe = params.active
    blocks = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "schedule": recipe.schedule}
    blocks["train"] = params.train
    return {name: value for block, settings in blocks.items() for name, value in flatten(block, settings).items()}
