"""params.yaml: what is in it is right, and whatever could be wrong is one line that says what would be."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import yaml

from dit.commands.check import RAW_BYTES
from dit.config import DEFAULTS, RECIPES, load_config, parse_config
from dit.errors import UserError
from helpers import REPO

VALUES = yaml.safe_load((REPO / "params.yaml").read_text())


def changed(path: str, value) -> dict:
    values = copy.deepcopy(VALUES)
    *blocks, key = path.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[key] = value
    return values


def test_config_committed_file_is_valid_for_every_recipe():
    for recipe in RECIPES:
        assert parse_config(changed("recipe", recipe)).active.data.source == recipe


def test_check_knows_every_recipe():
    assert set(RAW_BYTES) == set(RECIPES)


def test_config_defaults_equal_sample_block():
    assert {name: VALUES["sample"][name] for name in DEFAULTS._fields} == DEFAULTS._asdict()


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        load_config(REPO / "params.yaml").train.batch_size = 1


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("train.batchsize", 3, "train.batchsize: unknown key; did you mean batch_size?"),
        ("nonsense", 3, "nonsense: unknown key; known here: recipe, shapes"),
        ("coco.data.bogus", 3, "coco.data.bogus: unknown key; known here: source, split"),
        ("shapes.model.hidden_size", 102, "hidden_size: 102 is not a multiple of num_heads (4); 96 or 112 would be right"),
        ("shapes.model.hidden_size", 36, "makes heads of 9, which is not a multiple of 4"),
        ("shapes.encode.image_size", 60, "60 is not a multiple of 32 (VAE factor 8 x patch_size 4); 32 or 64 would be right"),
        ("train.batch_size", "many", "train.batch_size: 'many': must be a valid integer"),
        ("train.batch_size", 0, "train.batch_size: 0: must be greater than or equal to 1"),
        ("train.batch_size", True, "train.batch_size: True: must be a valid integer"),
        ("train.caption_dropout", 1.0, "train.caption_dropout: 1.0: must be less than 1"),
        ("shapes.optim.compile_model", "yes", "compile_model: 'yes': must be auto, True or False"),
        ("recipe", "circles", "recipe: 'circles': must be shapes, coco, folder or hub"),
        ("coco.data.split", "test2017", "coco.data.split: 'test2017': must be train2017, val2017 or both"),
        ("folder.data.paths", "pictures", "folder.data.paths: 'pictures': must be a valid tuple"),
        ("shapes.encode", None, "shapes.encode: None: must be a block of settings"),
    ],
)
def test_config_mistake_is_one_line_with_remedy(path, value, says):
    with pytest.raises(UserError) as error:
        parse_config(changed(path, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_config_names_every_missing_key():
    def walk(block, path):
        for key, value in block.items():
            yield (*path, key)
            if isinstance(value, dict):
                yield from walk(value, (*path, key))

    for path in walk(VALUES, ()):
        values = copy.deepcopy(VALUES)
        block = values
        for name in path[:-1]:
            block = block[name]
        del block[path[-1]]
        with pytest.raises(UserError) as error:
            parse_config(values)
        assert f"{'.'.join(path)}: missing" in str(error.value)


def test_config_reads_exponent_without_dot():
    assert parse_config(changed("shapes.optim.learning_rate", "1e-4")).active.optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("block", "old", "new"), [("shapes", "schedule", "optim"), ("train", "max_skipped", "max_nonfinite_steps")]
)
def test_config_names_what_became_of_an_old_key(block, old, new):
    values = copy.deepcopy(VALUES)
    values[block][old] = values[block].pop(new)
    with pytest.raises(UserError, match=f"{block}.{old}: is called {new} now"):
        parse_config(values)


@pytest.mark.parametrize(
    ("text", "says"), [("a: [", "not valid YAML"), ("- 1", "expected blocks of settings"), (None, "no such file")]
)
def test_config_names_unreadable_file(tmp_path, text, says):
    path = tmp_path / "params.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        load_config(path)
