"""`dit compare`: trained models side by side, as a table and as an image of their samples for the same prompts."""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dit.commands._args import image_path, make_folder_of, save_image
from dit.errors import UserError, one_line, without_password

if TYPE_CHECKING:  # they take seconds to import
    import pandas as pd
    from mlflow.entities import Run

METRICS = (
    "prompt_accuracy",
    "prompt_accuracy_unseen",
    "prompt_accuracy_prompts",
    "clip_score",
    "memorised",
    "val_loss",
    "training_seconds",
)
CELL = 128  # pixels of an image
MARGIN = 190  # pixels for the names on the left


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `compare` and its flags."""
    parser = commands.add_parser(
        "compare",
        help="show trained models side by side: their metrics, the settings that differ, their samples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit compare                                all of MLflow's runs that were evaluated, the best first\n"
        "  dit compare shapes hungry-lamb 3f2a        some, by name or by the beginning of their id\n"
        "  dit compare --metric val_loss --csv runs.csv",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="its name, or the beginning of its id; default: all")
    parser.add_argument("--metric", default="prompt_accuracy", help="that orders them; default: %(default)s")
    parser.add_argument(
        "--output",
        type=partial(image_path, name="compare.png"),
        default=Path("compare.png"),
        help="the image, or a folder for it; default: %(default)s",
    )
    parser.add_argument("--csv", type=Path, help="write the table here, too")
    parser.set_defaults(action=run_compare)


def run_compare(arguments: argparse.Namespace) -> None:
    """Print the table of runs, and write it and the image of their samples."""
    make_folder_of(arguments.output)
    if arguments.csv:
        make_folder_of(arguments.csv, "--csv")
    runs = read_runs(arguments.runs, arguments.metric)
    table = comparison_table(runs, arguments.metric)
    print(table.reset_index().to_string(index=False, float_format="{:.4g}".format))
    written = []
    if arguments.csv:
        table.to_csv(arguments.csv)
        written.append(arguments.csv)
    image = comparison_image(runs, arguments.metric)
    if image:
        save_image(image, arguments.output)
        written.append(arguments.output)
    else:
        print("no image: these runs have no prompt in common")
    for path in written:
        print(path)


def read_runs(names: list[str], metric: str) -> pd.DataFrame:
    """Read every run with an evaluation, the best in `metric` first, with columns as `mlflow.search_runs` names them.

    Args:
        names: of the runs to take, or the beginnings of their ids; none takes all.
        metric: that orders them.

    Raises:
        UserError: the store cannot be read, or has no such run or metric.
    """
    import pandas as pd

    from dit.tracking.mlflow import PARENT, open_store, sqlite_file, tracking_uri

    uri = tracking_uri()
    database = sqlite_file(uri)
    if database and not database.exists():
        raise UserError(f"{uri}: no such database yet; `dvc repro` makes it")
    try:
        store = open_store(uri, restore=False)
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
    unknown = [name for name in names if not any(_is_named(run, name) for _, run in runs.iterrows())]
    if unknown:
        raise UserError(f"{without_password(uri)} has no run {unknown[0]}; `dit compare` without names shows all")
    if names:
        runs = runs[[any(_is_named(run, name) for name in names) for _, run in runs.iterrows()]]
    if f"metrics.{metric}" not in runs:
        known = sorted(column.removeprefix("metrics.") for column in map(str, runs) if column.startswith("metrics."))
        known = [name for name in known if not name.startswith("system/")]
        raise UserError(f"{metric}: no run has this metric; they have {', '.join(known) or 'none: `dvc repro` makes one'}")
    runs = runs[runs[f"metrics.{metric}"].notna()]
    return runs.sort_values(f"metrics.{metric}", ascending=_lower_is_better(metric), ignore_index=True)


def _row(run: Run) -> dict[str, Any]:
    named: dict[str, dict[str, Any]] = {"params": run.data.params, "metrics": run.data.metrics, "tags": run.data.tags}
    values = {f"{kind}.{key}": value for kind, values in named.items() for key, value in values.items()}
    return {"run_id": run.info.run_id} | values


def _lower_is_better(metric: str) -> bool:
    from dit.report.tables import headlines

    return metric.endswith("seconds") or headlines({metric: 0.0}).get(metric, ("", ""))[1] == "lower"


def _is_named(run: pd.Series, name: str) -> bool:
    return run["tags.mlflow.runName"] == name or run["run_id"].startswith(name)


def comparison_table(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return a row per run: metrics of its last evaluation, and those settings in which the runs differ."""
    columns = {"run": runs["tags.mlflow.runName"], "id": runs["run_id"].str[:8]}
    columns |= {name: runs[f"metrics.{name}"] for name in (metric, *METRICS) if f"metrics.{name}" in runs}
    settings = sorted(column for column in map(str, runs) if column.startswith("params."))
    columns |= {name.removeprefix("params."): runs[name] for name in settings if runs[name].nunique(dropna=False) > 1}
    return runs[[]].assign(**columns).set_index("run")


def comparison_image(runs: pd.DataFrame, metric: str) -> Image.Image | None:
    """Return a row of images per run, a column per prompt that all runs sampled with the same seed; None if there is none."""
    from dit.utils.images import draw_label, label_font, wrap

    rows = {run["run_id"]: _read_samples(run["run_id"]) for _, run in runs.iterrows()}
    shared = [prompt for prompt in next(iter(rows.values()), {}) if all(prompt in row for row in rows.values())]
    if not shared:
        return None
    fonts = [label_font(text) for text, _ in shared]
    labels = [wrap(text, font, CELL) for (text, _), font in zip(shared, fonts, strict=True)]
    top = 16 * max(len(lines) for lines in labels) + 8
    sheet = Image.new("RGB", (MARGIN + len(shared) * (CELL + 4), top + len(rows) * (CELL + 4)), "white")
    for column, (lines, font) in enumerate(zip(labels, fonts, strict=True)):
        draw_label(sheet, (MARGIN + column * (CELL + 4) + 2, 4), lines, font, (60, 60, 60))
    for number, (_, run) in enumerate(runs.iterrows()):
        y = top + number * (CELL + 4)
        font = label_font(run["tags.mlflow.runName"])
        lines = [*wrap(run["tags.mlflow.runName"], font, MARGIN), run["run_id"][:8], f"{metric} {run[f'metrics.{metric}']:.4g}"]
        draw_label(sheet, (6, y + 6), lines, font, (0, 0, 0))
        for column, prompt in enumerate(shared):
            image = rows[run["run_id"]][prompt].resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(image, (MARGIN + column * (CELL + 4), y))
    return sheet


def _read_samples(run_id: str) -> dict[tuple[str, int], Image.Image]:
    """Read the samples of a run, by prompt and seed; none where it was evaluated by an earlier version."""
    from mlflow import MlflowClient

    from dit.tracking.mlflow import tracking_uri

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
