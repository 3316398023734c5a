"""Memorization: does a model generate new images, or copies of its training images? The nearest training image of each tells.

"Near" has no meaning by itself, so it is calibrated with real images that training has not seen: how near are these to a
training image? Where a data set repeats itself, as rendered scenes do (there are about 2,000 different images of one object,
and most of them are in the training set), new images may equal old ones, too, and a model that has memorized nothing
generates such images as often. What counts is how much more often a model does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dit.evaluation.intervals import paired_difference, wilson, with_interval

# Distances between unit vectors, in [0, 2]. Below this, two images count as the same one, rendered or stored again: the bundled
# VAE moves a rendered scene by 0.01 to 0.06, mirroring the pixels by up to 0.03, and two scenes of different objects are 0.39
# apart or more. Such held-out images tell how often the data repeat themselves, not how near different images are.
SAME = 0.1
PERCENTILE = 1
CHUNK = 1024


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of N images: `index` (N,) int64, `distance` (N,) float64, `mirrored` (N,) bool.

    `mirrored` is true where the mirror image is nearer than the image itself.
    """

    index: np.ndarray
    distance: np.ndarray
    mirrored: np.ndarray


def find_nearest(images: torch.Tensor, mirror_images: torch.Tensor, training: torch.Tensor) -> Nearest:
    """Find the training image that is nearest to each image or to its mirror image.

    Training may mirror its images; mirroring the few samples instead of the training images costs less and is equivalent.

    Args:
        images, mirror_images: features (N, P) of length 1.
        training: features (T, P), T at least 1.
    """
    as_is, turned = _search(images, training), _search(mirror_images, training)
    mirrored = turned[1] < as_is[1]
    index, distance = (torch.where(mirrored, other, one).numpy() for one, other in zip(as_is, turned, strict=True))
    return Nearest(index, distance, mirrored.numpy())


def _search(images: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return index and Euclidean distance of each row's nearest: by the largest cosine, then measured without its rounding."""
    best = [(rows @ training.T).argmax(dim=1) for rows in images.split(CHUNK)]
    index = torch.cat(best) if best else torch.empty(0, dtype=torch.int64)
    return index, (images.double() - training[index].double()).norm(dim=1)


def near_threshold(held_out: np.ndarray) -> float | None:
    """Return the distance below which an image is too near to a training image: the 1st percentile of held-out images.

    Those that are the `SAME` as a training image are left out, so it is at least `SAME`; None where there are no others.
    """
    others = held_out[held_out >= SAME]
    return float(np.percentile(others, PERCENTILE)) if len(others) else None


def measure_memorization(samples: np.ndarray, held_out: np.ndarray, confidence: float) -> dict[str, float]:
    """Return metrics in [0, 1], each with the ends of its interval; none where no held-out image can calibrate them.

    - `nearer_than_held_out`: share a of the samples that are too near to a training image (see `near_threshold`).
    - `held_out_repeats`: the same share b of the held-out images: by construction 1 % where there are hundreds and all
      differ from training images; more of a few, since the nearest one always counts.
    - `samples_same`, `held_out_same`: the shares of both that are the `SAME` as a training image.
    - `memorised`: a corrected for the rate of held-out images: (a - b) / (1 - b), at least 0. This is how Abbott
      (1925) counts the insects that a poison kills where some die anyway. `memorised_prompts` is the number n, and
      `near_distance` the distance, in [0, 2], below which an image counts.

    All are of the first n of each, n being the smaller number. The k-th sample is generated from the caption of the
    k-th held-out image, and both depend on whether that caption leaves room for a new image: so they are compared in pairs.

    Args:
        samples, held_out: distances (N,) and (M,) to the nearest training image.
        confidence: of the intervals: Wilson's of a and b, and Newcombe's of their difference in pairs, b in the denominator
            taken as it is.
    """
    threshold, count = near_threshold(held_out), min(len(samples), len(held_out))
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
