"""How far chance could have moved a figure: the ends of its interval at a given confidence."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from tqdm import tqdm

SEED = 30_000  # of the resamples; its own, so that nothing else that is drawn moves them


def wilson(share: float, count: float, confidence: float) -> tuple[float, float]:
    """The score interval of Wilson (1927) of a `share` in [0, 1] of `count` independent trials.

    Shares have this one and no bootstrap: each resample of 500 successes is 500 successes, an interval without width.
    """
    z2 = _quantile(confidence) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _quantile(confidence) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5 / (1 + z2 / count)
    low, high = middle - half, middle + half
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)  # exactly, where rounding would leave 1e-17


def difference(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, float]:
    """The interval of the difference of two shares, each given with its own: Newcombe (1998), method 10.

    Args:
        first, second: share, low, high.
    """
    (p, low_p, high_p), (q, low_q, high_q) = first, second
    return p - q - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5, p - q + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5


def bootstrap(
    value: float,
    statistic: Callable[[np.ndarray], float],
    count: int,
    resamples: int,
    confidence: float,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    label: str = "interval",
) -> tuple[float, float]:
    """`value` plus and minus the normal quantile times the standard deviation of `statistic` over resamples.

    Not percentiles of the resamples (Efron and Tibshirani 1993, chapter 13): a resample has each image as often as chance
    will, and sets with doubles in them lie further apart, so that those of a distance do not even surround its value. How
    much they scatter, they still tell.

    Args:
        value: of all images.
        statistic: called with `count` row numbers, drawn with replacement.
        count: how many rows there are.
        resamples: how often; the same rows each time.
        confidence: in (0, 1).
        bounds: the least and the largest value that there can be.
        label: of the progress bar, which is seen if this takes long.
    """
    rng = np.random.default_rng(SEED)
    progress = tqdm(range(resamples), desc=label, unit="resample", delay=1)
    values = [statistic(rng.integers(count, size=count)) for _ in progress]
    half = _quantile(confidence) * float(np.std(values, ddof=1))
    return max(value - half, bounds[0]), min(value + half, bounds[1])


def with_interval(name: str, value: float, interval: tuple[float, float], digits: int = 4) -> dict[str, float]:
    """`value` as the metric `name`, and the ends of its interval as `name`_low and `name`_high, rounded."""
    values = {name: value, f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return {key: round(float(value), digits) for key, value in values.items()}


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
