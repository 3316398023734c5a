"""Between images and the VAE's latents, scaled as the diffusion model sees them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL


def encode_image(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode `pixels` (N, 3, H, W) in [-1, 1] to latents (N, C, H / 8, W / 8) float32: the posterior's mean, scaled."""
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to pixels (N, 3, H, W) float32 in about [-1, 1]; the inverse of `encode_image`, but for the VAE's error."""
    unscaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(unscaled.to(vae.dtype)).sample.float()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode `pixels` (N, 3, H, W) in [-1, 1]; return the same shape, float32, clipped to [-1, 1]."""
    return decode_latents(vae, encode_image(vae, pixels)).clamp(-1, 1)


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two batches of images (N, 3, H, W) in [-1, 1]."""
    return float(10 * torch.log10(4 / (first - second).square().mean()))
