"""Fit the small bundled VAE: a plain `AutoencoderKL`, 8x down to 4 channels, on rendered scenes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from dit.utils.autoencoder import reconstruct
from dit.utils.images import psnr, to_tensor
from tools.fit_encoders.optimizers import muon_and_adamw, one_cycle

IMAGE_SIZE = 64
LOG_VARIANCE = -8.0  # of the posterior: a noise of 0.02, where every channel's deviation is 1
# The latents are decoded with a noise of up to this deviation, so that what a diffusion model gets wrong shows less.
MAX_NOISE = 0.05
SCALES = (0.5, 0.75)  # to which latents and images are shrunk in every fourth step


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


def fit_vae(images: np.ndarray, steps: int, learning_rate: float = 3e-3, seed: int = 0) -> AutoencoderKL:
    """Fit on `images`, (N, H, W, 3) uint8; return the VAE, whose latents have mean 0 and deviation 1 in every channel.

    First for equivariance and detail, then, for a third as many steps at half the learning rate, for detail alone.
    """
    torch.manual_seed(seed)
    vae = build_vae()
    fit_autoencoder(vae, images, steps, learning_rate, shrinking=True, seed=seed)
    fit_autoencoder(vae, images, steps // 3, learning_rate / 2, shrinking=False, seed=seed + 1)
    vae.eval()
    standardize_latents(vae, images[:2000])
    return vae


def fit_autoencoder(
    vae: AutoencoderKL,
    images: np.ndarray,
    steps: int,
    learning_rate: float,
    shrinking: bool,
    seed: int,
    batch_size: int = 16,
) -> None:
    """Make `steps` steps with a learning-rate schedule of their own. The loss is the mean squared error.

    With `shrinking`, in every fourth step latents and images are shrunk alike, so that a latent says the same wherever and
    however large something is: equivariant latents are easier for a diffusion model (EQ-VAE, Kouzelis et al. 2025,
    arXiv:2502.09509). Statistics of the batch and noise take the place of the KL term: they bound what a latent can tell.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae.to(device)
    channels = vae.config.latent_channels
    optimizers = muon_and_adamw(vae, learning_rate, outer=("encoder.conv_in", "decoder.conv_out"))
    schedules = one_cycle(optimizers, learning_rate, steps)
    rng = np.random.default_rng(seed)
    progress = tqdm(range(steps), desc="VAE", unit="step")
    for step in progress:
        target = pixels_to_tensor(images[rng.integers(len(images), size=batch_size)]).to(device)
        with torch.autocast(device, torch.bfloat16):
            means = vae.quant_conv(vae.encoder(target))[:, :channels]
        latents = F.batch_norm(means.float(), None, None, training=True)
        if shrinking and step % 4 == 3:
            scale = SCALES[int(rng.integers(len(SCALES)))]
            latents, target = shrink(latents, scale), shrink(target, scale)
        noise = MAX_NOISE * torch.rand(batch_size, 1, 1, 1, device=device) * torch.randn_like(latents)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decoder(vae.post_quant_conv(latents + noise)).float()
        vae.zero_grad()
        F.mse_loss(decoded, target).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % 20 == 0:
            progress.set_postfix(psnr=f"{psnr(target, decoded.detach()):.1f} dB")
    vae.cpu()


def shrink(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Resize `x` (N, C, H, W) by `scale`, antialiased."""
    return F.interpolate(x, scale_factor=scale, mode="bicubic", antialias=True)


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> None:
    """Give the latents of `images`, (N, H, W, 3) uint8, mean 0 and deviation 1 in every channel, and one posterior variance.

    The decoder was fitted on latents of just these statistics.
    """
    channels, last = vae.config.latent_channels, vae.quant_conv
    means = torch.cat([vae.encode(x).latent_dist.mean for x in pixels_to_tensor(images).split(batch_size)])
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    last.weight[:channels] /= deviation[:, None, None, None]
    last.bias[:channels] = (last.bias[:channels] - mean) / deviation
    last.weight[channels:] = 0
    last.bias[channels:] = LOG_VARIANCE
    vae.register_to_config(scaling_factor=1.0)


def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> float:
    """Return the PSNR in dB over all `images`, (N, H, W, 3) uint8, decoded from posterior means."""
    originals = pixels_to_tensor(images)
    return psnr(originals, torch.cat([reconstruct(vae, batch) for batch in originals.split(batch_size)]))


def pixels_to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return to_tensor(torch.from_numpy(images))
