"""What the autoencoders of diffusers have in common: an image becomes a grid of latents, and a grid of latents an image.

Shapes in comments: N images of H x W pixels, C latent channels, f pixels a latent in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dit.utils.images import Statistic, per_channel

if TYPE_CHECKING:  # they take seconds to import
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny

    Autoencoder: TypeAlias = AutoencoderKL | AutoencoderKLFlux2 | AutoencoderTiny | AutoencoderDC

# The classes that can be used, and whether they have a posterior, from which each use of an image draws its latents.
HAS_POSTERIOR = {"AutoencoderKL": True, "AutoencoderKLFlux2": True, "AutoencoderTiny": False, "AutoencoderDC": False}
AT_ONCE = 2**19  # pixels that go through at once: 128 images of 64 x 64, 8 of 256 x 256, 2 of 512 x 512


def has_posterior(vae: Autoencoder) -> bool:
    """Return whether `vae` has a posterior, and not just one grid of latents for an image."""
    return HAS_POSTERIOR[type(vae).__name__]


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return how many pixels a latent is wide and high: each level of the encoder but the last halves the image.

    Args:
        config: of the autoencoder, as an object or as read from its config.json.

    Raises:
        KeyError, TypeError: it is not that of an autoencoder.
    """
    levels = config["encoder_block_out_channels" if "encoder_block_out_channels" in config else "block_out_channels"]
    return 2 ** (len(levels) - 1)


def has_scaling(vae: Autoencoder) -> bool:
    """Return whether the configuration says how its latents are scaled; `AutoencoderKLFlux2`'s does not."""
    return any(vae.config.get(name) is not None for name in ("scaling_factor", "latents_mean"))


def set_statistics(vae: Autoencoder, mean: list[float], deviation: list[float]) -> None:
    """Scale latents by mean and standard deviation of every channel from now on; a saved `vae` keeps them."""
    vae.register_to_config(latents_mean=mean, latents_std=deviation)


def scaling_and_shift(vae: Autoencoder) -> tuple[Statistic, Statistic]:
    """Return `scaling` and `shift`, a number each or one of each channel: the transformer sees (latents - shift) * scaling.

    They are the configuration's: `scaling_factor` and `shift_factor`, or the channels' `latents_mean` and `latents_std`.
    """
    config = vae.config
    mean, deviation, scaling = (config.get(name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    if mean is None or deviation is None:
        return scaling or 1.0, config.get("shift_factor") or 0.0
    return [(scaling or 1.0) / each for each in deviation], list(mean)


def encode_grid(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode `pixels` (N, 3, H, W) in [-1, 1], of the autoencoder's dtype and device, unscaled.

    Returns:
        mean and log-variance (N, 2C, H / f, W / f) of the posterior; where there is none, the latents (N, C, H / f, W / f).
    """
    encoded = vae.encode(pixels)
    if not has_posterior(vae):
        return encoded[0]
    posterior = encoded.latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


@torch.no_grad()
def encode_image(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode `pixels` (N, 3, H, W) in [-1, 1] to latents (N, C, H / f, W / f) float32: the posterior's mean, scaled."""
    scaling, shift = (per_channel(value, vae.device) for value in scaling_and_shift(vae))
    parts = [encode_grid(vae, part.to(vae.device, vae.dtype)) for part in pixels.split(_images_at_once(*pixels.shape[2:]))]
    latents = torch.cat([part.chunk(2, dim=1)[0] if has_posterior(vae) else part for part in parts]).float()
    return (latents - shift) * scaling


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to pixels (N, 3, H, W) float32 in about [-1, 1]; the inverse of `encode_image`, but for the VAE's error.

    A VAE takes far more memory than what comes out: 0.2 GB for an image of 256 x 256 pixels. So `AT_ONCE` limits it.
    """
    scaling, shift = (per_channel(value, latents.device) for value in scaling_and_shift(vae))
    unscaled, factor = latents / scaling + shift, vae_factor(vae.config)
    parts = unscaled.to(vae.dtype).split(_images_at_once(*(factor * side for side in unscaled.shape[2:])))
    return torch.cat([vae.decode(part).sample.float() for part in parts])


def reconstruct(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode `pixels` (N, 3, H, W) in [-1, 1]; return the same shape, float32, clipped to [-1, 1]."""
    return decode_latents(vae, encode_image(vae, pixels)).clamp(-1, 1)


def _images_at_once(height: int, width: int) -> int:
    """Return how many images of this size go through an autoencoder at once."""
    return max(1, AT_ONCE // (height * width))
