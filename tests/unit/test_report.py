"""metrics/report.md: every metric and image of a run, nothing that it does not have, the same bytes each time."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dit.config import load_config
from dit.evaluation.memorization import measure_memorization
from dit.report.report import Results, write_report
from helpers import REPO

PARAMS = load_config(REPO / "params.yaml")
METRICS = {
    "prompt_accuracy": 0.9,
    "prompt_accuracy_low": 0.85,
    "prompt_accuracy_high": 0.94,
    "prompt_accuracy_prompts": 200,
    "frechet_distance_clip_n200": 0.0242,
    "memorised": 0.3,
    "memorised_low": 0.2,
    "memorised_high": 0.4,
    "memorised_prompts": 200,
    "nearer_than_held_out": 0.31,
    "held_out_repeats": 0.01,
    "held_out_same": 0.0,
    "samples_same": 0.25,
    "near_distance": 0.4931,
    "val_loss": 0.0891,
}


@pytest.fixture
def run(tmp_path):
    """What the stages leave of a run with prompts that can be scored."""
    stages = {
        "download": {"train_images": 7440},
        "encode": {"reconstruction_psnr": 38.0, "truncated_captions": 1200, "enlarged_images": 0},
        "train": {"steps": 4030, "seconds": 378.4, "parameters": 2_588_352, "images_per_second": 1022.5, "mfu": 0.206},
        "sample": {"sampling_images_per_second": 71.2, "sampling_mfu": 0.05},
        "evaluate": METRICS,
    }
    (tmp_path / "metrics").mkdir()
    for name, metrics in stages.items():
        (tmp_path / "metrics" / f"{name}.json").write_text(json.dumps(metrics))
    tables = {
        "curves": [{"step": k, "train_loss": 1 / k, "val_loss": 1 / k if k % 5 == 0 else None} for k in range(1, 21)],
        "accuracy_by_attribute": [{"attribute": "colour", "accuracy": 0.991, "low": 0.98, "high": 0.995, "count": 833}],
        "accuracy_by_number": [{"group": "unseen", "things": 3, "accuracy": 0.75, "low": 0.6, "high": 0.86, "count": 40}],
        "loss_by_timestep": [{"t": t, "val_loss": t, "low": t - 0.01, "high": t + 0.01} for t in (0.05, 0.5, 0.95)],
    }
    for name, rows in tables.items():
        pd.DataFrame(rows).to_csv(tmp_path / "metrics" / f"{name}.csv", index=False)
    (tmp_path / "samples" / "grids").mkdir(parents=True)
    for name in ("grids/val", "grids/own", "grids/settings", "worst", "nearest"):
        Image.new("RGB", (2400, 300), "teal").save(tmp_path / "samples" / f"{name}.png")
    return tmp_path


def write(run, **sample) -> str:
    """The report of `run` as it would be with these settings of the sample stage."""
    metrics, params = run / "metrics", replace(PARAMS, sample=replace(PARAMS.sample, **sample))
    write_report(Results.read(metrics), params, run / "samples", metrics / "report.md", metrics / "report")
    return (metrics / "report.md").read_text()


def change(run, **metrics) -> None:
    (run / "metrics" / "evaluate.json").write_text(json.dumps({k: v for k, v in (METRICS | metrics).items() if v is not None}))


def test_write_report_shows_every_image_scaled_down(run):
    shown = re.findall(r"!\[(\w+)\]\(([^)]+)\)", write(run))
    assert [name for name, _ in shown] == ["val", "own", "settings", "worst", "nearest", "curves"]
    for _, address in shown:
        assert Image.open(run / "metrics" / address).width <= 1200
    assert len(list((run / "metrics" / "report").iterdir())) == len(shown)


def test_write_report_tables(run):
    text = write(run)
    assert "| `prompt_accuracy` | **0.9** | 0.85 to 0.94 | share of images with everything right" in text
    assert "| `frechet_distance_clip_n200` | **0.0242** |  | distance between samples and held-out images" in text
    assert "prompt_accuracy_prompts" not in text
    assert "| colour | 0.991 | 0.980 to 0.995 | 833 |" in text
    assert "| group | objects | right | interval | of how many |\n" in text
    assert "| unseen | 3 | 0.750 | 0.600 to 0.860 | 40 |" in text
    assert "2.6 M parameters, trained on 7,440 images for 4,030 steps in 6 min" in text
    how = PARAMS.sample
    assert f"`{how.scheduler}` in {how.num_inference_steps} steps at a guidance scale of {how.guidance_scale:g}" in text
    assert "71.2 a second" in text
    assert "Of the data, 1,200 captions were cut at CLIP's length. The training loss" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_write_report_copies(run):
    text = write(run)
    assert "**30 % (20 % to 40 %) of the samples lie nearer to a training image than new images do" in text
    assert "| is the same image | 25.0 % | 0.0 % |\n" in text
    assert "| is nearer than new images are (distance below 0.493) | 6.0 % | 1.0 % |\n" in text
    change(run, memorised_low=0.004, memorised_high=0.08)
    assert "There is no sign that the model copies" in write(run)
    change(run, memorised_low=0.0, memorised_high=0.08)
    assert "There is no sign that the model copies" in write(run)


@pytest.mark.parametrize(
    ("count", "if_copies", "if_new"),
    [
        (1, "**One held-out image is too few to tell:** between 0 % and 100 % of", "**One held-out image is too few to tell:**"),
        (3, "**3 held-out images are too few to tell:** between 0 % and 100 % of", "**3 held-out images are too few to tell:**"),
        (8, "**100 % (46 % to 100 %) of the samples lie nearer", "**8 held-out images are too few to tell:** between 0 % and 25"),
        (250, "**100 % (97 % to 100 %) of the samples lie nearer", "There is no sign that the model copies"),
    ],
)
def test_write_report_copies_with_few_held_out_images(run, count, if_copies, if_new):
    held_out = np.linspace(0.5, 1.2, count)
    for samples, says in ((np.zeros(count), if_copies), (held_out + 0.1, if_new)):
        change(run, **measure_memorization(samples, held_out, 0.95))
        text = write(run)
        assert f"## Does it copy?\n\n{says}" in text and "repeat themselves" not in text


def test_write_report_copies_of_repetitive_data(run):
    held_out = np.concatenate([np.zeros(3), np.linspace(0.5, 1.2, 5)])
    change(run, **measure_memorization(np.full(8, 1.3), held_out, 0.95))
    text = write(run)
    assert "The data repeat themselves" in text and "| is the same image | 0.0 % | 37.5 % |" in text


def test_write_report_without_memorised(run):
    change(run, memorised=None)
    assert "Does it copy?" not in write(run)
    assert not (run / "metrics" / "report" / "nearest.webp").exists()


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["a dog"] * 5, "in each cell: the first four of `sample.prompts`."),
        (["a dog"], "in each cell: those of `sample.prompts`, and captions of the validation set."),
        ([], "in each cell: captions of the validation set."),
    ],
)
def test_write_report_prompts_of_the_settings_grid(run, prompts, says):
    assert says in write(run, prompts=tuple(prompts))


def test_write_report_noise_of_the_scheduler(run):
    text = write(run, scheduler="stochastic")
    assert "a second; `stochastic` adds fresh noise at each step." in text and "and so do layouts" in text
    text = write(run, scheduler="euler")
    assert "noise at each step" not in text and "layouts" not in text


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({}, "18 of the 20 samples with something wrong, those of the lowest CLIP score."),
        ({"prompt_accuracy_unseen": 0.955, "prompt_accuracy_unseen_prompts": 200}, "18 of the 29 samples with something wrong"),
        ({"prompt_accuracy": 0.99}, "The samples with something wrong (2), and then those of the lowest CLIP"),
        ({"prompt_accuracy": None}, "## The worst\n\nThe samples of the lowest CLIP score."),
    ],
)
def test_write_report_worst_samples(run, metrics, expected):
    change(run, **metrics)
    assert expected in write(run)


def test_write_report_without_accuracy(run):
    for name, columns in (("attribute", ["attribute"]), ("number", ["group", "things"])):
        empty = pd.DataFrame(columns=[*columns, "accuracy", "low", "high", "count"])
        empty.to_csv(run / "metrics" / f"accuracy_by_{name}.csv", index=False)
    assert "What is right" not in write(run)


def test_write_report_is_reproducible(run):
    def content():
        write(run)
        return {path.name: path.read_bytes() for path in (run / "metrics").rglob("*") if path.is_file()}

    assert content() == content()


def test_write_report_long_training_in_hours(run):
    results = Results.read(run / "metrics")
    results.metrics["train"]["seconds"] = 11 * 3600
    later = replace(results, metrics=results.metrics)
    write_report(later, PARAMS, run / "samples", run / "metrics" / "report.md", run / "metrics" / "report")
    assert "steps in 11.0 h" in (run / "metrics" / "report.md").read_text()
