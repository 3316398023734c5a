"""Where bf16 is worth it."""

from __future__ import annotations

import functools

import torch

from dit.throughput import matmul_peak

ROUNDS, SECONDS = 8, 0.02  # that each is timed for, in turns, so that both see the same load
SIZE = 512  # of the matrices that are multiplied to find out
WORTH = 1.2  # times as fast; processors were measured at 0.5, 2.2 (both with AVX-512's bf16 instructions) and 5 (AMX)


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 faster than fp32: known of GPUs, tried on a CPU, in a third of a second.

    What a processor says of itself does not tell: of two with the same instructions, one was slower with them. The fastest
    product of several short rounds counts, since another program may have the cores for as long as one of them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    best = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for _ in range(ROUNDS):
        for dtype in best:
            best[dtype] = max(best[dtype], matmul_peak(device, dtype, SIZE, SECONDS))
    return best[torch.bfloat16] > WORTH * best[torch.float32]
