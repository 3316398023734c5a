"""Fit the small bundled VAE, a plain `AutoencoderKL`, 8x down to 16 channels, on rendered scenes.

Its latents stay near a code (scene_labels.py: `scene_code`) that tells what is where instead of how each piece of it looks:
that is what a small transformer can learn to predict from a caption. Of photographs, representation autoencoders (Zheng et al.
2025, arXiv:2510.11690) and VAEs aligned with DINOv2 (Yao et al. 2025, arXiv:2501.01423) do the same with features that need no
labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from tqdm import tqdm

from dit.utils.autoencoder import reconstruct
from dit.utils.images import psnr, to_tensor
from tools.fit_encoders.optimizers import muon_and_adamw, one_cycle
from tools.fit_encoders.scene_labels import CODE

IMAGE_SIZE, CELLS = 64, 8
LOG_VARIANCE = -8.0  # of the posterior: a noise of 0.02, where every channel's deviation is about 1
# The latents are decoded with a noise of up to this deviation, so that what a diffusion model gets wrong shows less.
MAX_NOISE = 0.3
CODE_WEIGHT = 0.01  # of the distance from the code, beside the error of what is drawn
POINTED_WEIGHT = 3.0  # an image of pointed shapes alone comes 1 + this times as often as one of round ones


def build_vae() -> AutoencoderKL:
    """Build a VAE with the architecture of Stable Diffusion's, of 2.8 M parameters instead of 84 M."""
    channels = (16, 32, 64, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=CODE,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def fit_vae(
    images: np.ndarray,
    codes: torch.Tensor,
    pointed: np.ndarray,
    encoder_steps: int,
    decoder_steps: int,
    steps: int,
    seed: int = 0,
) -> AutoencoderKL:
    """Fit on `images`, (N, H, W, 3) uint8: encoder and decoder each by themselves, towards and from the code; then together.

    Args:
        images: of scenes.
        codes: what they show, (N, CODE, CELLS, CELLS), of any mean and deviation. The latents have about 0 and 1.
        pointed: (N,), of each image the share of its objects whose shape has points: stars and triangles are drawn last.
        encoder_steps: of 32 images.
        decoder_steps: of 32 images.
        steps: of 16 images, together.
        seed: of weights, batches and noise.
    """
    torch.manual_seed(seed)
    vae = build_vae().to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last)
    codes = (codes - codes.mean((0, 2, 3), keepdim=True)) / codes.std((0, 2, 3), keepdim=True)
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def code_error(pixels: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(_means(vae, pixels), code)

    def error_from_code(pixels: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return drawing_error(_decode_noisy(vae, code), pixels)

    def error_of_both(pixels: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        means = _means(vae, pixels)
        return drawing_error(_decode_noisy(vae, means), pixels) + CODE_WEIGHT * F.mse_loss(means, code)

    odds = 1 + POINTED_WEIGHT * pointed
    _fit(encoder, images, codes, odds, encoder_steps, 32, 2e-3, code_error, "encoder", seed)
    _fit(decoder, images, codes, odds, decoder_steps, 32, 2e-3, error_from_code, "decoder", seed + 1)
    _fit(vae, images, codes, odds, steps, 16, 8e-4, error_of_both, "both", seed + 2)
    with torch.no_grad():
        vae.quant_conv.weight[CODE:] = 0
        vae.quant_conv.bias[CODE:] = LOG_VARIANCE
    return vae.cpu().eval()


def drawing_error(drawn: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the pixels, plus that of the differences between neighbours, which sharpens edges."""
    error = drawn - pixels
    return error.square().mean() + error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()


def _means(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        return vae.quant_conv(vae.encoder(pixels))[:, :CODE].float()


def _decode_noisy(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    noise = MAX_NOISE * torch.rand(len(latents), 1, 1, 1, device=latents.device) * torch.randn_like(latents)
    noisy = (latents + noise).to(memory_format=torch.channels_last)
    with torch.autocast(latents.device.type, torch.bfloat16):
        return vae.decoder(vae.post_quant_conv(noisy)).float()


def _fit(
    module: nn.Module,
    images: np.ndarray,
    codes: torch.Tensor,
    odds: np.ndarray,
    steps: int,
    batch_size: int,
    learning_rate: float,
    error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    what: str,
    seed: int,
) -> None:
    """Make `steps` steps of `module` with the `error` of pixels (B, 3, H, W) in [-1, 1] and their codes."""
    optimizers = muon_and_adamw(module, learning_rate, outer=("conv_in", "conv_out", "quant_conv"))
    schedules = one_cycle(optimizers, learning_rate, steps)
    rng, device = np.random.default_rng(seed), next(module.parameters()).device
    module.train()
    progress = tqdm(range(steps), desc=what, unit="step")
    for _ in progress:
        rows = np.sort(rng.choice(len(images), batch_size, p=odds / odds.sum()))
        pixels = pixels_to_tensor(images[rows]).to(device, memory_format=torch.channels_last)
        loss = error(pixels, codes[rows].to(device, torch.float32))
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        progress.set_postfix(error=f"{loss.item():.4f}", refresh=False)


def reconstruction_psnr(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 100) -> float:
    """Return the PSNR in dB over all `images`, (N, H, W, 3) uint8, decoded from posterior means."""
    originals = pixels_to_tensor(images)
    return psnr(originals, torch.cat([reconstruct(vae, batch) for batch in originals.split(batch_size)]))


def pixels_to_tensor(images: np.ndarray) -> torch.Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return to_tensor(torch.from_numpy(images))
