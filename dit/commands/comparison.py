"""`dit compare`: trained models side by side, as a table and as an image of what each drew for the same prompts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image, ImageDraw, ImageFont

from dit.errors import UserError, one_line, without_password
from dit.report.tables import headlines
from dit.tracking.mlflow import PARENT, open_store, tracking_uri
from dit.utils.images import wrap

HEADLINES = (
    "prompt_accuracy",
    "prompt_accuracy_unseen",
    "prompt_accuracy_prompts",
    "clip_score",
    "memorised",
    "val_loss",
    "training_seconds",
)
CELL = 128  # pixels of an image
MARGIN = 190  # of the names on the left


def read_runs(names: list[str], metric: str) -> pd.DataFrame:
    """Every run with an evaluation, the best in `metric` first: a row per run, with columns as `mlflow.search_runs` names them.

    Args:
        names: of the runs to take, or the beginnings of their ids; none takes all.
        metric: that orders them.

    Raises:
        UserError: the store cannot be read, or has no such run or metric.
    """
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise UserError(f"{uri}: no such database yet; `dvc repro` makes it")
    try:
        store = open_store(uri)
        runs = pd.DataFrame(_row(run) for run in store.client.search_runs([store.experiment], max_results=10_000))
    except Exception as error:
        raise UserError(f"{without_password(uri)} cannot be read: {one_line(error)}") from error
    if f"tags.{PARENT}" in runs:
        evaluations = runs[runs[f"tags.{PARENT}"].notna()].drop_duplicates(f"tags.{PARENT}").set_index(f"tags.{PARENT}")
        runs = runs[runs[f"tags.{PARENT}"].isna()]
        for column in evaluations.columns[evaluations.columns.str.match("params|metrics")]:  # of the last evaluation
            runs[column] = runs["run_id"].map(evaluations[column]).combine_first(runs[column])
    if runs.empty:
        raise UserError(f"{without_password(uri)} has no run yet; `dvc repro` makes one")
    unknown = [name for name in names if not any(_goes_by(name, run) for _, run in runs.iterrows())]
    if unknown:
        raise UserError(f"{without_password(uri)} has no run {unknown[0]}; `dit compare` without names shows all")
    if names:
        runs = runs[[any(_goes_by(name, run) for name in names) for _, run in runs.iterrows()]]
    if f"metrics.{metric}" not in runs:
        known = sorted(column.removeprefix("metrics.") for column in map(str, runs) if column.startswith("metrics."))
        known = [name for name in known if not name.startswith("system/")]
        raise UserError(f"{metric}: no run has this metric; they have {', '.join(known) or 'none: `dvc repro` makes one'}")
    runs = runs[runs[f"metrics.{metric}"].notna()]
    return runs.sort_values(f"metrics.{metric}", ascending=_lower_is_better(metric), ignore_index=True)


def _row(run: Run) -> dict[str, str | float]:
    named: dict[str, dict[str, Any]] = {"params": run.data.params, "metrics": run.data.metrics, "tags": run.data.tags}
    return {"run_id": run.info.run_id} | {
        f"{kind}.{key}": value for kind, values in named.items() for key, value in values.items()
    }


def _lower_is_better(metric: str) -> bool:
    return metric.endswith("seconds") or headlines({metric: 0.0}).get(metric, ("", ""))[1] == "lower"


def _goes_by(name: str, run: pd.Series) -> bool:
    return run["tags.mlflow.runName"] == name or run["run_id"].startswith(name)


def comparison_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a row per run: metrics of its last evaluation, and those settings in which the runs differ."""
    table = pd.DataFrame({"run": runs["tags.mlflow.runName"], "id": runs["run_id"].str[:8]})
    for name in dict.fromkeys([metric, *HEADLINES]):
        if f"metrics.{name}" in runs:
            table[name] = runs[f"metrics.{name}"]
    settings = [column for column in map(str, runs) if column.startswith("params.")]
    for column in sorted(settings):
        if runs[column].nunique(dropna=False) > 1:
            table[column.removeprefix("params.")] = runs[column]
    return table.set_index("run")


def comparison_picture(runs: pd.DataFrame, metric: str) -> Image.Image | None:
    """Return a row of images per run, a column per prompt that all runs drew with the same seed; None where there is none."""
    rows = {run["run_id"]: _pictures(run["run_id"]) for _, run in runs.iterrows()}
    shared = [prompt for prompt in next(iter(rows.values()), {}) if all(prompt in row for row in rows.values())]
    if not shared:
        return None
    font = ImageFont.load_default(size=12)
    labels = [wrap(text, font, CELL) for text, _ in shared]
    top = 16 * max(len(lines) for lines in labels) + 8
    sheet = Image.new("RGB", (MARGIN + len(shared) * (CELL + 4), top + len(rows) * (CELL + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(labels):
        draw.multiline_text((MARGIN + column * (CELL + 4) + 2, 4), "\n".join(lines), fill=(60, 60, 60), font=font, spacing=2)
    for place, (_, run) in enumerate(runs.iterrows()):
        y = top + place * (CELL + 4)
        lines = [*wrap(run["tags.mlflow.runName"], font, MARGIN), run["run_id"][:8], f"{metric} {run[f'metrics.{metric}']:.4g}"]
        draw.multiline_text((6, y + 6), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=2)
        for column, prompt in enumerate(shared):
            picture = rows[run["run_id"]][prompt].resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (MARGIN + column * (CELL + 4), y))
    return sheet


def _pictures(run_id: str) -> dict[tuple[str, int], Image.Image]:
    """Return what a run drew, by prompt and seed; nothing where it was evaluated by an earlier version."""
    client = MlflowClient(tracking_uri())
    if not client.list_artifacts(run_id, "compared"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(client.download_artifacts(run_id, "compared", folder))
        prompts = json.loads((files / "prompts.json").read_text(encoding="utf-8"))
        row = Image.open(files / "row.png").convert("RGB")
    width = row.width // len(prompts)
    return {
        (prompt["text"], prompt["seed"]): row.crop((k * width, 0, (k + 1) * width, row.height))
        for k, prompt in enumerate(prompts)
    }
