"""Rendered scenes that no training has seen, their captions, and the features that the bundled CLIP gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from dit.encoders.loading import EncoderSource
from dit.evaluation.clip import ClipFeatures
from dit.shapes.captions import describe
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Description, Kind, Scene, sample_description

FREE, QUARTERS = Kind("free", 3), Kind("quarters", 2)


@functools.cache
def clip() -> ClipFeatures:
    return ClipFeatures(EncoderSource("builtin"))


def features(images: Sequence[Image.Image], mirrored: bool = False) -> torch.Tensor:
    images = [ImageOps.mirror(image) for image in images] if mirrored else images
    return clip().embed_images(images, len(images), "CLIP")


def descriptions(
    seed: int, count: int, wanted: Callable[[Description], bool] = lambda _: True, kind: Kind = FREE
) -> list[Description]:
    """`count` descriptions as the recipe shapes makes them, of those that are `wanted`."""
    found, k = [], 0
    while len(found) < count:
        description = sample_description(np.random.default_rng([9000, seed, k]), kind)
        found += [description] if wanted(description) else []
        k += 1
    return found


def several(description: Description) -> bool:
    return len(description.objects) > 1


def scenes(described: Sequence[Description], seed: int, layout: str = "free") -> list[Scene]:
    return [sample_scene(each, np.random.default_rng([9001, seed, k]), layout) for k, each in enumerate(described)]


def rendered(described: Sequence[Description], seed: int, layout: str = "free") -> list[Image.Image]:
    return [render(scene) for scene in scenes(described, seed, layout)]


def captions(described: Sequence[Description]) -> list[str]:
    return [describe(description, np.random.default_rng([9002, k])) for k, description in enumerate(described)]
