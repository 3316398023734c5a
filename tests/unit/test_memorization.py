"""Memorization: copies of training images are told from new rendered scenes, also where the data repeat themselves."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dit.dataset.reader import Entry
from dit.encoders.loading import EncoderSource, load_vae
from dit.evaluation.figures import plot_nearest
from dit.evaluation.memorization import SAME, Nearest, find_nearest, measure_memorization, near_threshold
from dit.utils.images import labelled_grid, to_images, to_tensor
from helpers.scenes import QUARTERS, descriptions, features, rendered, several

TRAINING, OTHERS = 600, 400


def nearest(images: list[Image.Image], training: torch.Tensor) -> np.ndarray:
    return find_nearest(features(images), features(images, mirrored=True), training).distance


@torch.no_grad()
def through_the_vae(images: list[Image.Image]) -> list[Image.Image]:
    vae, _ = load_vae(EncoderSource("builtin"))
    latents = vae.encode(to_tensor(torch.from_numpy(np.stack([np.asarray(image) for image in images])))).latent_dist
    return to_images(vae.decode(latents.sample(torch.Generator().manual_seed(0))).sample)


@functools.cache
def crowded() -> tuple[list[Image.Image], torch.Tensor, np.ndarray]:
    """Free scenes of two to four objects, none of which repeats, their features, and the held-out distances."""
    training = rendered(descriptions(11, TRAINING, several), 11)
    known = features(training)
    return training, known, nearest(rendered(descriptions(12, OTHERS, several), 12), known)


@functools.cache
def fresh() -> np.ndarray:
    return nearest(rendered(descriptions(13, OTHERS, several), 13), crowded()[1])


@pytest.mark.parametrize("how", [list, through_the_vae, lambda copies: [ImageOps.mirror(copy) for copy in copies]])
def test_find_nearest_tells_copies_from_new_scenes(how):
    training, known, held_out = crowded()
    assert (nearest(how(training[:100]), known) < near_threshold(held_out)).mean() >= 0.95
    assert (fresh() < near_threshold(held_out)).mean() <= 0.02


def test_measure_memorization_finds_the_planted_share():
    training, known, held_out = crowded()
    samples = np.concatenate([nearest(through_the_vae(training[:100]), known), fresh()[100:]])
    metrics = measure_memorization(samples, held_out, 0.95)
    assert metrics["memorised"] == pytest.approx(100 / OTHERS, abs=0.02)
    assert metrics["memorised_low"] < 100 / OTHERS < metrics["memorised_high"]
    assert metrics["held_out_repeats"] <= 0.02


@functools.cache
def usual() -> tuple[list[Image.Image], torch.Tensor, np.ndarray, list]:
    """The mixture of the default recipe, in which many scenes of one object occur twice."""
    training = rendered(descriptions(14, 1000, kind=QUARTERS), 14, "quarters")
    known, described = features(training), descriptions(15, OTHERS, kind=QUARTERS)
    return training, known, nearest(rendered(described, 15, "quarters"), known), described


def test_measure_memorization_of_repetitive_data():
    training, known, held_out, described = usual()
    fresh = measure_memorization(nearest(rendered(described, 16, "quarters"), known), held_out, 0.95)
    assert fresh["held_out_repeats"] > 0.1 and fresh["nearer_than_held_out"] > 0.1  # flagged, but no more often than real ones
    assert fresh["memorised"] <= 0.02 and fresh["memorised_low"] == 0
    copies = measure_memorization(nearest(through_the_vae(training[:150]), known), held_out, 0.95)
    assert copies["memorised"] >= 0.95 and copies["memorised_low"] > 0.9


def test_find_nearest_brute_force():
    training, known, _ = crowded()
    images = rendered(descriptions(17, 20, several), 17)
    as_is, turned = features(images), features(images, mirrored=True)
    found = find_nearest(as_is, turned, known)
    for k in range(20):
        distances = [[float((row.double() - other.double()).norm()) for other in known] for row in (as_is[k], turned[k])]
        assert found.distance[k] == pytest.approx(np.min(distances), abs=1e-9)
        assert (int(found.mirrored[k]), found.index[k]) == np.unravel_index(np.argmin(distances), (2, len(known)))


def test_measure_memorization_abbott_correction():
    held_out = np.concatenate([np.zeros(40), np.linspace(0.5, 1.5, 60)])  # 40 of 100 are in the training set again
    samples = np.concatenate([np.zeros(70), np.full(30, 1.2)])
    metrics = measure_memorization(samples, held_out, 0.95)
    assert near_threshold(held_out) == pytest.approx(0.51, abs=0.01)
    assert metrics["held_out_repeats"] == 0.41 and metrics["nearer_than_held_out"] == 0.7
    assert metrics["memorised"] == pytest.approx((0.7 - 0.41) / (1 - 0.41), abs=1e-4)
    assert measure_memorization(held_out, held_out, 0.95)["memorised"] == 0


@pytest.mark.parametrize("count", [3, 8, 250])
def test_measure_memorization_of_few_images(count):
    """One of them is always below their own 1st percentile, although it equals no training image."""
    metrics = measure_memorization(np.full(count, 1.3), np.linspace(0.5, 1.2, count), 0.95)
    assert metrics["near_distance"] == pytest.approx(near_threshold(np.linspace(0.5, 1.2, count)), abs=1e-4)
    assert metrics["samples_same"] == 0
    assert metrics["held_out_repeats"] >= 0.01 and metrics["held_out_same"] == metrics["held_out_same_low"] == 0
    assert metrics["memorised_prompts"] == count
    repeated = measure_memorization(
        np.full(count, 1.3), np.linspace(0, 1.2, count), 0.95
    )  # the first of which is a training image
    assert 0 < repeated["held_out_same_low"] < repeated["held_out_same"] < repeated["held_out_same_high"]


def test_measure_memorization_interval_uses_pairs():
    held_out = np.concatenate([np.zeros(40), np.linspace(0.5, 1.5, 60)])
    samples = np.concatenate([np.zeros(50), np.full(50, 1.2)])
    agreeing, reversed_ = measure_memorization(samples, held_out, 0.95), measure_memorization(samples[::-1], held_out, 0.95)
    width = agreeing["memorised_high"] - agreeing["memorised_low"]
    assert agreeing["memorised"] == reversed_["memorised"]
    assert width < 0.6 * (reversed_["memorised_high"] - reversed_["memorised_low"])


@pytest.mark.parametrize("held_out", [[], [0.0, 0.05, SAME / 2]])
def test_measure_memorization_without_calibration(held_out):
    assert measure_memorization(np.array([0.0, 0.9]), np.array(held_out), 0.95) == {}
    assert measure_memorization(np.array([]), np.array([0.5, 0.6]), 0.95) == {}


@pytest.fixture
def shown(tmp_path: Path, monkeypatch):
    """Plots the pairs of samples of these distances and returns their labels, in which "caption k" is that of sample k."""
    training = rendered(descriptions(18, 3, several), 18)
    for k, image in enumerate(training):
        image.save(tmp_path / f"{k}.png")
    entries = [Entry(f"{k}.png", "trained", "train", f"{k}.png") for k in range(3)]
    labels: list[str] = []

    def note(images, texts, columns, cell):
        labels.extend(texts)
        return labelled_grid(images, texts, columns, cell)

    def show(distances: list[float], held_out: list[float]) -> list[str]:
        count = len(distances)
        pairs = Nearest(np.zeros(count, dtype=int), np.array(distances), np.zeros(count, dtype=bool))
        texts = [f"caption {k}" for k in range(count)]
        plot_nearest(training[:1] * count, texts, pairs, np.array(held_out), tmp_path, entries, tmp_path / "nearest.png")
        return labels

    monkeypatch.setattr("dit.evaluation.figures.labelled_grid", note)
    return show


def named(labels: list[str]) -> list[int]:
    return [int(label.partition("caption ")[2].partition(".")[0]) for label in labels]


def test_plot_nearest_pairs_that_count_come_first(shown):
    """Samples 0 to 5 are near to a training image, as is what is held out; of the others, 6 and 7 are."""
    held_out = [0.0] * 6 + [0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    labels = shown([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.3, 0.1, 1.0, 0.95, 1.1, 1.2], held_out)
    assert named(labels) == [7, 6, 0, 1, 2, 3, 4, 5, 9, 8]
    assert labels[0] == "Distance 0.100. Sample: caption 7. Training: trained"
    assert labels[2] == "Distance 0.010, does not count. Sample: caption 0. Training: trained"
    assert labels[8].startswith("Distance 0.950, does not count. ")


def test_plot_nearest_of_many_that_count(shown):
    labels = shown([0.01 * k for k in range(1, 21)], [0.9] * 20)
    assert named(labels) == [0, 1, 2, 3, 4, 15, 16, 17, 18, 19] and not any("count" in label for label in labels)


def test_plot_nearest_without_pairs_that_count(shown):
    labels = shown([0.3, 0.01], [0.0, 0.02])
    assert named(labels) == [1, 0]
    assert labels[0].startswith("Distance 0.010, does not count") and labels[1].startswith("Distance 0.300, does not count")
    assert named(shown([0.4, 0.2], [])[2:]) == [1, 0]


def test_plot_nearest_shows_sample_and_training_image(tmp_path: Path):
    training = rendered(descriptions(18, 3, several), 18)
    for k, image in enumerate(training):
        image.save(tmp_path / f"{k}.png")
    entries = [Entry(f"{k}.png", f"caption {k}", "train", f"{k}.png") for k in range(3)]
    samples = [training[2], ImageOps.mirror(training[1]), training[0]]
    pairs = Nearest(np.array([0, 1, 0]), np.array([0.9, 0.1, 0.0]), np.array([False, True, False]))
    plot_nearest(samples, ["a", "b", "c"], pairs, np.full(3, 0.5), tmp_path, entries, tmp_path / "nearest.png")
    sheet = np.asarray(Image.open(tmp_path / "nearest.png").convert("RGB")).astype(int)
    rows, columns = (sheet.shape[0] - 8) // 2, (sheet.shape[1] - 8) // 2
    tiles = [sheet[y + 20 : y + 120, x : x + columns] for y in (8, 8 + rows) for x in (8, 8 + columns)]
    apart = [np.abs(tile[:, 20:120] - tile[:, 132 + 20 : 132 + 120]).mean() for tile in tiles[:3]]  # left and right of a pair
    assert apart[0] < 1 and apart[1] < 1 and apart[2] > 10
