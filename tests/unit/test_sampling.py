"""The sample stage: which prompts it chooses, their images, and the grids that show them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import load_config
from dit.dataset.reader import read_metadata
from dit.pipeline.generate import load_pipeline
from dit.pipeline.sampling import (
    MOMENTS,
    TIMES,
    Prompt,
    choose_prompts,
    denoising_strip,
    generate_prompts,
    sample,
    sampling_flops,
    settings_grid,
)
from dit.shapes.captions import parse
from dit.shapes.scene import UNSEEN_PAIRS
from dit.sources import fetch
from helpers import REPO
from helpers.small_models import CHANNELS, save

PARAMS = load_config(REPO / "params.yaml")
SETTINGS = replace(
    PARAMS.sample,
    num_samples=8,
    num_inference_steps=3,
    batch_size=16,
    prompts=("a red circle", "a green cross above a pink heart"),
    grid_guidance_scales=(1.0, 4.0),
    grid_steps=(1, 2, 3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    save(folder)
    fetch(replace(PARAMS.shapes.data, num_samples=40, val_fraction=0.25), folder / "raw", PARAMS.runtime)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return load_pipeline(folder / "dit", "euler")


def test_choose_prompts_shapes(folder):
    prompts = choose_prompts(folder / "raw", "shapes", SETTINGS)
    groups = {name: [prompt.text for prompt in prompts if prompt.group == name] for name in ("val", "unseen", "diversity", "own")}
    held_out = [entry.text for entry in read_metadata(folder / "raw") if entry.split == "val"]
    assert groups["val"] == held_out[:4]  # in the data set's order: the evaluation compares the k-th with the k-th
    assert len(groups["unseen"]) == 4
    assert all(UNSEEN_PAIRS & {thing.pair for thing in parse(text).objects} for text in groups["unseen"])
    assert set(Counter(groups["diversity"]).values()) == {TIMES} and set(groups["diversity"]) == set(held_out)
    assert tuple(groups["own"]) == SETTINGS.prompts
    assert [prompt.seed for prompt in prompts] == [SETTINGS.seed + k for k in range(len(prompts))]
    assert len({prompt.file for prompt in prompts}) == len(prompts)


def test_choose_prompts_other_recipe(folder):
    groups = Counter(prompt.group for prompt in choose_prompts(folder / "raw", "folder", replace(SETTINGS, prompts=())))
    assert groups == {"val": 8, "diversity": 10 * TIMES}


def test_sample_writes_images_and_grids(folder):
    prompts = choose_prompts(folder / "raw", "shapes", SETTINGS)
    rate = sample(folder / "dit", prompts, SETTINGS, folder / "images", folder / "grids")
    assert [row["text"] for row in json.loads((folder / "images" / "prompts.json").read_text())] == [p.text for p in prompts]
    assert {path.name for path in (folder / "images").glob("*.png")} == {prompt.file for prompt in prompts}
    names = {"val", "unseen", "diversity", "own", "settings", "denoising"}
    assert {path.stem for path in (folder / "grids").glob("*.png")} == names
    count = rate["sampling_images_per_second"] * rate["sampling_seconds"]
    assert count == pytest.approx(len(prompts), rel=0.05) and 0 < rate["sampling_mfu"] < 1

    pipeline = load_pipeline(folder / "dit", SETTINGS.scheduler)
    last = prompts[-1]  # alone, and not in a batch of others
    (alone,) = generate_prompts(pipeline, [last], SETTINGS.num_inference_steps, SETTINGS.guidance_scale)
    stored = Image.open(folder / "images" / last.file)
    difference = np.abs(np.asarray(alone).astype(int) - np.asarray(stored))
    assert difference.mean() < 1 and difference.max() <= 8  # bf16 rounds by the batch


def test_settings_grid_rows_are_scales_and_columns_are_steps(pipeline, monkeypatch):
    asked = []

    def record(pipeline, prompts, steps, scale):
        asked.append((scale, steps))
        return [Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr("dit.pipeline.sampling.generate_prompts", record)
    prompts = [Prompt("", "a red circle", 1, "own"), Prompt("", "a blue star", 2, "own")]
    sheet = settings_grid(pipeline, prompts, (1.0, 4.0), (1, 2, 3))
    assert asked == [(1.0, 1), (1.0, 2), (1.0, 3), (4.0, 1), (4.0, 2), (4.0, 3)]
    assert sheet.width > sheet.height


def test_denoising_strip_ends_with_the_image(pipeline):
    prompts = [Prompt("", "a red circle", 1, "own"), Prompt("", "a blue star", 2, "own")]
    strip = np.asarray(denoising_strip(pipeline, prompts, 20, 1.5)).astype(int)
    assert strip.shape[1] == 8 + MOMENTS * (128 + 8)  # images of 128 pixels, 8 apart
    final = next(generate_prompts(pipeline, prompts[:1], 20, 1.5)).resize((128, 128), Image.Resampling.LANCZOS)
    last = strip[8 : 8 + 128, -8 - 128 : -8]
    assert np.abs(last - np.asarray(final)).mean() < 2
    assert np.abs(strip[8 : 8 + 128, 8 : 8 + 128] - last).mean() > 10  # and does not begin with it


def test_sampling_flops(pipeline):
    from torch.utils.flop_counter import FlopCounterMode

    transformer = pipeline.transformer
    tokens, _, pooled, _, mask, _ = pipeline.encode_prompt(["a red circle"])
    keys_values = transformer.text_keys_values(tokens)
    with FlopCounterMode(display=False) as counter:  # with gradients, since the fused attention of CPUs is not counted
        transformer(torch.zeros(1, CHANNELS, 8, 8), torch.ones(1), None, mask, pooled, keys_values)
    text = 2 * transformer.config.num_layers * 2 * 16 * tokens.shape[1] * transformer.config.hidden_size  # attention to it
    assert sampling_flops(pipeline, 1, 1.0) + text == counter.get_total_flops()
    assert sampling_flops(pipeline, 10, 1.5) == 20 * sampling_flops(pipeline, 1, 1.0)
