"""`dit compare` says which runs are better, what was set differently, and shows what they drew for the same prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dit import cli
from dit.commands.comparison import CELL, MARGIN, comparison_picture, read_runs
from dit.tracking import mlflow as tracking

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def log_run(name: str, colours: list[str], accuracy: float | None, batch_size: int, monkeypatch, seed: int = 42) -> str:
    """A run that drew each of its prompts in one plain colour."""
    monkeypatch.setenv("DVC_EXP_NAME", name)
    run = tracking.start_run("shapes")
    run.log_params({"train.batch_size": batch_size, "train.seed": 0})
    if accuracy is not None:
        run.log_metrics({"prompt_accuracy": accuracy, "val_loss": 1 - accuracy, "frechet_distance_clip_n500": 1 - accuracy}, 9)
        row = Image.new("RGB", (16 * len(colours), 16))
        for k, colour in enumerate(colours):
            row.paste(COLOURS[colour], (16 * k, 0, 16 * k + 16, 16))
        run.log_image(row, "compared/row")
        run.log_json([{"text": f"prompt {k}", "seed": seed + k} for k in range(len(colours))], "compared/prompts.json")
        for samples in (8, batch_size):  # evaluated twice; the last one counts
            child = run.start_child(f"{name} evaluation")
            child.log_params({"sample.num_samples": samples})
            child.log_metrics({"prompt_accuracy": accuracy if samples == batch_size else 1.0})
            child.finish()
    run.finish()
    return run.run_id


@pytest.fixture
def runs(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return {
        "worse": log_run("worse", ["red", "lime", "blue"], 0.25, 48, monkeypatch),
        "better": log_run("better", ["lime", "lime"], 0.75, 96, monkeypatch),
        "unjudged": log_run("unjudged", [], None, 96, monkeypatch),
    }


def test_the_table_has_a_row_per_judged_run_the_best_first_and_what_differs(runs, capsys):
    assert cli.main(["compare", "--csv", "tables/runs.csv"]) == 0
    said = capsys.readouterr().out
    assert said.index("better") < said.index("worse") and "unjudged" not in said and "evaluation" not in said
    table = pd.read_csv("tables/runs.csv")
    assert list(table["run"]) == ["better", "worse"] and list(table["train.batch_size"]) == [96, 48]
    assert list(table["id"]) == [runs["better"][:8], runs["worse"][:8]]
    assert list(table["sample.num_samples"]) == [96, 48]
    assert "train.seed" not in table and list(table["prompt_accuracy"]) == [0.75, 0.25]
    for lowest in ("val_loss", "frechet_distance_clip_n500"):
        assert list(read_runs([], lowest)["tags.mlflow.runName"]) == ["better", "worse"]


def test_the_picture_has_a_row_per_run_and_the_prompts_that_all_drew(runs):
    assert cli.main(["compare"]) == 0
    pixels = np.asarray(Image.open("compare.png"))
    assert pixels.shape[1] == MARGIN + 2 * (CELL + 4)
    centres = [
        tuple(pixels[pixels.shape[0] - (2 - row) * (CELL + 4) + CELL // 2, MARGIN + column * (CELL + 4) + CELL // 2].tolist())
        for row in range(2)
        for column in range(2)
    ]
    assert centres == [COLOURS[colour] for colour in ("lime", "lime", "red", "lime")]


def test_runs_are_chosen_by_name_or_id_and_what_is_not_there_is_one_line(runs, capsys, monkeypatch):
    assert list(read_runs(["worse"], "prompt_accuracy")["run_id"]) == [runs["worse"]]
    assert list(read_runs([runs["better"][:6]], "prompt_accuracy")["run_id"]) == [runs["better"]]
    for arguments, says in (
        (["compare", "other"], "has no run other"),
        (["compare", "--metric", "taste"], "taste: no run has this metric; they have frechet_distance_clip_n500"),
    ):
        assert cli.main(arguments) == 1
        assert says in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert cli.main(["compare"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dit: http://127.0.0.1:9 cannot be read") and "secret" not in error


def test_pictures_of_other_seeds_are_not_compared(runs, monkeypatch):
    log_run("other-seed", ["red"], 0.5, 96, monkeypatch, seed=7)
    assert comparison_picture(read_runs(["better", "other-seed"], "prompt_accuracy"), "prompt_accuracy") is None
