"""The run of a training: begun by the train stage, found again by the evaluate stage. It reports and changes no result."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd

from dit.config import Params
from dit.tracking.mlflow import SENT_FROM, Tracker, find_run_id, flatten, open_store, tracking_uri, unsent_folder, unsent_uri

RUNS_CHANGE = (":!dvc.lock", ":!metrics", ":!params.yaml")  # tracked files that a run or an experiment changes
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


def start_run(recipe: str, tags: dict[str, str] | None = None) -> Tracker:
    """Begin a run in the experiment `dit`, named after the DVC experiment where there is one."""
    all_tags = {"recipe": recipe, **_code_tags(), **(tags or {})}
    return Tracker(tracking_uri(), os.environ.get("DVC_EXP_NAME") or recipe, all_tags)


def resume_run(run_id: str | None, recipe: str, tags: dict[str, str] | None = None) -> Tracker | None:
    """Resume an earlier run, in whichever store it is; None if none knows it (a colleague's model, pulled)."""
    if not run_id:
        return None
    name, tags = os.environ.get("DVC_EXP_NAME") or recipe, {"recipe": recipe, **_code_tags(), **(tags or {})}
    if (unsent_folder() / "mlflow.db").exists():
        kept = _find_if_reachable(unsent_uri(), run_id, otherwise=None)
        if kept:
            print(f"MLflow: this run is kept in {unsent_folder()}, and `dit sync-runs` sends it", flush=True)
            return Tracker(unsent_uri(), name, tags, kept)
    known = _find_if_reachable(tracking_uri(), run_id, otherwise=run_id)  # the tracker warns if the store is away
    return Tracker(tracking_uri(), name, tags, known) if known else None


def _find_if_reachable(uri: str, run_id: str, otherwise: str | None) -> str | None:
    try:
        return find_run_id(open_store(uri), run_id)
    except Exception:  # whatever it is: no training ends because of its log
        return otherwise


def _code_tags() -> dict[str, str]:
    """Tag which code and which DVC experiment this is; of MLflow's own tags those that its pages show.

    `git.dirty` is of the code: what a run writes by itself, and the settings, which are the run's parameters, do not count.
    """
    tags: dict[str, str | None] = {"mlflow.source.name": "stages/train.py", "mlflow.source.type": "LOCAL"}
    tags |= {"dvc.exp_name": os.environ.get("DVC_EXP_NAME"), "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV")}
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags |= {
            "git.commit": commit,
            "mlflow.source.git.commit": commit,
            "git.dirty": str(bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", *RUNS_CHANGE))).lower(),
        }
    return {key: value for key, value in tags.items() if value}


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
