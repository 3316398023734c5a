"""What each stage takes of a GPU's memory, counted on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from dit.benchmark.memory import CUDA_BYTES, RTX_4090, LiveBytes, StageMemory, counting
from dit.commands.check import describe_memory
from dit.utils.autoencoder import decode_latents
from helpers.gpu import CLIP, VAE, memory, params

GRADIENTS = 4 * 239e6  # bytes


def test_live_bytes_of_a_layer():
    with LiveBytes() as live:
        layer = torch.nn.Linear(1024, 4096)
        weights = 4 * (1024 * 4096 + 4096)
        assert live.now == weights
        x = torch.ones(256, 1024)
        kept = torch.nn.functional.gelu(layer(x))
        both = 2 * 4 * 256 * 4096  # GELU's input, which its backward pass needs, and its output
        assert live.now == weights + x.nbytes + both
        del kept
        assert live.now == weights + x.nbytes
        layer(x).sum().backward()
        assert live.now == pytest.approx(2 * weights + x.nbytes, abs=1024)
        assert live.peak > live.now


def test_meta_tensors_count_as_real_ones_do():
    def decode(device: str) -> None:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(block_out_channels=(32, 64), latent_channels=4, **blocks)
        with torch.no_grad():
            decode_latents(vae.eval(), torch.zeros(4, 4, 16, 16, device=device))

    with LiveBytes() as real:
        decode("cpu")
    with counting() as counted:
        decode("meta")
    assert counted.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize(
    "recipe", ["shapes", "coco", *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "hub", "webdataset"))]
)
def test_every_stage_fits_an_rtx_4090(recipe):
    stages = memory(recipe).count()
    assert list(stages) == ["encode", "train", "validate", "preview", "sample", "evaluate"]
    assert min(stages.values()) > 0 and max(stages.values()) + CUDA_BYTES < RTX_4090


def test_training_is_what_it_is_known_to_be():
    """Weights, moments and EMA 3.8 GB; activations 14.9 GB with captions of 24 tokens, counted in another way."""
    full, checkpointed = memory().train(), memory(gradient_checkpointing=True).train()
    assert 19e9 < full < 21e9
    assert 3.8e9 + GRADIENTS < checkpointed < full / 2
    assert memory(mixed_precision="no").train() > 1.5 * full
    assert memory(batch_size=48).train() < full - 7e9


def test_adapters_need_neither_moments_nor_ema_of_the_weights():
    full, adapters = (memory(method=method, init_from="models/dit", batch_size=1).train() for method in ("full", "lora"))
    assert full - 3.2 * GRADIENTS < adapters < full - 2.5 * GRADIENTS


def test_small_caches_are_kept_on_the_device():
    none, small, large = (memory(images=images, batch_size=1).train() for images in (0, 5000, 500_000))
    assert large == none and small - none == pytest.approx(5000 * memory().bytes_of_image(), abs=512)


def test_slicing_takes_one_image_at_a_time():
    whole = params()
    whole = replace(whole, coco=replace(whole.coco, encode=replace(whole.coco.encode, vae_slicing=False)))
    assert StageMemory(whole, VAE, CLIP, 0).encode() > 4 * memory().encode()


def test_check_says_what_is_too_much():
    assert describe_memory(params("shapes")).endswith(" of 24 GB") or torch.cuda.is_available()
    line = describe_memory(params("shapes", batch_size=20_000))
    assert "too much. train.gradient_checkpointing, or a smaller batch_size" in line
