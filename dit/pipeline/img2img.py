"""What the pipeline needs to change a given image rather than to draw a new one: image-to-image and inpainting.

Image-to-image begins part of the way, at the image with noise on it (SDEdit: Meng et al. 2022, arXiv:2108.01073).
Inpainting puts the noisy original back outside the mask after every step (RePaint: Lugmayr et al. 2022, arXiv:2201.09865,
equation 8, without its resampling).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from PIL import Image

from dit.pipeline.schedulers import timesteps_to_sigmas


def side_lengths(pictures: Any) -> tuple[int, int]:
    """Return width and height of what diffusers takes for an image, or of the first of several; (0, 0) of what is none.

    That is a PIL image, a numpy array (…, H, W, C) or (H, W), or a tensor (…, H, W).
    """
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


def get_timesteps(scheduler: SchedulerMixin, strength: float) -> int:
    """Return the first of `scheduler.timesteps` whose noise level is at most `strength` in [0, 1]; their number if there is none.

    Levels are those of the training, 1 is pure noise: so `strength` means the same with every scheduler and step count.
    """
    times = timesteps_to_sigmas(scheduler)
    for k in range(0, len(times), scheduler.order):  # a step of order 2 has two timesteps, and begins at its first
        if times[k] <= strength + 1e-6:
            return k
    return len(times)


def add_noise(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
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
