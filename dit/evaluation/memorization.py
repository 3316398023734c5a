"""Does a model draw, or does it hand out what it was trained on? The nearest training image of each image says.

"Near" means nothing by itself, so it is measured by real images that training has not seen: how near do these come to
a training image? Where a data set repeats itself, as ours does (there are about 2,000 drawings of one thing, and most of
them are in the training set), new images are the same as old ones, too, and a model that has learned nothing by heart
hits upon them as often. What counts is how much more often a model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dit.evaluation.intervals import paired_difference, wilson, with_interval

# Distances between unit vectors, in [0, 2]. What is nearer than this is the same image, drawn or stored again: through the VAE
# bundled a drawing moves by 0.01 to 0.06, mirrored in the raster by up to 0.03, and two that show different things are
# 0.39 apart or more. Such held-out images say how often the data repeat themselves, not how near other images come.
SAME = 0.1
PERCENTILE = 1
CHUNK = 1024


@dataclass(frozen=True)
class Nearest:
    """Of each of N images its nearest training image: `index` (N,) int64, `distance` (N,) float64, `mirrored` (N,) bool.

    `mirrored` is where the image's mirror image is nearer than the image itself.
    """

    index: np.ndarray
    distance: np.ndarray
    mirrored: np.ndarray


def find_nearest(pictures: torch.Tensor, mirror_images: torch.Tensor, training: torch.Tensor) -> Nearest:
    """Look for each image, and for its mirror image, among the training images.

    Mirrored, since training mirrors half of its images; turning the images around instead costs less, and is the same.

    Args:
        images, mirror_images: features (N, P) of length 1.
        training: features (T, P), T at least 1.
    """
    as_is, turned = _search(pictures, training), _search(mirror_images, training)
    mirrored = turned[1] < as_is[1]
    index, distance = (torch.where(mirrored, other, one).numpy() for one, other in zip(as_is, turned, strict=True))
    return Nearest(index, distance, mirrored.numpy())


def _search(pictures: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and Euclidean distance of each row's nearest; by the largest cosine, and then once more without its rounding."""
    best = [(rows @ training.T).argmax(dim=1) for rows in pictures.split(CHUNK)]
    index = torch.cat(best) if best else torch.empty(0, dtype=torch.int64)
    return index, (pictures.double() - training[index].double()).norm(dim=1)


def near(held_out: np.ndarray) -> float | None:
    """Return the distance below which an image is too near to a training image: the 1st percentile of the held-out images' own.

    Those that are the `SAME` as a training image do not count; None where there are no others. Never less than `SAME`.
    """
    others = held_out[held_out >= SAME]
    return float(np.percentile(others, PERCENTILE)) if len(others) else None


def memorization(samples: np.ndarray, held_out: np.ndarray, confidence: float) -> dict[str, float]:
    """Metrics in [0, 1], each with the ends of its interval; none where there is nothing to measure by.

    - `nearer_than_held_out`: share a of the samples that are too near to a training image (see `near`).
    - `held_out_repeats`: the same share b of the held-out images: 1 % where there are hundreds and all are different, by
      construction; of a few it is more, since the nearest one always counts.
    - `samples_same`, `held_out_same`: the shares of both that are the `SAME` as a training image.
    - `memorised`: a without those that come about as held-out images do: (a - b) / (1 - b), at least 0. This is how Abbott
      (1925) counts the insects that a poison kills where some die anyway. `memorised_prompts` is the number n, and
      `near_distance` the distance, in [0, 2], below which an image counts.

    All are of the first n of each, n being the number of the fewer. The k-th sample is drawn for the caption of the k-th
    held-out image, and whether a caption leaves room for anything new decides much of both: so they are compared in pairs.

    Args:
        samples, held_out: distances (N,) and (M,) to the nearest training image.
        confidence: of the intervals: Wilson's of a and b, and Newcombe's of their difference in pairs, b in the denominator
            taken as it is.
    """
    threshold, count = near(held_out), min(len(samples), len(held_out))
    if threshold is None or not count:
        return {}
    flagged, repeats = samples[:count] < threshold, held_out[:count] < threshold
    a, b = float(flagged.mean()), float(repeats.mean())
    if b == 1:
        return {}
    same = {}
    for name, distances in (("samples", samples), ("held_out", held_out)):
        share = float((distances[:count] < SAME).mean())
        same[name] = with_interval(f"{name}_same", share, wilson(share, count, confidence))
    low, high = (min(max(end / (1 - b), 0.0), 1.0) for end in paired_difference(flagged, repeats, confidence))
    return (
        with_interval("memorised", max(0.0, (a - b) / (1 - b)), (low, high))
        | {"memorised_prompts": count, "near_distance": round(threshold, 4)}
        | with_interval("nearer_than_held_out", a, wilson(a, count, confidence))
        | with_interval("held_out_repeats", b, wilson(b, count, confidence))
        | same["samples"]
        | same["held_out"]
    )
