"""Sheets of images: those of the default recipe as they always were, those of large images no wider than the report shows."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dit.config import GRID_PROMPTS
from dit.dataset.reader import Entry
from dit.evaluation.figures import plot_nearest, plot_worst
from dit.evaluation.memorization import Nearest
from dit.pipeline.sampling import COLUMNS, MOMENTS, SHOWN, TIMES, settings_grid
from dit.report.report import WIDEST
from dit.utils.images import grid, labelled_grid, wrap

SCALES, STEPS = (1.0, 1.5, 3.0), (5, 10, 20)
LABEL = "a man riding a wave on top of a surfboard in front of a large crowd of people"


def random_images(count: int, size: int) -> list[Image.Image]:
    source = np.random.default_rng(size)
    return [Image.fromarray(source.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def enlarged(images: list[Image.Image], labels: list[str], columns: int, cell: int) -> Image.Image:
    """The sheet in which images are enlarged a whole number of times, up to `cell` pixels, and never reduced."""
    font = ImageFont.load_default(size=12)
    scale = max(1, cell // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    texts = [wrap(label, font, width) for label in labels]
    below = 16 * max(len(lines) for lines in texts) + 4
    tiles = []
    for image, lines in zip(images, texts, strict=True):
        tile = Image.new("RGB", (width, height + below), "white")
        tile.paste(image.resize((width, height), Image.Resampling.LANCZOS))
        ImageDraw.Draw(tile).multiline_text((2, height + 2), "\n".join(lines), fill=(60, 60, 60), font=font, spacing=2)
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
