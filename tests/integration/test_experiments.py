"""Experiments as somebody who knows DVC and MLflow runs them: in the workspace, queued, aside; compared, applied, kept."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import yaml
from PIL import Image, ImageChops

from dit.encoders.loading import BUILTIN
from helpers.clones import Clone, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = ("smaller-batch", "width-1", "width-2", "aside")
STAGES = ("download", "encode", "train", "sample", "evaluate")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A project with a first run, and four experiments beside it."""
    clone = Clone(tmp_path_factory.mktemp("experiments"))
    clone.dvc("repro")
    commit(clone, "first run")
    assert ran(clone.dvc("exp", "run", "-n", "smaller-batch", "-S", "train.batch_size=8")) == ["train", "sample", "evaluate"]
    back(clone)
    clone.dvc("exp", "run", "--queue", "-S", "shapes.model.hidden_size=16,24", "-n", "width")
    assert clone.dvc("queue", "status").stdout.count("Queued") == 2
    clone.dvc("queue", "start")
    while any(word in clone.dvc("queue", "status").stdout for word in ("Queued", "Running")):
        time.sleep(2)
    clone.dvc("exp", "run", "--temp", "-S", "train.batch_size=12", "-n", "aside")
    return clone


def commit(clone: Clone, message: str) -> None:
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", message)


def back(clone: Clone) -> None:
    """To what the last commit holds."""
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("checkout")


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [stage for stage in STAGES if f"Running stage '{stage}'" in done.stdout]


def rows(clone: Clone) -> dict[str, dict[str, str]]:
    """What `dvc exp show` knows of each experiment."""
    shown = csv.DictReader(clone.dvc("exp", "show", "--csv").stdout.splitlines())
    return {row["Experiment"]: row for row in shown if row["Experiment"]}


def test_exp_queue_succeeds_and_leaves_logs(clone):
    status = clone.dvc("queue", "status").stdout
    assert status.count("Success") == 2 and "Failed" not in status
    log = clone.dvc("queue", "logs", "width-1")
    assert ran(log) == ["train", "sample", "evaluate"] and "prompt_accuracy" in log.stdout


def test_exp_queue_leaves_workspace_unchanged(clone):
    assert clone.run("git", "status", "--porcelain").stdout == ""
    assert "up to date" in clone.dvc("status").stdout
    config = clone.json("models/dit/transformer/config.json")
    assert config["hidden_size"] == 32


def test_exp_show_has_a_row_for_each(clone):
    shown = rows(clone)
    assert set(shown) == set(NAMES)
    assert [shown[name]["shapes.model.hidden_size"] for name in NAMES] == ["32", "16", "24", "32"]
    assert [shown[name]["train.batch_size"] for name in NAMES] == ["8", "16", "16", "12"]
    losses = [shown[name]["metrics/evaluate.json:val_loss"] for name in NAMES]
    assert len(set(losses)) == 4 and all(float(loss) > 0 for loss in losses)


def test_exp_run_logs_into_the_store_at_the_root(clone):
    stores = list(clone.root.rglob("mlflow.db"))
    assert stores == [clone.root / "mlflow.db"]
    shown, (first, *parents) = rows(clone), clone.parents()
    assert "dvc.exp_name" not in first.data.tags
    assert sorted(run.info.run_name for run in parents) == sorted(NAMES)
    store, root = clone.store(), clone.root.resolve()
    for run in parents:
        name = run.info.run_name
        assert run.info.status == "FINISHED" and run.data.tags["dvc.exp_name"] == name
        assert run.data.params["train.batch_size"] == shown[name]["train.batch_size"]
        assert run.data.params["model.hidden_size"] == shown[name]["shapes.model.hidden_size"]
        assert run.data.metrics["clip_score"] == float(shown[name]["clip_score"])
        assert len(store.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")) == 1
        place = Path(url2pathname(urlparse(run.info.artifact_uri).path))
        assert place.is_relative_to(root) and not place.is_relative_to(root / ".dvc")
        assert any(place.rglob("*.png"))


def test_make_experiments_shows_what_differs(clone):
    lines = clone.run(sys.executable, "tools/experiments.py").stdout.splitlines()
    assert max(map(len, lines)) <= 120
    end = next(k for k, line in enumerate(lines) if line.startswith("---"))
    edges = [k for k, mark in enumerate(lines[end]) if mark == "-" and lines[end][max(0, k - 1)] == " " or k == 0]
    cells = [[line[a:b].strip() for a, b in zip(edges, [*edges[1:], None], strict=True)] for line in lines]
    headings = ["".join(column) for column in zip(*cells[:end], strict=True)]
    assert headings == [
        "experiment",
        "created",
        "prompt_accuracy",
        "prompt_accuracy_unseen",
        "clip_score",
        "memorised",
        "val_loss",
        "training_seconds",
        "images_per_second",
        "shapes.model.hidden_size",
        "train.batch_size",
    ]
    table = {row[0]: dict(zip(headings, row, strict=True)) for row in cells[end + 1 :]}
    assert set(table) == {clone.run("git", "branch", "--show-current").stdout.strip(), *NAMES}
    shown = rows(clone)
    for name in NAMES:
        assert table[name]["shapes.model.hidden_size"] == shown[name]["shapes.model.hidden_size"]
        assert float(table[name]["val_loss"]) == pytest.approx(float(shown[name]["metrics/evaluate.json:val_loss"]), rel=1e-3)
        assert float(table[name]["training_seconds"]) == pytest.approx(float(shown[name]["seconds"]), rel=1e-3)


def test_make_experiments_shows_uncommitted_run(clone):
    def first_column() -> list[str]:
        lines = clone.run(sys.executable, "tools/experiments.py").stdout.splitlines()
        return [line.split()[0] for line in lines if line.strip()]

    assert "workspace" not in first_column()
    path = clone.root / "metrics" / "evaluate.json"
    committed = path.read_text()
    path.write_text(json.dumps(json.loads(committed) | {"prompt_accuracy": 0.123}))
    assert first_column().count("workspace") == 1
    path.write_text(committed)


def test_exp_diff_names_params_and_metrics(clone):
    shown = rows(clone)["width-1"]
    changed = {"shapes.model.hidden_size": {"old": 32, "new": 16, "diff": -16}}
    assert json.loads(clone.dvc("params", "diff", "HEAD", "width-1", "--json").stdout) == {"params.yaml": changed}
    both = json.loads(clone.dvc("exp", "diff", "HEAD", "width-1", "--json").stdout)
    assert both["params"] == {"params.yaml": changed}
    metrics = json.loads(clone.dvc("metrics", "diff", "HEAD", "width-1", "--json").stdout)
    for found in (metrics, both["metrics"]):
        loss = found["metrics/evaluate.json"]["val_loss"]
        assert loss["old"] == clone.json("metrics/evaluate.json")["val_loss"]
        assert loss["new"] == float(shown["metrics/evaluate.json:val_loss"])


def specifications(page: str) -> dict[str, dict]:
    """The Vega specifications in a page of `dvc plots`, by title."""
    found = [json.JSONDecoder().raw_decode(part)[0] for part in page.split("var spec = ")[1:]]
    return {spec["title"]["text"]: spec for spec in found}


def test_plots_diff_shows_curves_and_images(clone, tmp_path):
    clone.dvc("plots", "diff", "HEAD", "width-1", "--out", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    curves = specifications(page)
    assert set(curves) == {
        "Loss",
        "Training loss, from little noise to much",
        "Gradient norm",
        "Throughput",
        "Learning rate",
        "Validation loss, from little noise to much",
        "Prompt accuracy by attribute",
        "Prompt accuracy by number of things",
    }
    tracked = list(csv.DictReader((clone.root / "metrics" / "curves.csv").open()))
    for title, spec in curves.items():
        points = spec["data"]["values"]
        assert {point["rev"] for point in points} == {"HEAD", "width-1"}, title
    loss = curves["Loss"]["data"]["values"]
    assert {point["field"] for point in loss} == {"train_loss", "val_loss", "val_loss_raw"}
    assert [p["train_loss"] for p in loss if (p["rev"], p["field"]) == ("HEAD", "train_loss")] == [
        row["train_loss"] for row in tracked
    ]
    assert "max-width: 45vw" in page  # two fit beside each other
    for name, same in (("samples_grids_val", False), ("samples_grids_unseen", False), ("data_reconstructions", True)):
        images = [f"static/{rev}_{name}.png" for rev in ("HEAD", "width-1")]
        places = [page.index(f'src="{image}"') for image in images]
        assert places == sorted(places) and "inline-block" in page[places[0] : places[1]]
        one, other = (Image.open(tmp_path / image).convert("RGB") for image in images)
        assert (ImageChops.difference(one, other).getbbox() is None) == same, name


def test_exp_apply_can_be_undone(clone):
    clone.dvc("exp", "apply", "width-1")
    assert yaml.safe_load((clone.root / "params.yaml").read_text())["shapes"]["model"]["hidden_size"] == 16
    assert clone.json("models/dit/transformer/config.json")["hidden_size"] == 16
    assert ran(clone.dvc("repro")) == []
    assert clone.json("metrics/mlflow.json")["run_id"] in {
        run.info.run_id for run in clone.parents() if run.info.run_name == "width-1"
    }
    back(clone)
    assert clone.json("models/dit/transformer/config.json")["hidden_size"] == 32
    assert "up to date" in clone.dvc("status").stdout


def test_exp_branch(clone):
    before = clone.run("git", "branch", "--show-current").stdout.strip()
    clone.dvc("exp", "branch", "width-2", "wide")
    clone.run("git", "switch", "-q", "wide")
    clone.dvc("checkout")
    assert clone.json("models/dit/transformer/config.json")["hidden_size"] == 24
    assert "up to date" in clone.dvc("status").stdout
    clone.run("git", "switch", "-q", before)
    clone.dvc("checkout")
    assert "up to date" in clone.dvc("status").stdout


def test_run_cache_restores_trained_model(clone):
    runs = len(clone.parents())
    assert ran(clone.dvc("exp", "run", "-S", "train.batch_size=8", "-n", "once-more")) == []
    assert clone.json("metrics/train.json")["steps"] == 24
    assert len(clone.parents()) == runs
    clone.dvc("exp", "remove", "once-more")
    back(clone)


def test_run_cache_serves_switched_recipe(clone):
    """With one's own images: some of the rendered ones, stretched to three shapes; the bundled encoders need no network."""
    own_images = clone.root.parent / "custom data"
    own_images.mkdir()
    for k, row in enumerate(clone.json("data/raw/metadata.json")[:16]):
        image = Image.open(clone.root / "data" / "raw" / row["image"])
        image.resize([(64, 64), (96, 64), (64, 96)][k % 3]).save(own_images / Path(row["image"]).name)
        (own_images / Path(row["image"]).name).with_suffix(".txt").write_text(row["text"])
    path = clone.root / "params.yaml"
    original = path.read_text()
    values = yaml.safe_load(original)
    values["recipe"], folder = "folder", values["folder"]
    folder["data"].update(paths=[str(own_images)], val_fraction=0.25)
    folder["encode"] = values["shapes"]["encode"] | {"aspect_ratios": "buckets", "image_size": 128}
    folder["model"], folder["optim"] = values["shapes"]["model"] | {"patch_size": 1}, values["shapes"]["optim"]
    other = yaml.safe_dump(values, sort_keys=False)

    path.write_text(other)
    assert ran(clone.dvc("repro")) == list(STAGES)
    assert clone.json("metrics/download.json")["images"] == 16
    sizes = {Image.open(path).size for path in (clone.root / "samples" / "images").glob("*.png")}
    assert len(clone.json("models/dit/model_index.json")["encoders"]["sizes"]) == 3 and len(sizes) > 1
    runs, model = len(clone.parents()), (clone.root / "models/dit/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    path.write_text(original)
    assert ran(clone.dvc("repro")) == []
    assert clone.run("git", "status", "--porcelain").stdout == ""
    path.write_text(other)
    assert ran(clone.dvc("repro")) == []
    assert (clone.root / "models/dit/transformer/diffusion_pytorch_model.safetensors").read_bytes() == model
    assert len(clone.parents()) == runs

    shutil.copy(next(own_images.glob("*.txt")), own_images / "one_more.txt")
    shutil.copy(next(own_images.glob("*.png")), own_images / "one_more.png")
    assert ran(clone.dvc("repro", "download")) == ["download"]
    assert clone.json("metrics/download.json")["images"] == 17
    back(clone)
    assert "up to date" in clone.dvc("status").stdout


def test_exp_run_aside_with_own_encoder(tmp_path):
    """With a setting that YAML 1.1 takes for false, and a folder that git does not know and the copy does not have."""
    clone = Clone(tmp_path / "project")
    shutil.copytree(BUILTIN / "vae", clone.root / "encoders" / "my-vae")
    (clone.root / ".git" / "info" / "exclude").write_text("encoders\n")
    settings = ("train.mixed_precision=no", "shapes.encode.vae=encoders/my-vae", "shapes.optim.num_epochs=1")
    clone.dvc("exp", "run", "--temp", "-n", "aside", *(part for setting in settings for part in ("-S", setting)))
    (run,) = clone.parents()
    assert (run.data.params["train.mixed_precision"], run.data.params["encode.vae"]) == ("no", "encoders/my-vae")
    clone.dvc("exp", "apply", "aside")
    assert clone.json("models/dit/model_index.json")["encoders"]["vae"]["name"] == "encoders/my-vae"
    model, image = str(clone.root / "models" / "dit"), tmp_path / "image.png"
    command = (sys.executable, "-m", "dit.cli", "generate", "--checkpoint", model, "--prompt", "a red circle", "--output", image)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(clone.root) | {"PYTHONPATH": str(clone.root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert image.is_file()


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("stages/__init__.py", set()),
        ("dit/tracking/mlflow.py", set()),
        ("dit/pipeline/schedulers.py", {"sample"}),
        ("dit/evaluation/accuracy.py", {"evaluate"}),
        ("dit/training/trainer.py", {"train"}),
        ("dit/model/objectives.py", {"train", "sample", "evaluate"}),
        ("dit/shapes/scene.py", {"download", "sample", "evaluate"}),
    ],
)
def test_edit_runs_stages_that_it_can_change(clone, file, stages):
    path = clone.root / file
    original = path.read_text()
    path.write_text(original + "\n# edited\n")
    stale = set(json.loads(clone.dvc("status", "--json").stdout))
    path.write_text(original)
    assert stale == stages
