"""`dit generate --lora` and `dit export --lora`, as they are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from safetensors.torch import load_file

from dit.cli import main
from helpers.small_models import save, save_lora

FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save(folder)
    save_lora(folder / "one", seed=0)
    save_lora(folder / "two", seed=1)
    return folder


def generate(folder: Path, output: Path, *more: str) -> Image.Image:
    steps = ["--num_inference_steps", "2", "--checkpoint", str(folder / "dit"), "--output", str(output)]
    assert main(["generate", "--prompt", "a red circle", *steps, *more]) == 0
    return Image.open(output)


def differ(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is not None


def test_generate_takes_adapters_with_a_scale_and_notes_them(folder, tmp_path, capsys):
    plain = generate(folder, tmp_path / "plain.png")
    one = generate(folder, tmp_path / "one.png", "--lora", str(folder / "one"))
    none = generate(folder, tmp_path / "none.png", "--lora", f"{folder / 'one'}:0")
    both = generate(folder, tmp_path / "both.png", "--lora", f"{folder / 'one' / FILE}:0.5", "--lora", f"{folder / 'two'}:-1.5")
    assert differ(one, plain) and not differ(none, plain) and differ(both, one)
    assert "lora" not in plain.text and one.text["lora"].endswith(":1") and one.text["model"] == plain.text["model"]
    first, second = both.text["lora"].split(" ")
    assert first == one.text["lora"].removesuffix(":1") + ":0.5" and second.endswith(":-1.5")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "both.png")]) == 0
    assert both.text["lora"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing:0.5", "nothing: no such file or folder; a training with train.method lora writes models/dit/lora/"),
        ("one:much", "one:much: no such file or folder"),
        ("latents", f"latents: there is no {FILE} in it"),
    ],
)
def test_generate_without_adapters_of_that_name_is_one_line(folder, capsys, name, says):
    assert main(["generate", "--prompt", "a red circle", "--checkpoint", str(folder / "dit"), "--lora", str(folder / name)]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_export_merges_adapters(folder, tmp_path, capsys):
    shutil.copytree(folder / "one", tmp_path / "trained" / "lora")  # as in a model folder
    output = tmp_path / "merged"
    assert main(["export", str(output), "--checkpoint", str(folder / "dit"), "--lora", f"{tmp_path / 'trained'}:0.5"]) == 0
    assert "without an evaluation: it was of the model before adapters were merged into it" in capsys.readouterr().out
    before, merged, adapters = (load_file(path) for path in (folder / "dit" / WEIGHTS, output / WEIGHTS, folder / "one" / FILE))
    name = "blocks.0.attn.qkv"
    a, b = (adapters[f"transformer.{name}.lora_{kind}.weight"] for kind in "AB")
    assert set(before) == set(merged)
    assert (merged[f"{name}.weight"] - before[f"{name}.weight"] - 0.5 * 2 * b @ a).abs().max() < 1e-5  # alpha / rank is 2
    with_adapters = generate(folder, tmp_path / "with.png", "--lora", f"{folder / 'one'}:0.5", "--scheduler", "euler")
    alone = tmp_path / "alone.png"
    more = ["--num_inference_steps", "2", "--checkpoint", str(output), "--scheduler", "euler", "--output", str(alone)]
    assert main(["generate", "--prompt", "a red circle", *more]) == 0
    low, high = zip(
        *ImageChops.difference(with_adapters.convert("RGB"), Image.open(alone).convert("RGB")).getextrema(), strict=True
    )
    assert max(high) <= 8  # of 255: bf16 rounds a sum and its parts otherwise


def test_adapters_that_are_in_the_model_already_are_named(folder, tmp_path, capsys):
    shutil.copytree(folder / "dit", tmp_path / "dit")
    shutil.copytree(folder / "one", tmp_path / "dit" / "lora")  # as a training of adapters leaves both
    generate(tmp_path, tmp_path / "twice.png", "--lora", str(tmp_path / "dit"))
    assert "is merged into" in capsys.readouterr().err
    generate(tmp_path, tmp_path / "once.png", "--lora", str(folder / "one"))
    assert "is merged into" not in capsys.readouterr().err
