"""Where bf16 is worth it."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 faster than fp32.

    Of CPUs only those with matrix units (AMX) do, five times as fast; with AVX-512's bf16 instructions alone a product
    was measured to take twice as long as in fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_amx_tile_supported()
