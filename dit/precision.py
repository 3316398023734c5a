"""Where bf16 is worth it."""

from __future__ import annotations

import functools

import torch

from dit.throughput import matmul_peak

SIZE = 512  # of the matrices that are multiplied to find out
WORTH = 1.2  # times as fast; processors were measured at 0.5, 2.2 (both with AVX-512's bf16 instructions) and 5 (AMX)


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 faster than fp32: known of GPUs, tried on a CPU, in a tenth of a second.

    What a processor says of itself does not tell: of two with the same instructions, one was slower with them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    fp32, bf16 = (matmul_peak(device, dtype, SIZE, seconds=0.05) for dtype in (torch.float32, torch.bfloat16))
    return bf16 > WORTH * fp32
