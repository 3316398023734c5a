"""What the hardware can do: the peak behind MFU, and whether bf16 is worth using."""

from __future__ import annotations

import time

import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86-64 with AVX-512 or AMX, Arm; names of torch.cpu.get_capabilities


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3) -> float:
    """Measure the floating-point operations per second of square matrix products on `device`, the best of several."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    a @ a
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do; a CPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether `device` has instructions for bf16, so that the same machine always decides alike.

    With them, matrix products were measured at 2.2 (AVX-512, Zen 4) to 5 times (AMX) the speed of fp32; without, at a fraction.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)
