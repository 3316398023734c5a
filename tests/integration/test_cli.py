"""The command line: help, mistakes in one line before anything is computed, `check`, `where` and `inspect`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dit import cli
from dit.commands import where
from dit.config import parse_config
from dit.encode.encode import encode_dataset
from dit.sources import fetch
from helpers import REPO


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the settings of the recipe shapes; returns what changes them."""
    monkeypatch.chdir(tmp_path)

    def change(**blocks):
        values = yaml.safe_load((REPO / "params.yaml").read_text()) | {"recipe": "shapes"}
        for name, value in blocks.items():
            if isinstance(value, dict):
                for key, setting in value.items():
                    values[name][key].update(setting) if isinstance(setting, dict) else values[name].update({key: setting})
            else:
                values[name] = value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        return values

    change()
    return change


def test_check_passes_default_settings(project, capsys):
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_check_prints_mistake_in_one_line(project, capsys, changes, message):
    project(**changes)
    assert cli.main(["check"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_check_names_missing_weights(project):
    """In a process of its own: the Hub's library reads its environment once, when it is imported."""
    project(shapes={"encode": {"vae": "nobody/nothing-of-the-kind"}})
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-m", "dit.cli", "check"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "encode.vae: 'nobody/nothing-of-the-kind' cannot be downloaded from http://127.0.0.1:9" in done.stderr


def test_check_skips_data_that_is_there(project, tmp_path):
    values = project(
        recipe="coco",
        coco={"data": {"base_url": "http://127.0.0.1:9"}, "encode": {"vae": "builtin", "clip": "builtin"}},
    )
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / "source.json").write_text(json.dumps(asdict(parse_config(values).coco.data)))
    assert cli.main(["check"]) == 0


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0 and 'dit generate --prompt "a red circle' in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'pandas', 'mlflow', 'matplotlib'}"
    code = f"import sys; from dit import cli; cli.build_parser(); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_where_names_the_way_to_mlflow(project, capsys):
    assert cli.main(["where"]) == 0
    assert "none here yet" in capsys.readouterr().out
    Path("mlflow.db").touch()
    assert cli.main(["where"]) == 0
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in capsys.readouterr().out


def test_where_prints_how_to_keep_uncommitted_results(project, capsys):
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


@pytest.mark.parametrize("command", ["benchmark training --output", "compare --output", "compare --csv"])
def test_unwritable_output_is_refused_first(project, capsys, command):
    Path("file").touch()
    assert cli.main([*command.split(), "file/out.png"]) == 1
    assert capsys.readouterr().err == f"dit: {command.split()[-1]} file/out.png: file cannot be made: File exists\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "a cat"], 'not understood: a cat; a prompt is one text behind its flag: --prompt "a cat"'),
        (["generate", "--promt", "x"], "not understood: --promt x; did you mean --prompt?"),
        (["sweep", "--guidence_scale=2"], "not understood: --guidence_scale=2; did you mean --guidance_scale?"),
        (["where", "now"], "not understood: now"),
        (["benchmark", "training", "--stps=3"], "not understood: --stps=3; did you mean --steps?"),
    ],
)
def test_unknown_argument_prints_usage_of_command(capsys, command, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    error = capsys.readouterr().err
    usage = f"usage: dit {' '.join(command[:-1])} " if command[0] == "benchmark" else f"usage: dit {command[0]} "
    assert caught.value.code == 2 and error.startswith(usage) and error.endswith(f"error: {message}\n")


@pytest.mark.parametrize("command", [["where"], ["generate", "--prompt", "x"]])
def test_outside_the_project_is_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 1
    assert "run from the project's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder; `dvc repro encode` makes data/latents"),
        (["model"], "model: a trained model, not a latent cache"),
        (["images"], "images: not a whole latent cache"),
        (["images", "--decode", "-3"], "--decode: -3 is not a number of images"),
    ],
)
def test_inspect_refuses_what_is_no_cache(tmp_path, monkeypatch, capsys, what, message):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "images"):
        Path(name).mkdir()
    Path("model/model_index.json").write_text("{}")
    assert cli.main(["inspect", *what]) == 1
    assert capsys.readouterr().err.startswith(f"dit: {message}")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """A folder with twelve rendered scenes in raw/ and their cache in latents/."""
    folder = tmp_path_factory.mktemp("encoded")
    params = parse_config(yaml.safe_load((REPO / "params.yaml").read_text()))
    runtime = replace(params.runtime, num_workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        fetch(replace(params.shapes.data, num_samples=12, storage="shards"), folder / "raw", runtime)
        encode = replace(params.shapes.encode, image_size=64, vae="builtin", clip="builtin")
        encode_dataset(folder / "raw", folder / "latents", encode, runtime, folder / "reconstructions.png")
    return folder


def test_inspect_summarises_a_cache(encoded, capsys):
    assert cli.main(["inspect", str(encoded / "latents")]) == 0
    printed = capsys.readouterr().out
    for fact in ("12, 11 to train on and 1 to validate with", "64 x 64 pixels, as latents 16 x 8 x 8", "every file has the hash"):
        assert fact in printed


def test_inspect_decodes_latents_beside_their_originals(encoded, tmp_path):
    sheet = tmp_path / "sheet.png"
    flags = ["--decode", "6", "--raw", str(encoded / "raw"), "--output", str(sheet)]
    assert cli.main(["inspect", str(encoded / "latents"), *flags]) == 0
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)
    original, decoded = pixels[8:136, 8:136], pixels[8:136, 140:268]  # twice as large as 64 pixels, 8 pixels from the border
    assert np.abs(original - decoded).mean() < 6 < np.abs(original - pixels[8:136, 276:404]).mean()


def test_inspect_finds_damage(encoded, tmp_path, capsys):
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    assert cli.main(["inspect", str(tmp_path / "latents")]) == 1
    assert f"{shard}: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("training --hidden-size 33", "--hidden-size: 33 is not a multiple of 4 x --num-heads"),
        ("training --steps 0", "--steps: 0 is not a positive number"),
        ("training --batch-size 0", "--batch-size: 0 is not a positive number"),
        ("data --entries 200 0", "--entries: 0 is not a positive number"),
        ("sampling text --checkpoint nowhere", "nowhere: no such folder; "),
        ("recipe default other", "other: no such variant; they are default"),
    ],
)
def test_benchmark_refuses_what_it_cannot_measure(project, capsys, arguments, message):
    assert cli.main(["benchmark", *arguments.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dit: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["training", "data", "sampling", "speedrun", "race", "recipe"])
def test_benchmark_help_has_examples(capsys, kind):
    with pytest.raises(SystemExit):
        cli.main(["benchmark", kind, "--help"])
    assert f"examples:\n  dit benchmark {kind}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["benchmark"]])
def test_group_alone_prints_its_help(capsys, arguments):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: dit", *arguments, "[-h]"]))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "dit: the GPU ran out of memory; "),
        (MemoryError(), "dit: memory ran out; "),
    ],
)
def test_cli_out_of_memory_is_one_line(monkeypatch, capsys, error, says):
    def full(arguments: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr(where, "run_where", full)
    assert cli.main(["where"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(says) and line.count("\n") == 1
