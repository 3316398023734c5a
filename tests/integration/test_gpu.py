"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from dit.benchmark.baselines import Inputs, TrainingStep, attention_kernels, own_step
from dit.config import Model
from helpers.training import run, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")
DEFAULT = Model(patch_size=2, hidden_size=768, num_layers=16, num_heads=12)


def full_size(batch: int) -> TrainingStep:
    return own_step(DEFAULT, Inputs.random(batch, 24, torch.device("cuda")), torch.bfloat16, compiled=False)


def test_masked_attention_uses_a_fast_kernel():
    kernels = attention_kernels(full_size(2))
    assert kernels and not any("math" in name for name in kernels)


def test_default_training_fits_an_rtx_4090():
    step = full_size(96)
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    ema = 4 * step.parameters  # bytes
    assert torch.cuda.max_memory_allocated() + ema < 21e9


def test_deterministic_mode_repeats_the_same_bits(cache, tmp_path):
    first, second = (run(cache, tmp_path / name, runtime={"deterministic": True})[0] for name in ("a", "b"))
    torch.use_deterministic_algorithms(False)
    assert same(first, second)
