"""Stage 5: judge the pictures, and put the figures where experiments are compared: metrics/evaluate.json and MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from dit.config import Params
from dit.evaluation.metrics import evaluate_samples
from dit.files import write_json
from dit.tracking import Tracker, flatten, resume_run, start_run
from stages import run_stage

METRICS = "metrics/evaluate.json"


def main(params: Params) -> None:
    worst = Path("samples/worst.png")
    results = evaluate_samples(
        samples=Path("samples/images"),
        model=Path("models/dit"),
        latents=Path("data/latents"),
        settings=params.evaluate,
        worst=worst,
    )
    write_json(Path(METRICS), results)
    parent = find_parent(params)
    child = start_run(params.recipe, parent=parent.run_id)
    child.params(flatten("sample", params.sample) | flatten("evaluate", params.evaluate))
    pictures = [*sorted(Path("samples/grids").glob("*.png")), worst]
    for run in (parent, child):
        run.metrics(results)
        for picture in pictures:
            run.picture(picture, picture.stem)
    child.finish()
    for name, value in results.items():
        print(f"{name:30} {value}")


def find_parent(params: Params) -> Tracker:
    """The run of this model; made again from the tracked curves where the model was trained into another store."""
    run_id = json.loads(Path("metrics/mlflow.json").read_text(encoding="utf-8"))["run_id"]
    known = resume_run(run_id)
    if known:
        return known
    tracker = start_run(params.recipe, tags={"recreated_from": str(run_id)})
    recipe = params.active
    blocks = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "schedule": recipe.schedule}
    for name, block in (blocks | {"train": params.train}).items():
        tracker.params(flatten(name, block))
    for step, values in pd.read_csv("metrics/curves.csv", index_col="step").iterrows():
        tracker.metrics(values.dropna().to_dict(), int(step))
    tracker.finish()
    return tracker


if __name__ == "__main__":
    run_stage("evaluate", main, metrics=[METRICS])
