"""What the VAE makes of a data set: its reconstruction error, and the range of its latents.

No model that is trained on the latents can be better than their reconstructions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.dataset.image_io import load_crops
from dit.dataset.reader import Entry
from dit.utils.autoencoder import encode_image, reconstruct
from dit.utils.images import grid, psnr, to_images, to_tensor

if TYPE_CHECKING:
    from dit.utils.autoencoder import Autoencoder

SHOWN = 8  # originals beside their reconstructions
SAMPLED = 256  # images that reconstructions and latents are measured on


def sample_images(
    raw: Path, images: Sequence[list[Entry]], image_size: int, batch_size: int, desc: str
) -> Iterator[torch.Tensor]:
    """Load the central squares of up to `SAMPLED` images, always the same ones, as batches (B, 3, H, W) in [-1, 1]."""
    chosen = np.random.default_rng(0).permutation(len(images))[:SAMPLED]
    batches = [
        [(images[k][0].image, images[k][0].stored) for k in chosen[start : start + batch_size]]
        for start in range(0, len(chosen), batch_size)
    ]
    loaded = load_crops(raw, batches, [(image_size, image_size)])
    for pixels, *_ in tqdm(loaded, desc=desc, total=len(batches), unit="batch", delay=2):
        yield to_tensor(pixels[:, 0])


def measure_latents(vae: Autoencoder, samples: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Measure mean and standard deviation of every channel of the latents of `samples`, whose scaling is 1 so far."""
    latents = torch.cat([encode_image(vae, batch).cpu() for batch in samples]).double()
    return latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()


def measure_reconstruction(vae: Autoencoder, samples: Iterable[torch.Tensor], path: Path) -> float:
    """Measure the PSNR in dB of `samples`, batches (B, 3, H, W); plot originals above reconstructions to `path`."""
    every: list[tuple[torch.Tensor, torch.Tensor]] = []
    shown: list[tuple[Image.Image, Image.Image]] = []
    for originals in samples:
        decoded = reconstruct(vae, originals).cpu()
        every.append((originals, decoded))
        if len(shown) < SHOWN:
            shown += list(zip(to_images(originals), to_images(decoded), strict=True))
    _plot_pairs(shown[:SHOWN], path)
    return round(psnr(*(torch.cat(side) for side in zip(*every, strict=True))), 2)


def _plot_pairs(pairs: list[tuple[Image.Image, Image.Image]], path: Path) -> None:
    originals, decoded = zip(*pairs, strict=True)
    scale = max(1, 128 // originals[0].width)
    sheet = grid([*originals, *decoded], columns=len(pairs), scale=scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
