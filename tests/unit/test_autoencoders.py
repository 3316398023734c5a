"""Every autoencoder that encodes to a grid: the real classes of diffusers, small, with random weights, from images to images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from dit.commands.check import describe_cost, describe_memory
from dit.config import Model, load_config
from dit.encoders.loading import EncoderSource, check_sides, load_vae
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.latents.device_cache import DeviceLatentCache
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.training.export import save_model
from dit.training.setup import build_model
from dit.utils.autoencoder import decode_latents, encode_image, scaling_and_shift, vae_factor
from helpers import REPO
from helpers.encoding import encode, write_raw
from helpers.training import CPU, MODEL, OPTIM, TRAIN, run

# Of each class: what it is made with, pixels a latent, channels.
SMALL = {
    "AutoencoderKL": (
        {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4},
        4,
        4,
    ),
    "AutoencoderKLFlux2": (
        {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 6},
        8,
        6,
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "num_encoder_blocks": (1, 1, 1, 1),
            "num_decoder_blocks": (1, 1, 1, 1),
            "latent_channels": 5,
        },
        8,
        5,
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 8,
            "attention_head_dim": 4,
            "encoder_block_out_channels": (8, 8, 16, 16, 16),
            "decoder_block_out_channels": (8, 8, 16, 16, 16),
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "encoder_qkv_multiscales": ((), (), (), (), ()),
            "decoder_qkv_multiscales": ((), (), (), (), ()),
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.5,
        },
        16,
        8,
    ),
}
POSTERIOR = ("AutoencoderKL", "AutoencoderKLFlux2")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module", params=SMALL)
def encoded(request, raw, tmp_path_factory) -> tuple[str, Path, LatentCache]:
    """The class, the folder of the weights, and a cache that was made with them."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    arguments, _, _ = SMALL[name]
    if "block_out_channels" in arguments:
        levels = len(arguments["block_out_channels"])
        arguments = arguments | {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
        }
    getattr(diffusers, name)(**arguments).save_pretrained(folder / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(folder))
        encode(raw, folder / "latents", vae=str(folder / "vae"))
    return name, folder / "vae", LatentCache(folder / "latents")


def source(cache: LatentCache) -> EncoderSource:
    return EncoderSource(**cache.index["vae"])


def test_cache_holds_what_the_autoencoder_makes(encoded):
    name, folder, cache = encoded
    _, factor, channels = SMALL[name]
    cache.verify()
    side = 64 // factor
    assert cache.latent_shapes == [(channels, side, side)]
    values = 2 * channels if name in POSTERIOR else channels
    assert cache.grid_shapes == [(values, side, side)]
    vae, _ = load_vae(EncoderSource(str(folder)))
    assert type(vae).__name__ == name and vae_factor(vae.config) == factor
    assert (cache.index.get("vae_class", "AutoencoderKL"), cache.index["vae"]["name"]) == (name, str(folder))


def test_latents_are_scaled_alike_when_read_and_when_decoded(encoded, raw):
    _, _, cache = encoded
    vae, _ = load_vae(source(cache))
    scaling, shift = cache.scaling_and_shift(CPU)
    for found, own in zip((scaling, shift), scaling_and_shift(vae), strict=True):
        assert torch.equal(torch.as_tensor(found).flatten(), torch.as_tensor(own).flatten())
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_image(vae, pixels)
    with torch.no_grad():
        unscaled = vae.encode(pixels)
        grid = unscaled.latent_dist.mean if hasattr(unscaled, "latent_dist") else unscaled[0]
        expected = vae.decode(grid).sample
    torch.testing.assert_close(latents, (grid - shift) * scaling)
    torch.testing.assert_close(decode_latents(vae, latents), expected, atol=1e-5, rtol=1e-4)


def test_channels_are_measured_where_the_configuration_says_nothing(encoded):
    name, folder, cache = encoded
    measured = cache.index["vae"].get("latents_std")
    assert (measured is not None) == (name == "AutoencoderKLFlux2")
    if measured:
        batch = cache.read(np.arange(len(cache)), np.zeros(len(cache)), np.zeros(len(cache), dtype=bool))
        scaling, shift = cache.scaling_and_shift(CPU)
        means = (batch.moments[:, : len(measured)].float() - shift) * scaling
        torch.testing.assert_close(means.mean((0, 2, 3)), torch.zeros(len(measured)), atol=0.01, rtol=0)
        torch.testing.assert_close(means.std((0, 2, 3)), torch.ones(len(measured)), atol=0.01, rtol=0)
        assert "latents_std" not in json.loads((folder / "config.json").read_text())  # the user's folder stays what it was


def test_device_cache_reads_the_same(encoded):
    _, _, cache = encoded
    images = np.array([3, 0, 7])
    arguments = images, np.array([0.0, 0.4, 0.9]), np.array([True, False, True])
    for own, other in zip(
        vars(cache.read(*arguments)).values(), vars(DeviceLatentCache(cache, CPU).read(*arguments)).values(), strict=True
    ):
        assert torch.equal(own, other)


def test_training_to_images_and_export(encoded, tmp_path):
    name, _, cache = encoded
    transformer, summary = run(cache, tmp_path / "state")
    assert np.isfinite(summary["val_loss"]) and transformer.config.in_channels == SMALL[name][2]
    save_model(tmp_path / "dit", transformer, cache, MODEL, OPTIM, TRAIN)

    def images(folder: Path) -> np.ndarray:
        pipeline = DiTTextToImagePipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return pipeline("a blue star", num_inference_steps=2, generator=noise, output_type="np").images

    first = images(tmp_path / "dit")
    assert first.shape == (1, 64, 64, 3)
    DiTTextToImagePipeline.from_pretrained(tmp_path / "dit").save_pretrained(tmp_path / "export")
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", name]
    assert np.array_equal(images(tmp_path / "export"), first)


def test_image_to_image(encoded, tmp_path):
    _, _, cache = encoded
    save_model(tmp_path / "dit", build_model(cache, MODEL, 0), cache, MODEL, OPTIM, TRAIN)
    pipeline = DiTTextToImagePipeline.from_pretrained(tmp_path / "dit")
    pipeline.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    images = pipeline("a blue star", image=start, mask_image=mask, strength=0.9, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(images[..., :32], start[..., :32], atol=1e-6, rtol=0)  # outside the mask the original stays


def recipe(folder: Path, image_size: int, patch_size: int):
    settings = load_config(REPO / "params.yaml").folder
    encode = replace(settings.encode, vae=str(folder), clip="builtin", image_size=image_size)
    return replace(settings, encode=encode, model=Model(patch_size, 64, 2, 4, 0, "velocity"))


def test_sides_that_do_not_fit_are_told_before_anything_is_encoded(encoded):
    name, folder, _ = encoded
    factor = SMALL[name][1]
    check_sides("folder", recipe(folder, 4 * factor, 2))
    with pytest.raises(
        UserError, match=rf"^folder.encode.image_size: {3 * factor} is not a multiple of {2 * factor} \(VAE factor"
    ):
        check_sides("folder", recipe(folder, 3 * factor, 2))


@pytest.mark.parametrize("name", ["~nobody-of-this-name/vae", "a" * 5000, "owner/vae"])
def test_sides_are_checked_at_once_where_the_name_is_no_folder(tmp_path, name):
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    folder = text.index("\nfolder:")
    own = (
        text[folder:]
        .replace("vae: stabilityai/sd-vae-ft-mse", f"vae: {name!r}", 1)
        .replace("image_size: 256", "image_size: 250", 1)
    )
    (tmp_path / "params.yaml").write_text(text[:folder] + own, encoding="utf-8")
    with pytest.raises(UserError, match=r"folder.encode.image_size: 250 is not a multiple of 16 \(VAE factor 8 x patch_size 2\)"):
        load_config(tmp_path / "params.yaml")


def test_cost_of_a_choice(encoded):
    name, folder, cache = encoded
    params = load_config(REPO / "params.yaml")
    chosen = replace(params, recipe="folder", folder=recipe(folder, 64, 1))
    line = describe_cost(chosen)
    _, factor, channels = SMALL[name]
    side, stored = 64 // factor, np.prod(cache.grid_shapes[0])
    assert line.startswith(f"an image of 64 x 64 pixels is {side**2} tokens, from latents of {channels} x {side} x {side}: ")
    assert f"{4 * stored:,} bytes in the cache" in line and line.endswith(" TFLOP")
    assert describe_memory(chosen).startswith("memory of a GPU, counted, not compiled: encode 0.")
