"""Metrics of how the samples are spread: beside the held-out images, and for one prompt. Names say features and number."""

from __future__ import annotations

import torch

from dit.config import Evaluate
from dit.evaluation.distribution import NEIGHBOURS, frechet_distance, kernel_distance, mean_distance, precision_recall
from dit.evaluation.intervals import bootstrap, wilson, with_interval


def compare_sets(real: torch.Tensor, fake: torch.Tensor, settings: Evaluate) -> dict[str, float]:
    """Fréchet distance, KID, precision and recall of the first n of each set, n being the size of the smaller one.

    Each with the ends of its interval, as `frechet_distance_clip_n500` and so on. Where n is 1, there is none of them; up to
    `NEIGHBOURS`, no precision and recall.

    The intervals of the two distances resample sample and image together, as the stage draws the k-th sample for the caption
    of the k-th image. Those of precision and recall are Wilson's, for the other set as it is.

    Args:
        real, fake: features (N, P) and (M, P) of length 1.
        settings: resamples and confidence.
    """
    count = min(len(real), len(fake))
    real, fake = real[:count], fake[:count]
    metrics: dict[str, float] = {}
    if count < 2:
        return metrics
    for name, distance, bounds in (
        ("frechet_distance", frechet_distance, (0.0, 4.0)),
        ("kid", kernel_distance, (-float("inf"), float("inf"))),
    ):
        value = distance(real, fake)
        ends = bootstrap(
            value,
            lambda rows, distance=distance: distance(real[rows], fake[rows]),
            count,
            settings.resamples,
            settings.confidence,
            bounds,
            label=f"interval of {name}",
        )
        metrics |= with_interval(f"{name}_clip_n{count}", value, ends, digits=5)
    if count > NEIGHBOURS:
        for name, share in zip(("precision", "recall"), precision_recall(real, fake), strict=True):
            metrics |= with_interval(f"{name}_clip_n{count}", share, wilson(share, count, settings.confidence))
    return metrics


def measure_diversity(features: torch.Tensor, texts: list[str], settings: Evaluate) -> dict[str, float]:
    """`diversity_clip`: how different the pictures of one prompt are, as the mean of 1 - cosine, of which the mean over prompts.

    Its interval resamples prompts. Empty where fewer than two prompts have several pictures.

    Args:
        features: (N, P) of length 1.
        texts: N prompts, of which those that count are there several times.
        settings: resamples and confidence.
    """
    distances = []
    for text in dict.fromkeys(texts):
        rows = [k for k, other in enumerate(texts) if other == text]
        if len(rows) > 1:
            distances.append(mean_distance(features[rows]))
    if len(distances) < 2:
        return {}
    values = torch.tensor(distances, dtype=torch.float64)
    mean = float(values.mean())
    ends = bootstrap(
        mean, lambda rows: float(values[rows].mean()), len(values), settings.resamples, settings.confidence, (0.0, 2.0)
    )
    return with_interval("diversity_clip", mean, ends)
