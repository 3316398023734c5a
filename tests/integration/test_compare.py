"""`dit compare`: runs in order of a metric, the settings that differ, and samples of the same prompts."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image

from dit import cli
from dit.commands.compare import CELL, MARGIN, comparison_image, read_runs
from dit.tracking.mlflow import tracking_uri
from dit.tracking.runs import start_run

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def log_run(name: str, colours: list[str], accuracy: float | None, batch_size: int, seed: int = 42) -> str:
    """Log a run whose sample of each prompt has one plain colour; returns its id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_EXP_NAME", name)
        run = start_run("shapes")
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
    assert run.run_id
    return run.run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of a store with three runs, and their ids by name."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return folder, {
            "worse": log_run("worse", ["red", "lime", "blue"], 0.25, 48),
            "better": log_run("better", ["lime", "lime"], 0.75, 96),
            "unevaluated": log_run("unevaluated", [], None, 96),
        }


@pytest.fixture
def runs(store, tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.setenv("DVC_ROOT", str(store[0]))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return store[1]


def test_compare_lists_evaluated_runs_and_what_differs(runs, capsys):
    assert cli.main(["compare", "--csv", "tables/runs.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("better") < printed.index("worse") and "evaluat" not in printed
    table = pd.read_csv("tables/runs.csv")
    assert list(table["run"]) == ["better", "worse"] and list(table["train.batch_size"]) == [96, 48]
    assert list(table["id"]) == [runs["better"][:8], runs["worse"][:8]]
    assert list(table["sample.num_samples"]) == [96, 48]
    assert "train.seed" not in table and list(table["prompt_accuracy"]) == [0.75, 0.25]


@pytest.mark.parametrize("metric", ["prompt_accuracy", "val_loss", "frechet_distance_clip_n500"])
def test_read_runs_puts_the_best_first(runs, metric):
    assert list(read_runs([], metric)["tags.mlflow.runName"]) == ["better", "worse"]


def test_image_has_a_row_per_run_and_shared_prompts(runs):
    assert cli.main(["compare"]) == 0
    pixels = np.asarray(Image.open("compare.png"))
    assert pixels.shape[1] == MARGIN + 2 * (CELL + 4)
    centres = [
        tuple(pixels[pixels.shape[0] - (2 - row) * (CELL + 4) + CELL // 2, MARGIN + column * (CELL + 4) + CELL // 2].tolist())
        for row in range(2)
        for column in range(2)
    ]
    assert centres == [COLOURS[colour] for colour in ("lime", "lime", "red", "lime")]


def test_read_runs_takes_names_and_beginnings_of_ids(runs):
    assert list(read_runs(["worse"], "prompt_accuracy")["run_id"]) == [runs["worse"]]
    assert list(read_runs([runs["better"][:6]], "prompt_accuracy")["run_id"]) == [runs["better"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["other"], "has no run other"),
        (["--metric", "taste"], "taste: no run has this metric; they have frechet_distance_clip_n500"),
    ],
)
def test_compare_refuses_unknown_names(runs, capsys, arguments, message):
    assert cli.main(["compare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_compare_prints_no_password_of_an_unreachable_server(runs, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert cli.main(["compare"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dit: http://127.0.0.1:9 cannot be read") and "secret" not in error


def test_image_leaves_out_other_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_run("one-seed", ["red"], 0.5, 96)
    log_run("other-seed", ["red"], 0.5, 96, seed=7)
    assert comparison_image(read_runs([], "prompt_accuracy"), "prompt_accuracy") is None


def test_compare_after_project_moved(store, tmp_path, monkeypatch):
    moved = shutil.copytree(store[0], tmp_path / "moved 100%")
    monkeypatch.setenv("DVC_ROOT", str(moved))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    hidden = store[0].rename(store[0].with_name("hidden"))
    try:
        assert cli.main(["compare"]) == 0
    finally:
        hidden.rename(store[0])
    assert (tmp_path / "compare.png").is_file()


def test_compare_of_a_deleted_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_run("one", ["red"], 0.5, 96)
    client = MlflowClient(tracking_uri())
    client.delete_experiment(client.get_experiment_by_name("dit").experiment_id)
    assert cli.main(["compare"]) == 1
    assert "its experiment dit is deleted; `mlflow experiments restore -x 1` brings it back" in capsys.readouterr().err
    assert client.get_experiment_by_name("dit").lifecycle_stage == "deleted"
