"""MLflow's run of a training: begun by train, found again by evaluate. It reports and changes no result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dit.config import Params
from dit.tracking.mlflow import Tracker, flatten, resume_run, start_run
from stages.dvc_files import locked_outs

LATENTS = "data/latents"


def begin_run(params: Params, index_digest: str, state: Path) -> Tracker:
    """The run of this training: the one that it began with, also where it goes on after it was killed.

    Args:
        params: all settings.
        index_digest: of the latent cache's index, for where DVC has not recorded the cache.
        state: the training's folder for what is unfinished, where the run's id is noted.
    """
    noted = state / "run_id"
    known = resume_run(noted.read_text(encoding="utf-8"), params.recipe) if noted.exists() else None
    if known:
        known.go_on()
    else:
        known = _new_run(params, _digest_of_dvc() or index_digest)
        state.mkdir(parents=True, exist_ok=True)
        noted.write_text(known.run_id or "", encoding="utf-8")
    known.watch_machine()
    return known


def find_run(params: Params) -> Tracker:
    """The run of the trained model; made again from the tracked curves where it was trained into another store."""
    run_id = json.loads(Path("metrics/mlflow.json").read_text(encoding="utf-8"))["run_id"]
    known = resume_run(run_id, params.recipe)
    if known:
        return known
    tracker = _new_run(params, _digest_of_dvc() or "unknown", recreated_from=str(run_id))
    for step, values in pd.read_csv("metrics/curves.csv", index_col="step").iterrows():
        tracker.metrics(values.dropna().to_dict(), int(step))
    tracker.finish()
    return tracker


def _new_run(params: Params, digest: str, **tags: str) -> Tracker:
    tracker = start_run(params.recipe, tags={"data.latents": digest, **tags})
    tracker.params(settings_of_training(params))
    tracker.dataset(params.recipe, digest, LATENTS)
    return tracker


def _digest_of_dvc() -> str | None:
    """DVC's hash of the latent cache, by which `dvc get` and a colleague know it."""
    return next((out["md5"] for out in locked_outs("encode") if out["path"] == LATENTS), None)


def settings_of_training(params: Params) -> dict[str, Any]:
    """All that a model is the result of, flattened as MLflow shows it."""
    recipe = params.active
    blocks = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "optim": recipe.optim}
    blocks["train"] = params.train
    return {name: value for block, settings in blocks.items() for name, value in flatten(block, settings).items()}
