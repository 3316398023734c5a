"""The command line says what is wrong before anything is computed, and helps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dit import cli
from dit.config import parse_config
from dit.encode.encode import encode_dataset
from dit.sources import fetch
from helpers import REPO


@pytest.fixture
def project(tmp_path, monkeypatch):
    shutil.copy(REPO / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)

    def change(**blocks):
        values = yaml.safe_load((tmp_path / "params.yaml").read_text())
        for name, value in blocks.items():
            if isinstance(value, dict):
                for key, setting in value.items():
                    values[name][key].update(setting) if isinstance(setting, dict) else values[name].update({key: setting})
            else:
                values[name] = value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        return values

    return change


def test_the_default_settings_pass_the_check(project, capsys):
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": {"batchsize": 3}}, "params.yaml: train.batchsize: unknown key; did you mean batch_size?"),
        ({"shapes": {"model": {"hidden_size": 100}}}, "shapes.model.hidden_size: 100"),
        ({"shapes": {"encode": {"image_size": 60}}}, "shapes.encode.image_size: 60"),
        (
            {"recipe": "coco", "coco": {"data": {"base_url": "http://127.0.0.1:9"}}},
            "coco.data.base_url: cannot reach http://127.0.0.1:9",
        ),
        ({"recipe": "folder", "folder": {"data": {"paths": ["."]}}}, "folder.data.paths: no image with a .txt beside it in ."),
        ({"recipe": "folder", "folder": {"data": {"paths": ["nowhere"]}}}, "folder.data.paths: nowhere is not a folder"),
        ({"shapes": {"data": {"num_samples": 10**12}}}, "disk: about"),
        ({"shapes": {"encode": {"vae": "."}}}, "encode.vae: '.' has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_one(project, capsys, changes, says):
    project(**changes)
    assert cli.main(["check"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_weights_that_the_hub_does_not_give_are_named(project):
    """In a process of its own: the Hub's library reads its environment once, when it is imported."""
    project(shapes={"encode": {"vae": "nobody/nothing-of-the-kind"}})
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-m", "dit.cli", "check"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "encode.vae: 'nobody/nothing-of-the-kind' cannot be had from http://127.0.0.1:9" in done.stderr


def test_data_that_is_there_already_is_not_asked_for_again(project, tmp_path):
    values = project(
        recipe="coco",
        coco={"data": {"base_url": "http://127.0.0.1:9"}, "encode": {"vae": "builtin", "clip": "builtin"}},
    )
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "source.json").write_text(json.dumps(asdict(parse_config(values).coco.data)))
    assert cli.main(["check"]) == 0


def test_help_has_examples_and_where_names_the_way_to_mlflow(project, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0 and 'dit generate --prompt "a red circle' in capsys.readouterr().out
    assert cli.main(["where"]) == 0
    assert "none here yet" in capsys.readouterr().out
    Path("mlflow.db").touch()
    assert cli.main(["where"]) == 0
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in capsys.readouterr().out


def test_where_says_how_to_keep_results_that_git_does_not_have(project, capsys):
    keep = "keep these results:      git commit -m Results dvc.lock metrics params.yaml"
    for path in ("models/dit/model_index.json", "metrics/evaluate.json", "dvc.lock"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (["init", "-q"], ["add", "dvc.lock", "metrics", "params.yaml"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    assert cli.main(["where"]) == 0 and keep not in capsys.readouterr().out
    Path("metrics/evaluate.json").write_text('{"prompt_accuracy": 0.5}')
    assert cli.main(["where"]) == 0 and keep in capsys.readouterr().out


@pytest.mark.parametrize("command", [["benchmark", "--output"], ["compare", "--output"], ["compare", "--csv"]])
def test_where_nothing_can_be_written_nothing_is_begun(project, capsys, command):
    Path("file").touch()
    assert cli.main([*command, "file/out"]) == 1
    assert capsys.readouterr().err == f"dit: {command[1]} file/out: file cannot be made: File exists\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["generate", "a cat"], 'not understood: a cat; a prompt is one text behind its flag: --prompt "a cat"'),
        (["generate", "--promt", "x"], "not understood: --promt x; did you mean --prompt?"),
        (["sweep", "--guidence_scale=2"], "not understood: --guidence_scale=2; did you mean --guidance_scale?"),
        (["where", "now"], "not understood: now"),
    ],
)
def test_what_is_not_understood_is_said_with_the_commands_own_usage(capsys, command, says):
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith(f"usage: dit {command[0]} ") and error.endswith(f"error: {says}\n")


def test_outside_the_project_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in (["where"], ["generate", "--prompt", "x"]):
        assert cli.main(command) == 1
        assert "run from the project's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (["nowhere"], "nowhere: no such file or folder; `dvc repro encode` makes data/latents"),
        (["model"], "model: a trained model, not a latent cache"),
        (["pictures"], "pictures: not a whole latent cache"),
        (["pictures", "--decode", "-3"], "--decode: -3 is not a number of pictures"),
    ],
)
def test_inspect_says_what_is_no_latent_cache(tmp_path, monkeypatch, capsys, what, says):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "pictures"):
        Path(name).mkdir()
    Path("model/model_index.json").write_text("{}")
    assert cli.main(["inspect", *what]) == 1
    assert capsys.readouterr().err.startswith(f"dit: {says}")


def test_inspect_says_what_a_cache_holds_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    params = parse_config(yaml.safe_load((REPO / "params.yaml").read_text()))
    runtime = replace(params.runtime, num_workers=0)
    fetch(replace(params.shapes.data, num_samples=12, layout="shards"), tmp_path / "raw", runtime)
    encode_dataset(tmp_path / "raw", tmp_path / "latents", params.shapes.encode, runtime, tmp_path / "picture.png")
    sheet = tmp_path / "sheet.png"
    arguments = ["inspect", str(tmp_path / "latents"), "--decode", "6", "--raw", str(tmp_path / "raw"), "--output", str(sheet)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    for fact in ("12, 11 to train on and 1 to validate with", "64 pixels, as latents 4 x 8 x 8", "every file is what"):
        assert fact in printed
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    original, decoded = pixels[8:136, 8:136], pixels[8:136, 140:268]  # twice as large as 64 pixels, 8 pixels from the border
    assert np.abs(original - decoded).mean() < 6 < np.abs(original - pixels[8:136, 276:404]).mean()

    index = tmp_path / "latents" / "index.json"
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert cli.main(arguments) == 1
    assert f"{shard}: damaged" in capsys.readouterr().err
    index.write_text("{}")
    assert cli.main(arguments) == 1
    assert "not a readable latent cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hidden-size", "33"], "--hidden-size: 33 is not a multiple of 4 x --num-heads"),
        (["--steps", "0"], "--steps: 0 is not a positive number"),
        (["--batch-size", "0"], "--batch-size: 0 is not a positive number"),
    ],
)
def test_a_size_that_cannot_be_measured_is_one_clear_line(project, capsys, arguments, says):
    assert cli.main(["benchmark", *arguments]) == 1
    assert capsys.readouterr().err == f"dit: {says}\n"
