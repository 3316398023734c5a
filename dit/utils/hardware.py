"""What the hardware can do: the peak behind MFU, and whether bf16 is worth using."""

from __future__ import annotations

import os
import shutil
import time

import torch

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86-64 with AVX-512 or AMX, Arm; names of torch.cpu.get_capabilities

IN_USE = 2  # batches of shared memory beside those that workers load ahead: the one in use, and the one that is being handed over


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3) -> float:
    """Measure the floating-point operations per second of square matrix products on `device`, the best of several."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    a @ a
    while not best or time.perf_counter() < end:  # once at least, however slow or busy the machine is
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


def free_shared_memory() -> float:
    """Return the bytes that are free for batches of worker processes, this process's share; infinite without /dev/shm."""
    try:
        return shutil.disk_usage("/dev/shm").free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except OSError:
        return float("inf")


def limit_workers(workers: int, prefetch: int, batch_bytes: int, free: float | None = None) -> tuple[int, int]:
    """Return how many worker processes, and batches that each loads ahead, shared memory has room for; print where that is fewer.

    Where it has not, a worker dies of a bus error: containers have 64 MB, unless told otherwise.

    Args:
        workers, prefetch: the settings; both are kept where there is room.
        batch_bytes: of all tensors in a batch.
        free: bytes; by default those that are.

    Returns:
        The numbers of workers, which may be 0, and of batches, at least 1.
    """
    free = free_shared_memory() if free is None else free
    if free >= (workers * prefetch + IN_USE) * batch_bytes:
        return workers, prefetch
    room = max(0, int(free // batch_bytes) - IN_USE)
    fewer = min(workers, room)
    ahead = max(1, room // max(1, fewer))
    print(
        f"/dev/shm: {free / 1e6:.0f} MB are free, {(workers * prefetch + IN_USE) * batch_bytes / 1e6:.0f} are needed for "
        f"runtime.num_workers {workers} and prefetch_factor {prefetch}: going on with {fewer} and {ahead}; "
        "in Docker, a larger --shm-size would be right",
        flush=True,
    )
    return fewer, ahead
