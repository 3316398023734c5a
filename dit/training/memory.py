"""Memory: keeping what a step frees for the next one, and which batch size would fit where one does not."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch

from dit.config import Train

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees, for its next step, instead of giving it back to the system.

    A step on a CPU frees gigabytes and asks for them again, and each time the kernel has to find, clear and map them page by
    page: a step of the 768 wide transformer took 1.2 to 1.35 times as long (batches of 8). Only glibc knows how; where
    there is another C library, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def largest_that_fits(attempt: Callable[[int], None], size: int) -> int:
    """The largest of size / 2, size / 4, … with which `attempt` does not run out of memory; 0 if there is none."""
    while size > 1:
        size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            continue
    return 0


def advice(train: Train, fits: int) -> str:
    """One line that says what to set."""
    problem = f"train.batch_size: {train.batch_size} images need more memory than there is"
    more_time = "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing to true (a third more time)"
    if not fits:
        return f"{problem}, and so does a single one; take a smaller model or a larger patch_size{more_time}"
    parts = -(-train.batch_size // fits) * train.gradient_accumulation_steps
    return (
        f"{problem}; {fits} fit: with train.gradient_accumulation_steps {parts} a step is of as many images as before{more_time}"
    )
