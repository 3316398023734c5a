"""Aspect-ratio buckets: the few sizes that the images of a set are resized to, so that little of each is cut off.

A batch has images of one size, so a size for each image would leave batches of one. NovelAI's aspect ratio bucketing (2022) has
a fixed list of sizes; here those few are taken from such a list that fit the set best, so that a compiled network is compiled
few times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]  # width and height, in pixels

MAX_SIZES = 7  # torch.compile gives up after eight
LONGEST = 2  # times the shorter side: what is longer still is cropped to that
MIN_GAIN = 0.005  # of the area of all images: a size that saves less is not worth a shape of its own
STEPS = 16  # that the side of a square is divided into, or fewer
SMALLEST_STEP = 8  # pixels


def side_step(image_size: int) -> int:
    """Return what sides are multiples of, in pixels: a power of two, 16 for squares of 256 pixels and 32 for those of 512."""
    return max(SMALLEST_STEP, 2 ** (image_size // STEPS).bit_length() // 2)


def possible_sizes(image_size: int) -> list[Size]:
    """Return the square of `image_size` and all sizes of about its area: for each width the largest height that is no more."""
    step = side_step(image_size)
    sizes = {(image_size, image_size)}
    for width in range(step, LONGEST * image_size, step):
        height = image_size**2 // width // step * step
        if height and max(width, height) <= LONGEST * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def cut_share(image: Size, size: Size) -> float:
    """Return which share of an image's area is cut off where it is resized to cover `size`, in [0, 1)."""
    return float(_cuts(np.array([image]), np.array([size]))[0, 0])


def nearest_size(image: Size, sizes: Sequence[Size]) -> int:
    """Return the number of that one of `sizes` that least is cut off for; of several, the narrowest, whatever their order."""
    return int(nearest_sizes(np.array([image]), sizes)[0])


def nearest_sizes(images: np.ndarray, sizes: Sequence[Size]) -> np.ndarray:
    """Return `nearest_size` of each of `images` (N, 2): (N,)."""
    order = np.array(sorted(range(len(sizes)), key=sizes.__getitem__))
    kinds, which = np.unique(images, axis=0, return_inverse=True)
    return order[_cuts(kinds, np.array(sizes)[order]).argmin(axis=1)][which]


def choose_sizes(images: Sequence[Size] | np.ndarray, image_size: int) -> list[Size]:
    """Choose at most `MAX_SIZES` sizes for a set of images.

    Each next one is that which reduces what is cut off the most, as long as it is by `MIN_GAIN`.

    Args:
        images: of every image, its size.
        image_size: the side of the square that all sizes have about the area of.
    """
    kinds, counts = np.unique(np.array(images), axis=0, return_counts=True)
    possible = possible_sizes(image_size)
    cuts = _cuts(kinds, np.array(possible))  # (K, S)
    chosen: list[int] = []
    left = np.ones(len(kinds))
    while len(chosen) < MAX_SIZES:
        totals = counts @ np.minimum(left[:, None], cuts) / len(images)  # (S,), of all images together
        best = int(totals.argmin())
        if chosen and counts @ left / len(images) - totals[best] < MIN_GAIN:
            break
        chosen.append(best)
        left = np.minimum(left, cuts[:, best])
    return sorted(possible[k] for k in chosen)


def _cuts(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share of the area of each of K `images` (K, 2) that each of S `sizes` (S, 2) cuts off: (K, S)."""
    of_images, of_sizes = images[:, :1] / images[:, 1:], (sizes[:, 0] / sizes[:, 1])[None]
    return 1 - np.minimum(of_images, of_sizes) / np.maximum(of_images, of_sizes)
