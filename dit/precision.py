"""Where bf16 is worth it."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware; a CPU without such instructions emulates it, slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
