"""Random numbers as pure functions of counters."""

from __future__ import annotations

import numpy as np
import torch


def seeded_generator(device: torch.device, *counters: int) -> torch.Generator:
    """Return a fresh generator for these counters, e.g. (seed, stream, step): no state drifts from one use to the next."""
    seed = int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)
