"""params.yaml: what is in it is right, and whatever could be wrong is one line that says what would be."""

from __future__ import annotations

import copy
import functools
from dataclasses import FrozenInstanceError
from functools import reduce

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dit.commands.check import RAW_BYTES
from dit.config import DEFAULTS, RECIPES, load_config, parse_config
from dit.errors import UserError
from dit.yaml_file import read_yaml
from helpers import REPO

TEXT = (REPO / "params.yaml").read_text(encoding="utf-8")
VALUES = read_yaml(TEXT, "params.yaml")
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(path: str, value) -> dict:
    values = copy.deepcopy(VALUES)
    *blocks, key = path.split(".") if isinstance(path, str) else [path]
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


def test_config_refuses_an_image_as_output_of_ddpm():
    values = changed("train.objective", "ddpm")
    values["shapes"]["model"]["output"] = "velocity"
    assert parse_config(values).train.objective == "ddpm"
    values["shapes"]["model"]["output"] = "image"
    with pytest.raises(UserError, match=r"shapes\.model\.output: image is for train\.objective flow; velocity would be right"):
        parse_config(values)


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
        ("shapes.encode.image_size", 60, "60 is not a multiple of 16 (VAE factor 8 x patch_size 2); 48 or 64 would be right"),
        ("train.batch_size", "many", "train.batch_size: 'many': must be a valid integer"),
        ("train.batch_size", 0, "train.batch_size: 0: must be greater than or equal to 1"),
        ("train.batch_size", True, "train.batch_size: True: must be a valid integer"),
        ("runtime.num_processes", "many", "runtime.num_processes: 'many': must be a valid integer, or auto"),
        ("runtime.sharding", "some", "runtime.sharding: 'some': must be none or full"),
        ("train.caption_dropout", 1.0, "train.caption_dropout: 1.0: must be less than 1"),
        ("train.max_grad_norm", True, "train.max_grad_norm: True: must be a valid number"),
        ("train.max_grad_norm", float("inf"), "train.max_grad_norm: inf: must be a finite number"),
        ("train.seed", 1e5, "train.seed: 100000.0: must be a valid integer; 100000 would be right"),
        ("train.horizontal_flip", "no", "train.horizontal_flip: 'no': must be true or false"),
        ("shapes.optim.compile_model", "yes", "compile_model: 'yes': must be auto, True or False"),
        ("recipe", "circles", "recipe: 'circles': must be shapes, coco, folder, hub or webdataset"),
        ("coco.data.split", "test2017", "coco.data.split: 'test2017': must be train2017, val2017 or both"),
        ("folder.data.paths", None, "folder.data.paths: None: must be a list: [one, another]"),
        ("sample.prompts", "", "sample.prompts: '': must not be empty"),
        ("coco.encode.vae_revision", 1234567, """put it in quotes: '…', or with -S: -S "coco.encode.vae_revision='…'\""""),
        ("hub.data.caption_columns", [2024], """put it in quotes: '…', or with -S: -S "hub.data.caption_columns=['…']\""""),
        ("a\nb", 3, "a b: unknown key"),
        (7, 3, "7: unknown key; known here: recipe, shapes"),
        ("shapes.encode", None, "shapes.encode: None: must be a block of settings"),
    ],
)
def test_config_mistake_is_one_line_with_remedy(path, value, says):
    with pytest.raises(UserError) as error:
        parse_config(changed(path, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_config_refuses_the_third_level_of_quarters():
    values = changed("shapes.data.level", 3)
    assert parse_config(values).shapes.data.layout == "free"
    values["shapes"]["data"]["layout"] = "quarters"
    with pytest.raises(UserError, match=r"level: 3 is of layout free; 1 or 2 would be right with layout quarters"):
        parse_config(values)


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


def setting(params, path: str):
    return reduce(getattr, path.split("."), params)


def overridden(folder, *overrides: str):
    """The settings after `dvc exp run -S`, which rewrites the file."""
    (folder / "params.yaml").write_text(TEXT, encoding="utf-8")
    apply_overrides(folder / "params.yaml", list(overrides))
    return load_config(folder / "params.yaml")


@pytest.mark.parametrize("value", ["no", "'no'", '"no"'])
def test_config_text_that_yaml_1_1_takes_for_false(tmp_path, value):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace("mixed_precision: bf16", f"mixed_precision: {value}"), encoding="utf-8")
    assert load_config(path).train.mixed_precision == "no"
    assert overridden(tmp_path, f"train.mixed_precision={value}").train.mixed_precision == "no"


LOOKALIKES = [
    "no",
    "on",
    "off",
    "yes",
    "null",
    "~",
    "true",
    "1e-4",
    "1e5",
    "0123",
    "0x10",
    "12345",
    ".inf",
    "12:30",
    "2024-01-05",
]


@pytest.mark.parametrize("text", [*LOOKALIKES, "~/images", "été#1"])
def test_config_text_set_in_quotes(tmp_path, text):
    assert overridden(tmp_path, f"coco.encode.vae_revision='{text}'").coco.encode.vae_revision == text


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("3.0e-3", 3e-3), ("1E-5", 1e-5), (".001", 1e-3), ("+.5", 0.5), ("5", 5.0), ("1_0.5", 10.5)],
)
def test_config_notations_of_a_number(tmp_path, text, number):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace("learning_rate: 6.0e-3", f"learning_rate: {text}"), encoding="utf-8")
    assert load_config(path).shapes.optim.learning_rate == number
    assert overridden(tmp_path, f"shapes.optim.learning_rate={text}").shapes.optim.learning_rate == number


def test_config_null(tmp_path):
    assert overridden(tmp_path, "train.snr_gamma=5", "hub.data.revision=x").train.snr_gamma == 5
    assert overridden(tmp_path, "train.snr_gamma=null").train.snr_gamma is None


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("folder.data.paths=custom_data", "folder.data.paths", ("custom_data",)),
        ("folder.data.paths=[custom_data]", "folder.data.paths", ("custom_data",)),
        ("hub.data.caption_columns=caption", "hub.data.caption_columns", ("caption",)),
        ("sample.prompts=a red circle", "sample.prompts", ("a red circle",)),
        ("sample.prompts=[]", "sample.prompts", ()),
        ("sample.grid_steps=4", "sample.grid_steps", (4,)),
        ("sample.grid_guidance_scales=1.5", "sample.grid_guidance_scales", (1.5,)),
    ],
)
def test_config_single_value_is_a_list_of_one(tmp_path, override, path, expected):
    assert setting(overridden(tmp_path, override), path) == expected


# Texts as settings have them, of one line; half of a surrogate pair has no UTF-8.
ONE_LINE = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=100)
TEXTS = ONE_LINE | st.sampled_from([*LOOKALIKES, "=", "<<", "- a", "a: b", "a #b"])


@EXAMPLES
@given(text=TEXTS, prompts=st.lists(TEXTS, max_size=3))
def test_config_text_comes_back_from_dvc(tmp_path, text, prompts):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")
    with modify_yaml(path) as values:
        values["hub"]["data"].update(dataset=text, config=text, caption_columns=[text])
        values["sample"]["prompts"] = prompts
    params = load_config(path)
    assert params.hub.data.dataset == params.hub.data.config == text
    assert params.hub.data.caption_columns == (text,) and params.sample.prompts == tuple(prompts)


@EXAMPLES
@given(number=st.floats(min_value=0, exclude_min=True, allow_infinity=False), whole=st.integers(1, 2**53))
@example(number=1e-5, whole=8)
def test_config_number_comes_back_from_dvc(tmp_path, number, whole):
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")
    with modify_yaml(path) as values:
        values["train"].update(snr_gamma=number, max_grad_norm=whole, seed=whole)
    train = load_config(path).train
    assert (train.snr_gamma, train.max_grad_norm, train.seed) == (number, whole, whole)


@pytest.mark.parametrize(
    ("blocks", "old", "new"),
    [("shapes", "schedule", "optim"), ("train", "max_skipped", "max_nonfinite_steps"), ("coco.data", "layout", "storage")],
)
def test_config_names_what_became_of_an_old_key(blocks, old, new):
    values = copy.deepcopy(VALUES)
    inner = functools.reduce(dict.__getitem__, blocks.split("."), values)
    inner[old] = inner.pop(new)
    with pytest.raises(UserError, match=f"{blocks}.{old}: is called {new} now"):
        parse_config(values)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "not valid YAML: line 1, column 5: expected the node content"),
        (b"- 1", "expected blocks of settings"),
        (b"", "expected blocks of settings"),
        (b"train: {seed: 1}\ntrain: {seed: 2}", 'line 2, column 1: found duplicate key "train"'),
        (b"train:\n\tseed: 1", "line 2, column 1: found character '\\t' that cannot start any token; indent with blanks"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: found another document"),
        (b'{"\\ud800": 1}', "holds half of a UTF-16 pair, which is no character"),
        (b"a: *b", "line 1, column 4: found undefined alias 'b'"),
        (b"a: 2024-13-45", "ValueError: month must be in 1..12"),
        (b"a: !!bool perhaps", "not valid YAML: KeyError"),
        (b"a: \x01", "unacceptable character #x0001"),
        (b"a: " + b"[" * 9999, "not valid YAML: RecursionError"),
        ("recipe: größer".encode("utf-16"), "not UTF-8 (byte 0); save it as UTF-8"),
    ],
)
def test_config_names_unreadable_file(tmp_path, content, says):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_config_names_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file; run from the project's folder"):
        load_config(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_config_of_windows_editors(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert load_config(path) == load_config(REPO / "params.yaml")


def test_config_with_anchors(tmp_path):
    path = tmp_path / "params.yaml"
    text = TEXT.replace("  optim:\n", "  optim: &mine\n", 1)
    start = text.index("  optim:\n", text.index("\nfolder:"))
    changed = "  optim:\n    <<: *mine\n    num_epochs: 7\n"
    path.write_text(text[:start] + changed + text[text.index("\nhub:") :], encoding="utf-8")
    optim, mine = load_config(path).folder.optim, load_config(path).shapes.optim
    assert (optim.num_epochs, optim.learning_rate) == (7, mine.learning_rate)
