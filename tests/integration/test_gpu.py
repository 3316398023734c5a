"""What only a GPU can show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit.benchmark.baselines import Inputs, TrainingStep, attention_kernels, own_step
from dit.config import Model
from dit.pipeline.pipeline import DiTTextToImagePipeline
from helpers.gpu import memory
from helpers.training import run, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")
DEFAULT = Model(patch_size=2, hidden_size=768, num_layers=16, num_heads=12, conv_channels=0, output="velocity")


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


def test_counted_memory_is_what_is_measured():
    """What the forward pass keeps, with the longest captions."""
    counted = memory(images=0)
    expected = counted.training_memory(DEFAULT.num_layers)
    step = own_step(DEFAULT, Inputs.random(96, 77, torch.device("cuda")), torch.bfloat16, compiled=False)
    step()  # the moments are there from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected.forward, rel=0.1)
    assert expected.divisible == 4 * 4 * step.parameters


def test_deterministic_mode_repeats_the_same_bits(cache, tmp_path):
    first, second = (run(cache, tmp_path / name, runtime={"deterministic": True})[0] for name in ("a", "b"))
    torch.use_deterministic_algorithms(False)
    assert same(first, second)


def test_model_cpu_offload_generates_the_same_with_less_memory(model):
    """Also where an image is changed: then the VAE runs before the transformer."""
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "np"}
    image, mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64, 64)
    calls = [{}, {"image": image, "strength": 0.7}, {"image": image, "mask_image": mask}]

    def generate() -> tuple[list[np.ndarray], int]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        generators = [torch.Generator().manual_seed(k) for k in range(len(calls))]
        results = [
            pipeline("a red circle", generator=g, **call, **settings).images for g, call in zip(generators, calls, strict=True)
        ]
        return results, torch.cuda.max_memory_allocated() - before

    empty = torch.cuda.memory_allocated()
    pipeline.enable_model_cpu_offload()
    offloaded, peak = generate()
    assert {module.device.type for module in (pipeline.text_encoder, pipeline.transformer, pipeline.vae)} == {"cpu"}
    assert torch.cuda.memory_allocated() - empty < 1e6
    pipeline.remove_all_hooks()
    weights = pipeline.to("cuda") and torch.cuda.memory_allocated() - empty
    expected, whole = generate()
    for a, b in zip(offloaded, expected, strict=True):
        assert np.allclose(a, b, atol=1e-3)
    assert peak < weights + whole
