"""The VAE's reconstruction error on a data set: no model that is trained on its latents can be better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from dit.dataset.image_io import load_crops
from dit.dataset.reader import Entry
from dit.utils.images import grid, psnr, reconstruct, to_images, to_tensor

SHOWN = 8  # originals beside their reconstructions
SAMPLED = 256  # images that the reconstruction error is measured on


def measure_reconstruction(
    vae: AutoencoderKL, raw: Path, images: Sequence[list[Entry]], image_size: int, batch_size: int, path: Path
) -> float:
    """Measure the PSNR in dB of the central squares of up to `SAMPLED` images; plot originals above reconstructions to `path`."""
    chosen = np.random.default_rng(0).permutation(len(images))[:SAMPLED]
    batches = [
        [(images[k][0].image, images[k][0].stored) for k in chosen[start : start + batch_size]]
        for start in range(0, len(chosen), batch_size)
    ]
    every: list[tuple[torch.Tensor, torch.Tensor]] = []
    shown: list[tuple[Image.Image, Image.Image]] = []
    loaded = load_crops(raw, batches, [(image_size, image_size)])
    for pixels, *_ in tqdm(loaded, desc="reconstruct", total=len(batches), unit="batch", delay=2):
        originals = to_tensor(pixels[:, 0])
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
