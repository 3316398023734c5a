"""What an autoencoder makes of images, for the cache, and errors where it does not fit into memory or into 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dit.config import Encode
from dit.errors import UserError, is_out_of_memory
from dit.utils.autoencoder import encode_grid
from dit.utils.images import to_tensor

if TYPE_CHECKING:
    from dit.utils.autoencoder import Autoencoder


def encode_moments(vae: Autoencoder, pixels: torch.Tensor, settings: Encode) -> torch.Tensor:
    """Return the posterior's moments of all crops and of their mirror images, or the latents where there is no posterior.

    Args:
        vae: on any device.
        pixels: (B, 1 + crops, H, W, 3) uint8.
        settings: for the error messages.

    Returns:
        (B, V, 2C or C, h, w) fp16 on the CPU, V = 2 (1 + crops), as `encode_grid` returns it: each crop, then its mirror image.

    Raises:
        UserError: the batch does not fit into memory, or the moments overflow.
    """
    try:
        moments = _moments(vae, pixels)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_oom_message(vae, pixels, settings)) from None
    if not moments.isfinite().all():
        raise UserError(
            f"encode.precision: with {settings.precision} the output of {settings.vae!r} overflows; bf16 or fp32 would be right"
        )
    return moments


@torch.no_grad()
def _moments(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    moments = []
    for crop in pixels.to(vae.device, non_blocking=True).unbind(1):
        upright = to_tensor(crop).to(vae.dtype)
        for side in (upright, upright.flip(-1)):
            moments.append(encode_grid(vae, side).half())
    return torch.stack(moments, dim=1).cpu()


def _oom_message(vae: Autoencoder, pixels: torch.Tensor, settings: Encode) -> str:
    """Return what to do about a batch that did not fit, after trying which size does.

    That size is not taken silently: the last bits of a VAE's output depend on it.
    """
    fits = len(pixels) // 2
    while fits:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            _moments(vae, pixels[:fits])
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            fits //= 2
    remedy = f"{fits} would fit" if fits else "not even 1 fits; set encode.vae_tiling, or a smaller encode.image_size"
    if fits and not settings.vae_slicing:
        remedy += ", or set encode.vae_slicing"
    problem = f"{settings.batch_size} images of {settings.image_size} pixels do not fit into memory"
    return f"encode.batch_size: {problem}; {remedy}"
