"""Stage 5: score the samples, and put the metrics where experiments are compared: metrics/ and MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
from PIL import Image

import stages.sleeping_threads  # noqa: F401 (before torch is loaded)
from dit.config import Params
from dit.evaluation.metrics import evaluate_samples
from dit.tracking.mlflow import flatten
from dit.tracking.runs import find_run
from dit.utils.files import write_json
from dit.utils.images import grid
from stages import run_stage
from stages.dvc_files import locked_digest

METRICS = "metrics/evaluate.json"
BY_ATTRIBUTE, BY_NUMBER = "metrics/accuracy_by_attribute.csv", "metrics/accuracy_by_number.csv"
BY_TIMESTEP = "metrics/loss_by_timestep.csv"
SHOWN = 8  # images by which runs are compared


def main(params: Params) -> None:
    """Evaluate the samples and the model, write the metrics and log them."""
    worst, nearest = Path("samples/worst.png"), Path("samples/nearest.png")
    evaluation = evaluate_samples(
        samples=Path("samples/images"),
        model=Path("models/dit"),
        latents=Path("data/latents"),
        raw=Path("data/raw"),
        settings=params.evaluate,
        runtime=params.runtime,
        worst=worst,
        nearest=nearest,
    )
    write_json(Path(METRICS), evaluation.metrics)
    # With their headings alone where no prompt is about shapes: a stage has to write all its outs.
    write_table(BY_ATTRIBUTE, evaluation.by_attribute, ["attribute", "accuracy", "low", "high", "count"])
    write_table(BY_NUMBER, evaluation.by_number, ["group", "things", "accuracy", "low", "high", "count"])
    write_table(BY_TIMESTEP, evaluation.by_timestep, ["t", "val_loss", "low", "high"])
    log_evaluation(params, evaluation.metrics, [*sorted(Path("samples/grids").glob("*.png")), worst, nearest])
    for name, value in evaluation.metrics.items():
        if not name.endswith(("_low", "_high")):
            ends = [str(evaluation.metrics[end]) for end in (f"{name}_low", f"{name}_high") if end in evaluation.metrics]
            print(f"{name:32} {value}" + (f" ({' to '.join(ends)})" if ends else ""))


def write_table(path: str, rows: list[dict], columns: list[str]) -> None:
    """Write rows as a CSV file."""
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False, lineterminator="\n")


def log_evaluation(params: Params, results: dict[str, float], images: list[Path]) -> None:
    """Log the evaluation to MLflow: a child run with its settings; the metrics on the training's run, too.

    There, what training has measured at each step stays as it is: its `val_loss` is another than ours, whose ends would not fit.
    """
    curves = pd.read_csv("metrics/curves.csv", index_col="step")
    prompts = json.loads(Path("samples/images/prompts.json").read_text(encoding="utf-8"))[:SHOWN]
    row = grid([Image.open(Path("samples/images") / prompt["file"]) for prompt in prompts], columns=len(prompts), gap=0)
    parent = find_run(params, locked_digest("encode", Path("data/latents")) or "unknown")
    child = parent.start_child(f"{parent.name} evaluation")
    child.log_params(flatten("sample", params.sample) | flatten("evaluate", params.evaluate))
    child.log_metrics(results)
    measured = {f"{name}{end}" for name in curves for end in ("", "_low", "_high")}
    parent.log_metrics({name: value for name, value in results.items() if name not in measured}, step=int(curves.index.max()))
    for run in (parent, child):
        for image in images:
            run.log_image(image, image.stem)
        run.log_image(row, "compared/row")  # what `dit compare` lays side by side
        run.log_json([{"text": prompt["text"], "seed": prompt["seed"]} for prompt in prompts], "compared/prompts.json")
        run.finish()


if __name__ == "__main__":
    run_stage("evaluate", main, metrics=[METRICS, BY_ATTRIBUTE, BY_NUMBER, BY_TIMESTEP])
