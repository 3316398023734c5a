"""Changing an image: from where each scheduler begins, and what a mask protects."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from dit.config import Scheduler
from dit.dataset.rgb import to_rgb
from dit.errors import UserError
from dit.pipeline.img2img import SourceImage, get_timesteps, latent_mask
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler, set_timesteps, timesteps_to_sigmas
from dit.shapes.render import render
from dit.shapes.scene import Object, Scene
from dit.utils.autoencoder import decode_latents, encode_image
from dit.utils.images import lies_over, to_tensor

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


def source_pixels(pipeline, image, mask=None) -> SourceImage:
    """What a call with 16 x 16 pixels starts from."""
    processors = (pipeline.image_processor, pipeline.mask_processor)
    return SourceImage.prepare(
        pipeline.vae, *processors, image, mask, torch.zeros(1, pipeline.vae.config.latent_channels, 2, 2), 1, 1
    )


@given(arrays(np.uint8, st.tuples(st.just(16), st.just(16), st.integers(1, 4))), st.sampled_from(["uint8", "int64", "float32"]))
def test_arrays_start_as_their_image_does(pipeline, array, dtype):
    """Grey, RGB, both with alpha; integers or floats; numpy or torch: as the PIL image, which is converted as in training."""
    mode = ["L", "LA", "RGB", "RGBA"][array.shape[2] - 1]
    image = Image.fromarray(array[..., 0] if mode == "L" else array, mode)
    expected = to_tensor(torch.from_numpy(np.array(to_rgb(image))[None]))
    values = array.astype(np.float32) / 255 if dtype == "float32" else array.astype(dtype)
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
    for given_image in (image, values, tensor, values[None], [tensor], (image,)):
        pixels = source_pixels(pipeline, given_image).pixels
        assert pixels.shape == (1, 3, 16, 16) and (pixels - expected).abs().max() <= 1.01 / 127.5  # alpha_composite rounds


def test_uint8_array_generates_as_its_image(pipeline):
    image = render(SCENE)
    expected, *others = (
        np.asarray(pipeline("a red circle", image=kind, strength=0.0).images[0])
        for kind in (image, np.asarray(image), np.asarray(image) / 255, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    )
    assert all(np.array_equal(other, expected) for other in others)


def test_image_is_turned_upright(pipeline):
    """As in training; so an upright mask lies over it."""
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    halves = Image.new("RGB", (32, 16), "black")
    halves.paste("white", (0, 0, 16, 16))
    halves.save(stream, "PNG", exif=exif)
    stream.seek(0)
    image = Image.open(stream)
    mask = Image.new("L", (16, 32), 255)
    upright = ImageOps.exif_transpose(image)
    assert torch.equal(source_pixels(pipeline, image).pixels, source_pixels(pipeline, upright).pixels)
    assert not torch.equal(source_pixels(pipeline, image).pixels, source_pixels(pipeline, halves).pixels)
    settings = {"height": 32, "width": 16, "num_inference_steps": 2}
    assert pipeline("a", image=image, mask_image=mask, **settings).images[0].size == (16, 32)


def test_mask_that_is_transparent_is_refused(pipeline):
    image, mask = Image.new("RGB", (16, 16)), Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    with pytest.raises(UserError, match="mask_image: transparent in places, which may mean either"):
        pipeline("a", image=image, mask_image=mask, height=16, width=16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "PA", "RGBa", "P", "L", "RGB", "I;16"])
def test_transparent_image_is_white(pipeline, mode):
    """Whatever colour is beneath; as in training."""
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 16))
    if mode == "RGB":
        image = image.convert("RGB")
        image.info["transparency"] = (255, 0, 0)
    elif mode in ("P", "L", "I;16"):  # one value is transparent
        values = np.repeat(np.array([[0] * 8 + [7] * 8]), 16, 0)
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
        image = image if mode == "I;16" else image.convert(mode)
        image.info["transparency"] = 7
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("RGB").convert("P")
        image.putalpha(alpha)
    else:
        image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    assert image.mode == mode
    (pixels,) = source_pixels(pipeline, image).pixels
    assert torch.equal(pixels[:, :, :8], torch.full((3, 16, 8), -1.0)) and torch.equal(pixels[:, :, 8:], torch.ones(3, 16, 8))


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.new("1", (16, 16), 1), 255),
        (Image.new("L", (16, 16), 100), 100),
        (Image.new("I;16", (16, 16), 25_700), 100),
        (Image.new("I", (16, 16), 25_700), 100),
        (Image.new("F", (16, 16), 0.4), 102),
        (Image.new("CMYK", (16, 16), (0, 0, 0, 155)), 100),
        (np.full((16, 16), 100, np.uint8), 100),
        (np.full((16, 16), 25_700, np.uint16), 100),
        (torch.full((16, 16), 0.4, dtype=torch.bfloat16), 102),
        (np.full((16, 16), 100, np.uint8)[::-1], 100),  # not contiguous
        (np.full((16, 16), 1.004), 255),
    ],
)
def test_grey_image_of_any_kind(pipeline, image, value):
    pixels = source_pixels(pipeline, image).pixels
    assert pixels.shape == (1, 3, 16, 16) and ((pixels + 1) * 127.5 - value).abs().max() < 0.5


@pytest.mark.parametrize("largest", [1, 255])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_mask_of_integers(pipeline, kind, largest):
    """As of 0 and 1, or of 0 to 255, where less than half is black."""
    rows = [[0] * 16] * 8 + [[largest] * 16] * 8
    mask = source_pixels(pipeline, Image.new("RGB", (16, 16)), kind(rows)).mask
    assert not mask[..., :8, :].any() and mask[..., 8:, :].all()
    dark = source_pixels(pipeline, Image.new("RGB", (16, 16)), kind([[0] + [100] * 15] * 16)).mask
    assert not dark.any()


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
