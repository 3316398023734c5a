"""Rectified flow: the path from image to noise, the loss on it, and the integrator back. None of them knows the network.

Liu et al. 2022 (arXiv:2209.03003); logit-normal timesteps from Esser et al. 2024 (arXiv:2403.03206, section 3.1).
t = 0 is the image, t = 1 pure noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def sample_timesteps(count: int, generator: torch.Generator, logit_mean: float) -> torch.Tensor:
    """Logit-normal timesteps, (count,) float32 in (0, 1), on the generator's device.

    A larger `logit_mean` (m in Esser et al.) spends more of the training on noisy images, where it is decided what goes where.
    """
    return torch.sigmoid(logit_mean + torch.randn(count, generator=generator, device=generator.device))


def add_noise(images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The straight path x_t = (1 - t) x + t noise; `images` and `noise` (N, C, H, W), `timesteps` (N,)."""
    t = timesteps[:, None, None, None]
    return (1 - t) * images + t * noise


def velocity(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the network predicts: dx_t / dt = noise - x, (N, C, H, W)."""
    return noise - images


def loss(prediction: torch.Tensor, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error to the velocity for each image: (N,) float32."""
    return (prediction.float() - velocity(images, noise)).square().flatten(1).mean(1)


@torch.no_grad()
def integrate(predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Euler's method from `noise` (N, C, H, W) at t = 1 to images at t = 0.

    Args:
        predict: velocity (N, C, H, W) of latents (N, C, H, W) at timesteps (N,).
        noise: standard normal.
        steps: number of evaluations of `predict`, equally far apart.
    """
    x = noise
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, following in zip(times[:-1], times[1:], strict=True):
        x = x + (following - t) * predict(x, t.expand(len(x)))
    return x


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): away from the unconditional prediction; a scale of 1 changes nothing."""
    return unconditional + scale * (conditional - unconditional)
