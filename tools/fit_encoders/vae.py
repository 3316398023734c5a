"""Fit the small bundled VAE: a plain `AutoencoderKL`, 8x down to 4 channels, on rendered scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from dit.utils.images import psnr, reconstruct, to_tensor
from tools.fit_encoders.optimizers import muon_and_adamw, one_cycle

IMAGE_SIZE = 64
FINAL_LOG_VARIANCE = -8.0  # a posterior noise of 0.02, where the latents' deviation is about 1


def build_vae() -> AutoencoderKL:
    """Build a VAE with the architecture of Stable Diffusion's, of 0.98 M parameters instead of 84 M."""
    channels = (16, 32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
    )


def fit_vae(
    images: np.ndarray,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    kl_weight: float = 1e-4,
    seed: int = 0,
) -> AutoencoderKL:
    """Fit on `images`, (N, H, W, 3) uint8, each mirrored half the time; return the VAE with its scaling factor set.

    The loss is the mean squared error + `kl_weight` x KL per latent number (Kingma and Welling 2014, with the small KL
    weight of Rombach et al. 2022, section 3.1); see optimizers.py for the rest.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = build_vae().to(device)
    with torch.no_grad():  # start with little posterior noise: at a variance of 1 it drowns the latents
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    optimizers = muon_and_adamw(vae, learning_rate, outer=("encoder.conv_in", "decoder.conv_out"))
    schedules = one_cycle(optimizers, learning_rate, steps)
    rng = np.random.default_rng(seed)
    progress = tqdm(range(steps), desc="VAE", unit="step")
    for step in progress:
        x = pixels_to_tensor(images[rng.integers(len(images), size=batch_size)])
        x = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, x, x.flip(-1)).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(decoded.float(), x)
        loss = mse + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{psnr(x, decoded.detach().float()):.1f} dB", kl=f"{posterior.kl().mean().item():.0f}")
    vae.cpu().eval()
    with torch.no_grad():
        # The noise has made the decoder robust; in the latents of a diffusion model it would drown the last steps.
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = FINAL_LOG_VARIANCE
        latents = vae.encode(pixels_to_tensor(images[:1000])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> float:
    """Return the PSNR in dB over all `images`, (N, H, W, 3) uint8, decoded from posterior means."""
    originals = pixels_to_tensor(images)
    return psnr(originals, torch.cat([reconstruct(vae, batch) for batch in originals.split(batch_size)]))


def pixels_to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return to_tensor(torch.from_numpy(images))
