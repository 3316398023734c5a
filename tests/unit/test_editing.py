"""Changing an image: from where each scheduler begins, and what a mask protects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dit.config import Scheduler
from dit.errors import UserError
from dit.pipeline.img2img import get_timesteps, latent_mask
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler, set_timesteps, timesteps_to_sigmas
from dit.shapes.scene import Object, Scene, render
from dit.utils.images import decode_latents, encode_image, lies_over

SCENE = Scene((Object("red", "circle", "large"),), ((0.25, 0.75),), (0.2025,), "cream")


@pytest.fixture(scope="module")
def pipeline(model) -> DiTTextToImagePipeline:
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_get_timesteps_of_any_number_of_steps():
    for steps in (10, 20, 100):
        scheduler = make_scheduler("euler", "flow_prediction")
        set_timesteps(scheduler, steps)
        assert get_timesteps(scheduler, 1.0) == 0
        assert get_timesteps(scheduler, 0.0) == len(scheduler.timesteps)
        assert abs(float(timesteps_to_sigmas(scheduler)[get_timesteps(scheduler, 0.5)]) - 0.5) < 1 / steps


@pytest.mark.parametrize("name", [name for name in Scheduler.__args__ if name != "ddim"])
def test_strength_zero_is_the_reconstruction(pipeline, monkeypatch, name):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, "flow_prediction"))
    image = render(SCENE)
    (generated,) = pipeline("a blue circle", image=image, strength=0.0).images
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = decode_latents(pipeline.vae, encode_image(pipeline.vae, pixels))
        by_hand = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    assert torch.allclose(expected, by_hand, atol=1e-4)
    expected = (expected[0].permute(1, 2, 0).clamp(-1, 1).numpy() + 1) * 127.5
    assert np.abs(np.asarray(generated) - expected).max() <= 1
    assert np.abs(np.asarray(generated).astype(int) - np.asarray(image)).mean() < 4  # the VAE's error is small


@pytest.mark.parametrize("name", ["euler", "stochastic", "heun", "dpm++", "unipc"])
def test_mask_keeps_pixels_outside(pipeline, monkeypatch, name):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, "flow_prediction"))
    image = render(SCENE)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (35, 3, 61, 29))  # not along the edges of latents
    generator = torch.Generator().manual_seed(0)
    settings = {"image": image, "mask_image": mask, "num_inference_steps": 6, "generator": generator}
    generated = np.asarray(pipeline("a blue star", **settings).images[0]).astype(int)
    inside = np.asarray(mask) > 0
    change = np.abs(generated - np.asarray(image)).max(axis=2)
    assert change[~inside].max() <= 1 and np.median(change[inside]) > 5
    latents = pipeline("a blue star", output_type="latent", **settings).images
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        original = encode_image(pipeline.vae, pixels)
    changed = latent_mask(torch.from_numpy(inside)[None, None].float(), 8).bool().expand_as(latents)
    assert torch.allclose(latents[~changed], original[~changed], atol=1e-5)
    assert (latents[changed] - original[changed]).abs().max() > 0.1


def test_latent_mask():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 7:9, 16] = 1
    expected = torch.zeros(4, 4)
    expected[0:2, 2] = 1
    assert torch.equal(latent_mask(mask, 8)[0, 0], expected)


SIDES = st.integers(64, 4000)


@given(SIDES, SIDES, st.floats(0.05, 1), st.sampled_from([round, math.floor, math.ceil]), st.booleans())
@example(1024, 683, 0.5, round, False)
def test_lies_over_a_resized_image(width, height, scale, rounded, swapped):
    pair = [(width, height), (max(1, rounded(width * scale)), max(1, rounded(height * scale)))]
    assert lies_over(*(reversed(pair) if swapped else pair))


@given(SIDES, SIDES, st.integers(2, 60), st.booleans())
def test_lies_over_no_other_shape(width, height, pixels, swapped):
    """Two pixels too many along the shorter side are no rounding."""
    other = (width, height + pixels) if height <= width else (width + pixels, height)
    pair = [(width, height), other]
    assert not lies_over(*(reversed(pair) if swapped else pair))


@pytest.mark.parametrize("size", [(512, 341), (512, 342), (256, 171)])
def test_mask_may_be_a_pixel_off(pipeline, size):
    image, mask = Image.new("RGB", (1024, 683)), Image.new("L", size)
    mask.paste(255, (0, size[1] // 2, *size))
    (generated,) = pipeline("a red circle", image=image, mask_image=mask, num_inference_steps=2).images
    assert np.asarray(generated)[:24].max() <= 1 < np.asarray(generated)[40:].max()


@pytest.mark.parametrize("size", [(512, 344), (512, 339), (683, 1024)])
def test_mask_of_another_shape_is_refused(pipeline, size):
    with pytest.raises(UserError, match=f"mask_image: {size[0]} x {size[1]} pixels do not lie over the image's 1024 x 683"):
        pipeline("a red circle", image=Image.new("RGB", (1024, 683)), mask_image=Image.new("L", size))


def test_image_of_another_shape_is_cropped(pipeline):
    wide = Image.new("RGB", (192, 64), "white")
    wide.paste(render(SCENE), (64, 0))
    (generated,) = pipeline("a red circle", image=wide, strength=0.0).images
    (alone,) = pipeline("a red circle", image=render(SCENE), strength=0.0).images
    assert np.abs(np.asarray(generated).astype(int) - np.asarray(alone)).max() <= 1


def test_several_images(pipeline):
    other = render(Scene((Object("green", "star", "large"),), ((0.75, 0.25),), (0.2025,), "black"))
    images = [render(SCENE), other]
    generated = pipeline(["a red circle", "a blue star"], image=images, num_images_per_prompt=2, strength=0.0).images
    for k, image in enumerate(generated):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(images[k // 2])).mean() < 6
