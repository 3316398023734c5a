"""Picture files with more than eight bits, as the eight that everything here works with."""

from __future__ import annotations

import numpy as np
from PIL import Image


def eight_bits(image: Image.Image) -> Image.Image:
    """`image`, and where it is grey with 16 bits, 65,535 as 255. Pillow's own conversion makes all from 256 on white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65_535) / 257).round().astype(np.uint8))
