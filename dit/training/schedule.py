"""Learning rate over the steps: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math


def learning_rate_factor(kind: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the peak learning rate at `step` (0 <= step < total_steps), in [0, 1]; 0 is reached after the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
