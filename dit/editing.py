"""What the pipeline needs to change a given picture rather than to draw a new one: image-to-image and inpainting.

Image-to-image begins part of the way, at the picture with noise on it (SDEdit: Meng et al. 2022, arXiv:2108.01073).
Inpainting puts the noisy original back outside the mask after every step (RePaint: Lugmayr et al. 2022, arXiv:2201.09865,
equation 8, without its resampling).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SchedulerMixin
from PIL import Image

from dit.schedulers import model_times


def side_lengths(pictures: Any) -> tuple[int, int]:
    """Width and height of what diffusers takes for a picture, or of the first of several: PIL, numpy (…, H, W, C) or (H, W),
    torch (…, H, W). (0, 0) of what is none."""
    if isinstance(pictures, (list, tuple)) and pictures:
        return side_lengths(pictures[0])
    if isinstance(pictures, Image.Image):
        return pictures.size
    if isinstance(pictures, np.ndarray) and pictures.ndim > 1:
        height, width = pictures.shape[-3:-1] if pictures.ndim > 2 else pictures.shape
        return width, height
    if isinstance(pictures, torch.Tensor) and pictures.ndim > 1:
        return pictures.shape[-1], pictures.shape[-2]
    return 0, 0


def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, H / 8, W / 8) float32 of `pixels` (N, 3, H, W) in [-1, 1]: the posterior's mean, scaled as in training."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (N, 3, H, W) in about [-1, 1] of `latents`; the inverse of `encode_image`, but for the VAE's error."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(unscaled.to(vae.dtype)).sample.float()


@torch.no_grad()
def fidelity(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    """How much of `pixels` (N, 3, H, W) in [-1, 1] is left when they go through the VAE and back: the PSNR in dB."""
    error = decode_latents(vae, encode_image(vae, pixels)).clamp(-1, 1) - pixels.to(vae.device)
    return float(10 * torch.log10(4 / error.square().mean()))


def first_step(scheduler: SchedulerMixin, strength: float) -> int:
    """The first of `scheduler.timesteps` whose noise level is at most `strength` in [0, 1]; their number if there is none.

    Levels are those of the training, 1 is pure noise: so `strength` means the same with every scheduler and step count.
    """
    times = model_times(scheduler)
    for k in range(0, len(times), scheduler.order):  # a step of order 2 has two timesteps, and begins at its first
        if times[k] <= strength + 1e-6:
            return k
    return len(times)


def noised(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
    """`latents` (N, C, h, w) with as much of `noise` as `scheduler` expects before its step `k`; none after the last."""
    if k == len(scheduler.timesteps):
        return latents
    timestep = scheduler.timesteps[k : k + 1]
    if hasattr(scheduler, "scale_noise"):  # of a flow
        return scheduler.scale_noise(latents, timestep, noise)
    return scheduler.add_noise(latents, noise, timestep)


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Which latents are redrawn: (N, 1, H / factor, W / factor), 1 where any pixel of `mask` (N, 1, H, W) is 1."""
    return F.max_pool2d(mask, factor)
