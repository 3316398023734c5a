"""Stage 5: judge the pictures, and put the figures where experiments are compared: metrics/evaluate.json and MLflow."""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.evaluation.metrics import evaluate_samples
from dit.files import write_json
from dit.tracking import flatten, start_run
from stages import run_stage
from stages.runs import find_run

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
    parent = find_run(params)
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


if __name__ == "__main__":
    run_stage("evaluate", main, metrics=[METRICS])
