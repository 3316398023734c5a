"""Convolutions at the latents' own resolution, before and after the transformer: the detail within a patch.

A transformer that cuts latents into patches has to learn every shape once for every place that it can have in a patch;
a convolution learns it once. Early convolutions also make transformers easier to train (Xiao et al. 2021, arXiv:2106.14881).

Shapes in comments: N images, H x W latents, K channels, D the width of the condition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dit.model.norm import layer_norm

NUM_BLOCKS = 2  # on either side


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions on a normalised and modulated input, with a gate: adaLN-Zero, as in the transformer's blocks."""

    def __init__(self, channels: int, hidden_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.adaLN_modulation = nn.Linear(hidden_size, 3 * channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Apply the block to `x` (N, K, H, W) under `condition` (N, D)."""
        shift, scale, gate = self.adaLN_modulation(condition)[:, :, None, None].chunk(3, dim=1)  # each (N, K, 1, 1)
        y = torch.addcmul(shift, channel_norm(x), 1 + scale)
        y = self.conv2(F.silu(self.conv1(y)))
        return torch.addcmul(x, gate, y)  # (N, K, H, W)


def channel_norm(x: torch.Tensor) -> torch.Tensor:
    """Layer norm of each latent of `x` (N, K, H, W) over its channels K, without weights, laid out channels last."""
    return layer_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stem(nn.Module):
    """From latents (N, C, H, W) to features (N, K, H, W), of which the patches are made."""

    def __init__(self, in_channels: int, channels: int, hidden_size: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(channels, hidden_size) for _ in range(NUM_BLOCKS))

    def forward(self, latents: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Look at the neighbourhood of each latent, under `condition` (N, D)."""
        x = self.conv_in(latents.to(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x, condition)
        return x


class Head(nn.Module):
    """From features (N, K, H, W), the stem's and the transformer's together, to what is predicted (N, C, H, W)."""

    def __init__(self, channels: int, out_channels: int, hidden_size: int):
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(channels, hidden_size) for _ in range(NUM_BLOCKS))
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Predict from `x` under `condition` (N, D)."""
        for block in self.blocks:
            x = block(x, condition)
        return self.conv_out(F.silu(channel_norm(x)))


def stem_and_head_flops(latent_size: tuple[int, int], in_channels: int, channels: int, hidden_size: int) -> int:
    """Count the multiply-adds of one image's forward pass through stem and head."""
    kernels = 9 * channels * (2 * in_channels + 2 * 2 * NUM_BLOCKS * channels)
    return latent_size[0] * latent_size[1] * kernels + 2 * NUM_BLOCKS * hidden_size * 3 * channels
