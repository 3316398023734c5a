"""Sheets of images: those of the default recipe as they always were, those of large images no wider than the report shows."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dit.commands.compare import comparison_image
from dit.config import GRID_PROMPTS
from dit.dataset.reader import Entry
from dit.evaluation.figures import plot_nearest, plot_worst
from dit.evaluation.memorization import Nearest
from dit.pipeline.sampling import COLUMNS, MOMENTS, SHOWN, TIMES, settings_grid
from dit.report.report import WIDEST
from dit.utils import images as images_module
from dit.utils.images import draw_label, grid, label_font, labelled_grid, wrap

SCALES, STEPS = (1.0, 1.5, 3.0), (5, 10, 20)
LABEL = "a man riding a wave on top of a surfboard in front of a large crowd of people"


def random_images(count: int, size: int) -> list[Image.Image]:
    source = np.random.default_rng(size)
    return [Image.fromarray(source.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def enlarged(images: list[Image.Image], labels: list[str], columns: int, cell: int) -> Image.Image:
    """The sheet in which images are enlarged a whole number of times, up to `cell` pixels, and never reduced."""
    scale = max(1, cell // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    fonts = [label_font(label) for label in labels]
    texts = [wrap(label, font, width) for label, font in zip(labels, fonts, strict=True)]
    below = 16 * max(len(lines) for lines in texts) + 4
    tiles = []
    for image, lines, font in zip(images, texts, fonts, strict=True):
        tile = Image.new("RGB", (width, height + below), "white")
        tile.paste(image.resize((width, height), Image.Resampling.LANCZOS))
        draw_label(tile, (2, height + 2), lines, font, (60, 60, 60))
        tiles.append(tile)
    return grid(tiles, columns, gap=8)


def settings(images: list[Image.Image]) -> Image.Image:
    """The grid of settings in which each cell shows `images`."""
    with patch("dit.pipeline.sampling.generate_prompts", lambda *_: images):
        return settings_grid(None, images, SCALES, STEPS)


def worst(folder: Path, images: list[Image.Image]) -> Image.Image:
    plot_worst(images, [LABEL] * len(images), [None] * len(images), np.arange(len(images)), folder / "worst.png")
    return Image.open(folder / "worst.png").convert("RGB")


def nearest(folder: Path, images: list[Image.Image]) -> Image.Image:
    images[0].save(folder / "0.png")
    count = len(images)
    found = Nearest(np.zeros(count, dtype=int), np.linspace(0.2, 1, count), np.zeros(count, dtype=bool))
    training = [Entry("0.png", "", "train", "0.png")]
    plot_nearest(images, [""] * count, found, np.ones(count), folder, training, folder / "nearest.png")
    return Image.open(folder / "nearest.png").convert("RGB")


def test_sheets_of_default_recipe_are_whole_enlargements(tmp_path):
    images = random_images(SHOWN, 64)
    assert labelled_grid(images, [LABEL] * SHOWN, columns=COLUMNS) == enlarged(images, [LABEL] * SHOWN, COLUMNS, 160)
    assert labelled_grid(images, [LABEL] * SHOWN, columns=TIMES) == enlarged(images, [LABEL] * SHOWN, TIMES, 160)
    assert labelled_grid(images, [LABEL] * SHOWN, MOMENTS, cell=128) == enlarged(images, [LABEL] * SHOWN, MOMENTS, 128)
    cell = grid(images[:GRID_PROMPTS], columns=2, gap=2)
    names = [f"guidance {scale:g}, {steps} steps" for scale in SCALES for steps in STEPS]
    assert settings(images[:GRID_PROMPTS]) == enlarged([cell] * len(names), names, len(STEPS), 272)
    names = [f"{LABEL}: CLIP score {k}" for k in range(18)]
    assert worst(tmp_path, images[:18]) == enlarged(images[:18], names, 6, 192)
    pairs = [grid([image, images[0]], columns=2, gap=2) for image in images[:2]]
    names = ["Distance 0.200", "Distance 1.000, does not count"]
    names = [f"{says}. Sample: . Training: " for says in names]
    assert nearest(tmp_path, images[:2]) == enlarged(pairs, names, 2, 384)


def test_sheets_of_large_images_fit_the_report(tmp_path):
    """So it does not shrink them, which would make their labels too small to read."""
    images = random_images(25, 256)
    sheets = [labelled_grid(images, [LABEL] * 25, columns) for columns in (COLUMNS, TIMES)]
    sheets += [labelled_grid(images, [LABEL] * 25, MOMENTS, cell=128), settings(images[:GRID_PROMPTS])]
    sheets += [worst(tmp_path, images), nearest(tmp_path, images)]
    assert all(WIDEST / 2 < sheet.width <= WIDEST for sheet in sheets)


@pytest.mark.parametrize(("columns", "width"), [(2, 190), (8, 141)])
def test_labelled_grid_reduces_large_images(columns, width):
    """By Lanczos, to the cell or to what has room."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8))
    sheet = labelled_grid([image], ["a"], columns)
    expected = image.resize((width, round(width / 2)), Image.Resampling.LANCZOS)
    assert sheet.crop((8, 8, 8 + width, 8 + expected.height)) == expected
    assert sheet.width <= WIDEST


BOX = "\U0010ffff"  # no font has this character
BEYOND_ASCII = "éüß–…€½“Жλ→★♥أ"


def labelled(text: str) -> Image.Image:
    return labelled_grid([Image.new("RGB", (64, 64))], [text], 1)


@pytest.mark.parametrize("character", BEYOND_ASCII)
def test_labels_are_no_boxes(character):
    assert labelled(character) != labelled(BOX)


def test_labels_of_compare_are_no_boxes():
    """Those of prompts above, and names of runs on the left."""
    sheets = []
    for name, prompt in (("é", "a"), (BOX, "a"), ("a", "é"), ("a", BOX)):
        runs = pd.DataFrame([{"run_id": "0123456789", "tags.mlflow.runName": name, "metrics.val_loss": 0.5}])
        with patch("dit.commands.compare._read_samples", lambda _, prompt=prompt: {(prompt, 0): Image.new("RGB", (64, 64))}):
            sheets.append(comparison_image(runs, "val_loss"))
    assert sheets[0] != sheets[1] and sheets[2] != sheets[3]


def fonts_of_matplotlib(*names: str) -> list[str]:
    return [str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf") for name in names]


def test_label_font_of_system(monkeypatch, tmp_path):
    """What DejaVu lacks comes from the system's font that has most of it, if it has more."""
    both = "\U0001d538\u2902"  # one that DejaVu has, and one of STIX alone
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    (tmp_path / "LastResort.otf").write_bytes(Path(*fonts_of_matplotlib("LastResortHE-Regular")).read_bytes())
    found = [*map(str, tmp_path.iterdir()), *fonts_of_matplotlib("cmr10", "STIXGeneral")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: found)
    images_module._system_fonts.cache_clear()
    assert label_font(both).getname()[0] == "STIXGeneral"
    assert label_font("é").getname()[0] == label_font(BOX).getname()[0] == "DejaVu Sans"
    assert labelled(both) != labelled(both[0] + BOX)
    found[:] = []
    images_module._system_fonts.cache_clear()
    assert label_font(both).getname()[0] == "DejaVu Sans"
    monkeypatch.undo()
    images_module._system_fonts.cache_clear()


@given(st.text() | st.text("ab 文字é-/…", max_size=200), st.integers(30, 300), st.integers(1, 6))
@example("一只红色的圆在蓝色方块上面" * 3, 128, 5)
@example("https://example.com/a/very/long/path/that/no/line/holds/image-0001.png", 64, 9)
@example("a " * 100, 30, 2)
@example("W" * 100, 30, 1)
def test_wrap_fits_and_loses_nothing(text, width, most):
    """Each line fits, and all characters are there in order, unless more lines than allowed are cut, with a sign of it."""
    font = label_font(text)
    lines = wrap(text, font, width, most)
    assert len(lines) <= most and all(font.getlength(line) <= width for line in lines)
    whole, shown = "".join(text.split()), "".join("".join(lines).split())
    assert shown == whole or (len(lines) == most and shown.endswith("…") and whole.startswith(shown[:-1]))


def test_wrap_keeps_words_that_fit():
    font = label_font("")
    assert wrap("a red circle above a blue star", font, 80) == ["a red circle", "above a blue", "star"]
    assert wrap("see https://example.com/images", font, 80)[0] == "see"
