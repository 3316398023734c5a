"""Fit the small VAE in the box: a plain `AutoencoderKL`, 8x down to 4 channels, on drawn scenes."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from tools.fit_encoders.optimizers import muon_and_adamw, one_cycle

IMAGE_SIZE = 64
FINAL_LOG_VARIANCE = -8.0  # a posterior noise of 0.02, where the latents' deviation is about 1


def build_vae() -> AutoencoderKL:
    """The architecture of Stable Diffusion's VAE, 0.98 M parameters instead of 84 M."""
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
    """Fit on `images`, (N, H, W, 3) uint8, each mirrored half the time; returns the VAE with its scaling factor set.

    The loss is the mean squared error + `kl_weight` x KL per latent number (Kingma and Welling 2014, with the small KL
    weight of Rombach et al. 2022, section 3.1); see optimizers.py for the rest.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = build_vae().to(device)
    with torch.no_grad():  # start with little posterior noise: at a variance of 1 it drowns what the encoder says
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -6
    optimizers = muon_and_adamw(vae, learning_rate, outer=("encoder.conv_in", "decoder.conv_out"))
    schedules = one_cycle(optimizers, learning_rate, steps)
    rng = np.random.default_rng(seed)
    progress = tqdm(range(steps), desc="VAE", unit="step")
    for step in progress:
        x = to_tensor(images[rng.integers(len(images), size=batch_size)])
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
            progress.set_postfix(psnr=f"{psnr(mse.item()):.1f} dB", kl=f"{posterior.kl().mean().item():.0f}")
    vae.cpu().eval()
    with torch.no_grad():
        # The noise has made the decoder sturdy; in what a diffusion model is trained on it would drown the last steps.
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = FINAL_LOG_VARIANCE
        latents = vae.encode(to_tensor(images[:1000])).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / max(mse, 1e-12))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> float:
    """PSNR in dB, of the mean squared error over all `images`, (N, H, W, 3) uint8, decoded from posterior means."""
    total = 0.0
    for start in range(0, len(images), batch_size):
        x = to_tensor(images[start : start + batch_size])
        decoded = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        total += F.mse_loss(decoded, x).item() * len(x)
    return psnr(total / len(images))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
