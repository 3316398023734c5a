"""Two sets of pictures compared as clouds of feature vectors: how far apart, how much of each lies in the other.

All functions take features (N, P) of length 1, as `ClipFeatures` makes them.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

NEIGHBOURS = 3  # k of precision and recall, as in the paper

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Given(nn.Module):
    """The feature network for torchmetrics where the features are there already: hands on what it gets."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the two sets' means and covariances, by torchmetrics.

    Heusel et al. 2017 (arXiv:1706.08500, equation 6), which takes the features of Inception. Of unit vectors it is in [0, 4].
    It falls with the number of images, so only sets of one size compare.

    Args:
        real, fake: (N, P) and (M, P), at least two rows each.
    """
    metric = FrechetInceptionDistance(Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y + 1)^3, by torchmetrics; unbiased, so 0 may come out as less.

    Bińkowski et al. 2018 (arXiv:1801.01401, section 3), who divide x . y by the number of features, since theirs have a length
    that grows with it. Ours have length 1, and divided once more the kernel would be all but linear.

    Args:
        real, fake: (N, P) each, at least two rows, the same number, since torchmetrics counts the pairs of one set for both.
    """
    if len(real) != len(fake):
        raise ValueError(f"sets of one size are needed, not {len(real)} and {len(fake)}")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        torch.manual_seed(0)  # torchmetrics shuffles the rows, which changes the last bits of the sums
        metric = KernelInceptionDistance(Given(real.shape[1]), subsets=1, subset_size=len(real), gamma=1.0)
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return float(metric.compute()[0])


def distance_matrices(real: torch.Tensor, fake: torch.Tensor) -> Matrices:
    """All distances (N, N) within `real`, (M, M) within `fake`, and (N, M) from `real` to `fake`; float64.

    By differences: the short way by products leaves 1e-8 where two pictures are the same, and a ball may have radius 0.
    """
    real, fake = real.double(), fake.double()
    pairs = ((real, real), (fake, fake), (real, fake))
    return tuple(torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist") for pair in pairs)


def precision_recall(matrices: Matrices, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares of `fake` in the region of `real`, and of `real` in the region of `fake`, each in [0, 1].

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
    """The mean of 1 - cosine over all pairs of two different rows, in [0, 2]; at least two rows."""
    count = len(features)
    cosines = features.double() @ features.double().T
    return float(1 - (cosines.sum() - cosines.trace()) / (count * (count - 1)))
