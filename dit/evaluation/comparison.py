"""Metrics of how the samples are spread: beside the held-out images, and for one prompt. Names say features and number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dit.config import Evaluate
from dit.evaluation.distribution import (
    NEIGHBOURS,
    Matrices,
    distance_matrices,
    frechet_distance,
    kernel_distance,
    mean_distance,
    precision_recall,
)
from dit.evaluation.intervals import half_samples, mean_with_interval, wilson, with_interval


def compare_sets(real: torch.Tensor, fake: torch.Tensor, settings: Evaluate) -> dict[str, float]:
    """Fréchet distance, KID, precision and recall of the first n of each set, n being the size of the smaller one.

    Each with the ends of its interval, as `frechet_distance_clip_n500` and so on. An interval takes halves of both sets, the
    same rows of each, since the k-th sample is drawn for the caption of the k-th image. What a half is too small for is left
    out: n must be at least 4, for precision and recall 8.

    Args:
        real, fake: features (N, P) and (M, P) of length 1.
        settings: halves and confidence.
    """
    count = min(len(real), len(fake))
    real, fake = real[:count], fake[:count]
    metrics: dict[str, float] = {}
    if count // 2 < 2:
        return metrics
    for name, distance, bounds in (
        ("frechet_distance", frechet_distance, (0.0, 4.0)),
        ("kid", kernel_distance, (-float("inf"), float("inf"))),
    ):
        value = distance(real, fake)
        of_rows = partial(_of_rows, distance, real, fake)
        ends = half_samples(value, of_rows, count, settings, bounds, f"interval of {name}")
        metrics |= with_interval(f"{name}_clip_n{count}", value, ends, digits=5)
    if count // 2 > NEIGHBOURS:
        matrices = distance_matrices(real, fake)
        for which, (name, share) in enumerate(zip(("precision", "recall"), precision_recall(matrices), strict=True)):
            low, high = half_samples(share, partial(_share_of_rows, matrices, which), count, settings, (0.0, 1.0))
            trials = wilson(share, count, settings.confidence)  # for where every half says 1
            metrics |= with_interval(f"{name}_clip_n{count}", share, (min(low, trials[0]), max(high, trials[1])))
    return metrics


def _of_rows(distance: Callable, real: torch.Tensor, fake: torch.Tensor, rows: np.ndarray) -> float:
    return distance(real[rows], fake[rows])


def _share_of_rows(matrices: Matrices, which: int, rows: np.ndarray) -> float:
    return precision_recall(tuple(matrix[rows][:, rows] for matrix in matrices))[which]


def measure_diversity(features: torch.Tensor, texts: list[str], settings: Evaluate) -> dict[str, float]:
    """`diversity_clip`: how different the pictures of one prompt are, as the mean of 1 - cosine, of which the mean over prompts.

    Its interval takes halves of the prompts. Empty where no prompt has several pictures.

    Args:
        features: (N, P) of length 1.
        texts: N prompts, of which those that count are there several times.
        settings: halves and confidence.
    """
    distances = []
    for text in dict.fromkeys(texts):
        rows = [k for k, other in enumerate(texts) if other == text]
        if len(rows) > 1:
            distances.append(mean_distance(features[rows]))
    return mean_with_interval("diversity_clip", np.array(distances), settings, (0.0, 2.0))
