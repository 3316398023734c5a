"""Memorisation: copies of training images are told from fresh drawings, also where the drawings themselves repeat."""

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
from dit.evaluation.memorization import SAME, Nearest, find_nearest, memorization, near
from dit.utils.images import labelled_grid, to_images, to_tensor
from helpers.scenes import descriptions, features, rendered, several

TRAINING, OTHERS = 600, 400


def nearest(pictures: list[Image.Image], training: torch.Tensor) -> np.ndarray:
    return find_nearest(features(pictures), features(pictures, mirrored=True), training).distance


@torch.no_grad()
def through_the_vae(pictures: list[Image.Image]) -> list[Image.Image]:
    vae, _ = load_vae(EncoderSource("builtin"))
    latents = vae.encode(to_tensor(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))).latent_dist
    return to_images(vae.decode(latents.sample(torch.Generator().manual_seed(0))).sample)


@functools.cache
def crowded() -> tuple[list[Image.Image], torch.Tensor, np.ndarray]:
    """Drawings of two and three things: some 250,000 are possible, so that a fresh one is new among 600; and what is held out."""
    training = rendered(descriptions(11, TRAINING, several), 11)
    known = features(training)
    return training, known, nearest(rendered(descriptions(12, OTHERS, several), 12), known)


@functools.cache
def fresh() -> np.ndarray:
    return nearest(rendered(descriptions(13, OTHERS, several), 13), crowded()[1])


@pytest.mark.parametrize("how", [list, through_the_vae, lambda copies: [ImageOps.mirror(copy) for copy in copies]])
def test_planted_copies_are_flagged_and_fresh_drawings_are_not(how):
    training, known, held_out = crowded()
    assert (nearest(how(training[:100]), known) < near(held_out)).mean() >= 0.95
    assert (fresh() < near(held_out)).mean() <= 0.02


def test_the_share_that_was_planted_comes_out():
    training, known, held_out = crowded()
    samples = np.concatenate([nearest(through_the_vae(training[:100]), known), fresh()[100:]])
    metrics = memorization(samples, held_out, 0.95)
    assert metrics["memorised"] == pytest.approx(100 / OTHERS, abs=0.02)
    assert metrics["memorised_low"] < 100 / OTHERS < metrics["memorised_high"]
    assert metrics["held_out_repeats"] <= 0.02


@functools.cache
def usual() -> tuple[list[Image.Image], torch.Tensor, np.ndarray, list]:
    """The mixture of the default recipe, in which many drawings of one thing are there twice."""
    training = rendered(descriptions(14, 1000), 14)
    known, described = features(training), descriptions(15, OTHERS)
    return training, known, nearest(rendered(described, 15), known), described


def test_where_the_data_repeat_themselves_fresh_drawings_do_not_count_as_memorised():
    training, known, held_out, described = usual()
    fresh = memorization(nearest(rendered(described, 16), known), held_out, 0.95)
    assert fresh["held_out_repeats"] > 0.1 and fresh["nearer_than_held_out"] > 0.1  # flagged, but no more often than real ones
    assert fresh["memorised"] <= 0.02 and fresh["memorised_low"] == 0
    copies = memorization(nearest(through_the_vae(training[:150]), known), held_out, 0.95)
    assert copies["memorised"] >= 0.95 and copies["memorised_low"] > 0.9


def test_the_nearest_is_that_of_a_search_one_by_one():
    training, known, _ = crowded()
    pictures = rendered(descriptions(17, 20, several), 17)
    as_is, turned = features(pictures), features(pictures, mirrored=True)
    found = find_nearest(as_is, turned, known)
    for k in range(20):
        distances = [[float((row.double() - other.double()).norm()) for other in known] for row in (as_is[k], turned[k])]
        assert found.distance[k] == pytest.approx(np.min(distances), abs=1e-9)
        assert (int(found.mirrored[k]), found.index[k]) == np.unravel_index(np.argmin(distances), (2, len(known)))


def test_what_would_happen_anyway_is_taken_out_as_abbott_did():
    held_out = np.concatenate([np.zeros(40), np.linspace(0.5, 1.5, 60)])  # 40 of 100 are in the training set again
    samples = np.concatenate([np.zeros(70), np.full(30, 1.2)])
    metrics = memorization(samples, held_out, 0.95)
    assert near(held_out) == pytest.approx(0.51, abs=0.01)
    assert metrics["held_out_repeats"] == 0.41 and metrics["nearer_than_held_out"] == 0.7
    assert metrics["memorised"] == pytest.approx((0.7 - 0.41) / (1 - 0.41), abs=1e-4)
    assert memorization(held_out, held_out, 0.95)["memorised"] == 0


@pytest.mark.parametrize("count", [3, 8, 250])
def test_few_images_are_not_taken_for_repeated_ones(count):
    """One of them is always below their own 1st percentile, and the same as no training image for all that."""
    metrics = memorization(np.full(count, 1.3), np.linspace(0.5, 1.2, count), 0.95)
    assert metrics["near_distance"] == pytest.approx(near(np.linspace(0.5, 1.2, count)), abs=1e-4)
    assert metrics["samples_same"] == 0
    assert metrics["held_out_repeats"] >= 0.01 and metrics["held_out_same"] == metrics["held_out_same_low"] == 0
    assert metrics["memorised_prompts"] == count
    repeated = memorization(np.full(count, 1.3), np.linspace(0, 1.2, count), 0.95)  # the first of which is a training image
    assert 0 < repeated["held_out_same_low"] < repeated["held_out_same"] < repeated["held_out_same_high"]


def test_the_interval_of_pairs_that_agree_is_narrower_than_of_those_that_do_not():
    held_out = np.concatenate([np.zeros(40), np.linspace(0.5, 1.5, 60)])
    samples = np.concatenate([np.zeros(50), np.full(50, 1.2)])
    agreeing, reversed_ = memorization(samples, held_out, 0.95), memorization(samples[::-1], held_out, 0.95)
    width = agreeing["memorised_high"] - agreeing["memorised_low"]
    assert agreeing["memorised"] == reversed_["memorised"]
    assert width < 0.6 * (reversed_["memorised_high"] - reversed_["memorised_low"])


@pytest.mark.parametrize("held_out", [[], [0.0, 0.05, SAME / 2]])
def test_where_there_is_nothing_to_measure_by_nothing_is_reported(held_out):
    assert memorization(np.array([0.0, 0.9]), np.array(held_out), 0.95) == {}
    assert memorization(np.array([]), np.array([0.5, 0.6]), 0.95) == {}


@pytest.fixture
def shown(tmp_path: Path, monkeypatch):
    """Draws the pairs of samples of these distances, and returns their labels, in which "caption k" is that of sample k."""
    training = rendered(descriptions(18, 3, several), 18)
    for k, picture in enumerate(training):
        picture.save(tmp_path / f"{k}.png")
    entries = [Entry(f"{k}.png", "trained", "train", f"{k}.png") for k in range(3)]
    labels: list[str] = []

    def note(pictures, texts, columns, cell):
        labels.extend(texts)
        return labelled_grid(pictures, texts, columns, cell)

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


def test_the_pairs_that_the_figure_is_about_come_first(shown):
    """Samples 0 to 5 are near to a training image, as is what is held out; of the others, 6 and 7 are."""
    held_out = [0.0] * 6 + [0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    labels = shown([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.3, 0.1, 1.0, 0.95, 1.1, 1.2], held_out)
    assert named(labels) == [7, 6, 0, 1, 2, 3, 4, 5, 9, 8]
    assert labels[0] == "Distance 0.100. Drawn: caption 7. Training: trained"
    assert labels[2] == "Distance 0.010, does not count. Drawn: caption 0. Training: trained"
    assert labels[8].startswith("Distance 0.950, does not count. ")


def test_of_many_that_count_the_nearest_and_those_that_only_just_do_are_shown(shown):
    labels = shown([0.01 * k for k in range(1, 21)], [0.9] * 20)
    assert named(labels) == [0, 1, 2, 3, 4, 15, 16, 17, 18, 19] and not any("count" in label for label in labels)


def test_where_every_held_out_image_is_a_repeat_the_nearest_pairs_are_shown(shown):
    labels = shown([0.3, 0.01], [0.0, 0.02])
    assert named(labels) == [1, 0]
    assert labels[0].startswith("Distance 0.010, does not count") and labels[1].startswith("Distance 0.300, does not count")
    assert named(shown([0.4, 0.2], [])[2:]) == [1, 0]


def test_the_picture_shows_the_nearest_pairs_first(tmp_path: Path):
    training = rendered(descriptions(18, 3, several), 18)
    for k, picture in enumerate(training):
        picture.save(tmp_path / f"{k}.png")
    entries = [Entry(f"{k}.png", f"caption {k}", "train", f"{k}.png") for k in range(3)]
    samples = [training[2], ImageOps.mirror(training[1]), training[0]]
    pairs = Nearest(np.array([0, 1, 0]), np.array([0.9, 0.1, 0.0]), np.array([False, True, False]))
    plot_nearest(samples, ["a", "b", "c"], pairs, np.full(3, 0.5), tmp_path, entries, tmp_path / "nearest.png")
    sheet = np.asarray(Image.open(tmp_path / "nearest.png").convert("RGB")).astype(int)
    rows, columns = (sheet.shape[0] - 8) // 2, (sheet.shape[1] - 8) // 2
    tiles = [sheet[y + 20 : y + 120, x : x + columns] for y in (8, 8 + rows) for x in (8, 8 + columns)]
    apart = [np.abs(tile[:, 20:120] - tile[:, 132 + 20 : 132 + 120]).mean() for tile in tiles[:3]]  # left and right of a pair
    assert apart[0] < 1 and apart[1] < 1 and apart[2] > 10
