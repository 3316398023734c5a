"""Distances between sets of images agree with independent references, and react as they should to spoiled rendered scenes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dit.config import load_config
from dit.evaluation.clip import clip_scores
from dit.evaluation.distribution import (
    compare_sets,
    distance_matrices,
    frechet_distance,
    kernel_distance,
    mean_distance,
    measure_diversity,
    precision_recall,
    scaled_kernel_distance,
)
from helpers import REPO
from helpers.scenes import captions, clip, descriptions, features, rendered

SETTINGS = replace(load_config(REPO / "params.yaml").evaluate, resamples=20)
COUNT = 500


def points_with(mean, covariance, count: int = 400) -> torch.Tensor:
    """Random points, whitened and stretched so that their mean and covariance are exactly these."""
    points = np.random.default_rng(len(mean) + count).normal(size=(count, len(mean)))
    points -= points.mean(0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(np.array(covariance, float)).T + mean)


def units(count: int, size: int, seed: int) -> torch.Tensor:
    points = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=1)


def test_frechet_distance_closed_form():
    """In the plane the trace of the root of a product P is sqrt(trace P + 2 sqrt(det P))."""
    first, second = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = (3.0**2 + 1.0**2) + np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(points_with([0, 0], first), points_with([3, -1], second, 300)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_independent_features():
    a, b = np.array([1.0, 4.0, 9.0, 0.25]), np.array([4.0, 1.0, 9.0, 1.0])
    expected = 4 * 0.5**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(points_with([0] * 4, np.diag(a)), points_with([0.5] * 4, np.diag(b))) == pytest.approx(
        expected, rel=1e-9
    )


def test_kernel_distance_is_a_double_sum():
    real, fake = units(12, 5, 1), units(12, 5, 2)

    def kernel(x, y) -> float:
        return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (real, fake) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    between = sum(kernel(x, y) for x in real for y in fake) / (12 * 12)
    assert kernel_distance(real, fake) == pytest.approx(within - 2 * between, abs=1e-7)


def test_kernel_distance_leaves_the_random_state():
    real, fake = units(50, 8, 1), units(50, 8, 2)
    found = set()
    for seed in range(3):
        torch.manual_seed(seed)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(seed))
        found.add(kernel_distance(real, fake))
        assert torch.rand(1) == expected
    assert len(found) == 1


def test_kernel_distance_needs_sets_of_the_same_size():
    with pytest.raises(ValueError, match="50 and 49"):
        kernel_distance(units(50, 8, 1), units(49, 8, 2))


def brute_force(points: torch.Tensor, others: torch.Tensor, k: int) -> float:
    inside = 0
    for point in points.tolist():
        for center in others.tolist():
            reach = sorted(np.linalg.norm(np.subtract(center, other)) for other in others.tolist())[k]
            if np.linalg.norm(np.subtract(point, center)) <= reach:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_brute_force(k):
    source = torch.Generator().manual_seed(0)
    real, fake = torch.randn(30, 2, generator=source), torch.randn(40, 2, generator=source) + 1.5
    fake[:5] = fake[0]  # balls of radius 0
    precision, recall = precision_recall(distance_matrices(real, fake), k)
    assert precision == pytest.approx(brute_force(fake.double(), real.double(), k))
    assert recall == pytest.approx(brute_force(real.double(), fake.double(), k))
    assert 0 < precision < 1 and 0 < recall < 1


def test_mean_distance_is_over_all_pairs():
    points = units(6, 4, 3)
    pairs = [1 - float(points[i] @ points[j]) for i in range(6) for j in range(i)]
    assert mean_distance(points) == pytest.approx(np.mean(pairs), abs=1e-6)


@functools.cache
def references() -> tuple[torch.Tensor, ...]:
    """Three sets of held-out images."""
    return tuple(features(rendered(descriptions(seed, COUNT), seed)) for seed in (1, 101, 102))


def held_out() -> torch.Tensor:
    return references()[0]


@functools.cache
def fresh() -> tuple[list[Image.Image], list[str], torch.Tensor]:
    described = descriptions(2, COUNT)
    images = rendered(described, 2)
    return images, captions(described), features(images)


@functools.cache
def spoiled(spoil: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
    return features([spoil(image) for image in fresh()[0]])


def blurred(image: Image.Image) -> Image.Image:
    return Image.fromarray(ndimage.gaussian_filter(np.asarray(image), (3, 3, 0)))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 40, (*image.size, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def test_clip_scores_agree_with_transformers():
    images, texts, found = fresh()
    inputs = clip().processor(text=texts[:20], images=images[:20], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        logits = clip().clip(**inputs).logits_per_image.diag() / clip().clip.logit_scale.exp()
    scores = clip_scores(found[:20], clip().embed_texts(texts[:20]))
    assert scores.tolist() == pytest.approx((100 * logits.clamp(min=0)).tolist(), abs=1e-3)


def test_clip_scores_fall_with_spoiled_pairs():
    _, texts, found = fresh()
    features_of_texts = clip().embed_texts(texts)
    score = float(clip_scores(found, features_of_texts).mean())
    assert float(clip_scores(found, features_of_texts.roll(1, 0)).mean()) < 0.5 * score
    for spoil in (blurred, noisy):
        assert float(clip_scores(spoiled(spoil), features_of_texts).mean()) < 0.9 * score


@pytest.mark.parametrize("spoil", [blurred, noisy])
@pytest.mark.parametrize("reference", range(3))
def test_compare_sets_blur_and_noise(spoil, reference):
    real = references()[reference]
    good, bad = compare_sets(real, fresh()[2], SETTINGS), compare_sets(real, spoiled(spoil), SETTINGS)
    n = f"_clip_n{COUNT}"
    assert bad[f"frechet_distance{n}"] > 3 * good[f"frechet_distance{n}"]
    assert bad[f"kid{n}_low"] > 0.05 and abs(good[f"kid{n}"]) < 0.02
    assert bad[f"recall{n}"] < 0.6 < 0.85 < good[f"recall{n}"]


@pytest.mark.parametrize("spoil", [blurred, noisy])
def test_precision_falls_with_blur_and_noise(spoil):
    """By 0.02 to 0.10 in twelve such means, over nine references and for four sets of rendered scenes."""

    def precision(samples: torch.Tensor) -> float:
        return np.mean([precision_recall(distance_matrices(real, samples))[0] for real in references()])

    assert precision(spoiled(spoil)) < precision(fresh()[2]) - 0.01


def test_compare_sets_missing_modes():
    described = descriptions(3, COUNT, lambda d: all(each.shape in ("circle", "square") for each in d.objects))
    few = compare_sets(held_out(), features(rendered(described, 3)), SETTINGS)
    good = compare_sets(held_out(), fresh()[2], SETTINGS)
    n = f"_clip_n{COUNT}"
    assert few[f"recall{n}"] < 0.6 < 0.8 < good[f"recall{n}"]
    assert few[f"precision{n}"] > 0.8
    assert few[f"frechet_distance{n}"] > 2 * good[f"frechet_distance{n}"]


def test_compare_sets_of_different_size():
    metrics = compare_sets(held_out()[:40], fresh()[2][:90], SETTINGS)
    assert metrics == compare_sets(held_out()[:40], fresh()[2][:40], SETTINGS)
    names = [f"{name}_clip_n40" for name in ("frechet_distance", "kid", "precision", "recall")]
    assert list(metrics) == [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    for name in names:
        assert metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] or metrics[name] in (0, 1)


@pytest.mark.parametrize(("count", "left"), [(0, ""), (3, ""), (4, "fk"), (7, "fk"), (8, "fkpr")])
def test_compare_sets_tiny(count, left):
    metrics = compare_sets(held_out()[:count], fresh()[2][:50], SETTINGS)
    assert {name[0] for name in metrics} == set(left) and np.isfinite(list(metrics.values())).all()


def test_measure_diversity():
    _, texts, found = fresh()
    of = {text: found[k] for k, text in enumerate(texts[:5])}
    same = torch.stack([row for row in of.values() for _ in range(4)])
    repeated = [text for text in of for _ in range(4)]
    assert measure_diversity(same, repeated, SETTINGS)["diversity_clip"] == pytest.approx(0, abs=1e-4)
    described = [description for description in descriptions(4, 10) for _ in range(4)]
    several = features(rendered(described, 4))
    metrics = measure_diversity(several, [f"prompt {k // 4}" for k in range(40)], SETTINGS)
    assert 0.02 < metrics["diversity_clip_low"] < metrics["diversity_clip"] < mean_distance(several)
    assert measure_diversity(found, [f"prompt {k}" for k in range(COUNT)], SETTINGS) == {}


def test_scaled_kernel_distance_is_that_of_the_paper():
    source = torch.Generator().manual_seed(0)
    real, fake = (torch.randn(40, 12, generator=source) + shift for shift in (0.0, 0.5))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.double() @ b.double().T / 12 + 1) ** 3

    within = sum((kernel(a, a).sum() - kernel(a, a).trace()) / (40 * 39) for a in (real, fake))
    expected = float(within - 2 * kernel(real, fake).mean())
    assert scaled_kernel_distance(real, fake) == pytest.approx(expected, rel=1e-6)
