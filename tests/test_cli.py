"""The command line says what is wrong before anything is computed, and helps."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import yaml
from conftest import REPO

from dit import cli
from dit.config import parse_config


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
        ({"recipe": "folder", "folder": {"data": {"paths": ["."]}}}, "folder.data.paths: no picture with a .txt beside it in ."),
        ({"recipe": "folder", "folder": {"data": {"paths": ["nowhere"]}}}, "folder.data.paths: nowhere is not a folder"),
        ({"shapes": {"data": {"num_samples": 10**12}}}, "disk: about"),
        ({"shapes": {"encode": {"vae": "."}}}, "encode.vae: . has no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_one(project, capsys, changes, says):
    project(**changes)
    assert cli.main(["check"]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_weights_that_the_hub_does_not_give_are_named(project, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    project(shapes={"encode": {"vae": "nobody/nothing-of-the-kind"}})
    assert cli.main(["check"]) == 1
    assert "encode.vae: cannot reach 'nobody/nothing-of-the-kind' on the Hub" in capsys.readouterr().err


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
    assert end.value.code == 0 and 'dit generate "a red circle' in capsys.readouterr().out
    assert cli.main(["where"]) == 0
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in capsys.readouterr().out


def test_generating_without_a_model_says_what_to_do(project, capsys):
    assert cli.main(["generate", "a red circle"]) == 1
    assert "not a trained model" in capsys.readouterr().err
