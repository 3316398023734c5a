"""Compare two sets of images by their features: Fréchet distance, KID, precision, recall, and the diversity within a set.

All functions take features (N, P): of CLIP with length 1, as `ClipFeatures` returns them, or of another image model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dit.config import Evaluate
from dit.evaluation.intervals import half_samples, mean_with_interval, wilson, with_interval

NEIGHBOURS = 3  # k of precision and recall, as in the paper
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compare_sets(real: torch.Tensor, fake: torch.Tensor, settings: Evaluate, features: str = "clip") -> dict[str, float]:
    """Return Fréchet distance, KID, precision and recall of the first n of each set, n being the size of the smaller one.

    Each with the ends of its interval, as `frechet_distance_clip_n500` and so on. An interval takes halves of both sets, the
    same rows of each, since the k-th sample is generated from the caption of the k-th image. Metrics that a half is too small
    for are left out: n must be at least 4, for precision and recall 8.

    Args:
        real, fake: features (N, P) and (M, P); those of "clip" have length 1.
        settings: number of halves, and confidence.
        features: what they are of, for the metrics' names.
    """
    count = min(len(real), len(fake))
    real, fake = real[:count], fake[:count]
    suffix, is_clip = f"{features}_n{count}", features == "clip"
    metrics: dict[str, float] = {}
    if count // 2 < 2:
        return metrics
    for name, distance, bounds in (
        ("frechet_distance", frechet_distance, (0.0, 4.0 if is_clip else float("inf"))),
        ("kid", kernel_distance if is_clip else scaled_kernel_distance, (-float("inf"), float("inf"))),
    ):
        value = distance(real, fake)
        of_rows = partial(_of_rows, distance, real, fake)
        ends = half_samples(value, of_rows, count, settings, bounds, f"interval of {name}")
        metrics |= with_interval(f"{name}_{suffix}", value, ends, digits=5)
    if count // 2 > NEIGHBOURS:
        matrices = distance_matrices(real, fake)
        for which, (name, share) in enumerate(zip(("precision", "recall"), precision_recall(matrices), strict=True)):
            low, high = half_samples(share, partial(_share_of_rows, matrices, which), count, settings, (0.0, 1.0))
            trials = wilson(share, count, settings.confidence)  # where the share is 1 in every half, these have no width
            metrics |= with_interval(f"{name}_{suffix}", share, (min(low, trials[0]), max(high, trials[1])))
    return metrics


def _of_rows(distance: Callable, real: torch.Tensor, fake: torch.Tensor, rows: np.ndarray) -> float:
    return distance(real[rows], fake[rows])


def _share_of_rows(matrices: Matrices, which: int, rows: np.ndarray) -> float:
    within_real, within_fake, between = (matrix[rows][:, rows] for matrix in matrices)
    return precision_recall((within_real, within_fake, between))[which]


def measure_diversity(features: torch.Tensor, texts: list[str], settings: Evaluate) -> dict[str, float]:
    """Return `diversity_clip`: 1 - cosine, averaged over the pairs of images of a prompt, then over prompts.

    Its interval takes halves of the prompts. Empty where no prompt has several images.

    Args:
        features: (N, P) of length 1.
        texts: the prompts of the N images; those that occur only once do not count.
        settings: number of halves, and confidence.
    """
    distances = []
    for text in dict.fromkeys(texts):
        rows = [k for k, other in enumerate(texts) if other == text]
        if len(rows) > 1:
            distances.append(mean_distance(features[rows]))
    return mean_with_interval("diversity_clip", np.array(distances), settings, (0.0, 2.0))


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians with the two sets' means and covariances, by torchmetrics.

    Heusel et al. 2017 (arXiv:1706.08500, equation 6), there with features of Inception. For unit vectors it is in [0, 4].
    It falls with the number of images, so only sets of the same size can be compared.

    Args:
        real, fake: (N, P) and (M, P), at least two rows each.
    """
    metric = FrechetInceptionDistance(IdentityNetwork(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return the squared maximum mean discrepancy with the kernel (x . y + 1)^3, by torchmetrics; unbiased, so it may be below 0.

    Bińkowski et al. 2018 (arXiv:1801.01401, section 3), who divide x . y by the number of features, since the length of
    theirs grows with it. Ours have length 1; divided once more, the kernel would be almost linear.

    Args:
        real, fake: (N, P) each, at least two rows, the same number, since torchmetrics counts the pairs of one set for both.
    """
    if len(real) != len(fake):
        raise ValueError(f"two sets of the same size are needed, not {len(real)} and {len(fake)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(0)  # torchmetrics shuffles the rows, which changes the last bits of the sums
        metric = KernelInceptionDistance(IdentityNetwork(real.shape[1]), subsets=1, subset_size=len(real), gamma=1.0)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return float(metric.compute()[0])


def scaled_kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return `kernel_distance` with the kernel (x . y / P + 1)^3 of the paper, for features of any length."""
    scale = real.shape[1] ** -0.5
    return kernel_distance(real * scale, fake * scale)


class IdentityNetwork(nn.Module):
    """The feature network that torchmetrics asks for, where it gets features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features as they are."""
        return features


def distance_matrices(real: torch.Tensor, fake: torch.Tensor) -> Matrices:
    """Return all distances (N, N) within `real`, (M, M) within `fake`, and (N, M) from `real` to `fake`; float64.

    From differences: the faster way by products leaves 1e-8 where two images are equal, and a ball may have radius 0.
    """
    real, fake = real.double(), fake.double()
    pairs = ((real, real), (fake, fake), (real, fake))
    within_real, within_fake, between = (torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") for a, b in pairs)
    return within_real, within_fake, between


def precision_recall(matrices: Matrices, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the share of `fake` in the region of `real`, and of `real` in the region of `fake`, each in [0, 1].

    The region of a set is the union of balls, one around each of its points, that just reach the point's k-th nearest
    neighbour in the set (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2).

    Args:
        matrices: what `distance_matrices` returns for more than `k` rows of each.
        k: the neighbour that a ball reaches.
    """
    real, fake, between = matrices
    reach_real, reach_fake = (own.kthvalue(k + 1, dim=1).values for own in (real, fake))  # + 1: each is its own nearest
    precision = (between <= reach_real[:, None]).any(dim=0)
    recall = (between <= reach_fake).any(dim=1)
    return float(precision.double().mean()), float(recall.double().mean())


def mean_distance(features: torch.Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs of two different rows, in [0, 2]; at least two rows."""
    count = len(features)
    cosines = features.double() @ features.double().T
    return float(1 - (cosines.sum() - cosines.trace()) / (count * (count - 1)))
