"""Changing a picture: from where each scheduler begins, and what a mask protects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_schedulers import PAIRS

from dit.config import Scheduler
from dit.encoders.vae import decode_latents, encode_image
from dit.model.objectives import make_objective
from dit.pipeline.img2img import add_noise, get_timesteps, latent_mask
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler, set_timesteps, timesteps_to_sigmas
from dit.shapes.scene import Object, Scene, render
from helpers.gaussian import DEVIATION, MEAN, ideal

SCENE = Scene((Object("red", "circle", "large"),), ((0.25, 0.75),), (0.2025,), "cream")
STRENGTH = 0.6


@pytest.fixture(scope="module")
def pipeline(model) -> DiTTextToImagePipeline:
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_every_solver_goes_on_from_a_noisy_picture(name, prediction_type):
    """Images from N(m, s^2): the ideal prediction carries x_t to m + s (x_t - a m) / sqrt(a^2 s^2 + b^2)."""
    objective = make_objective("flow" if prediction_type == "flow_prediction" else "ddpm", prediction_type)
    scheduler = make_scheduler(name, prediction_type)
    set_timesteps(scheduler, 80)
    times, first = timesteps_to_sigmas(scheduler), get_timesteps(scheduler, STRENGTH)
    assert STRENGTH - 0.03 <= times[first] <= STRENGTH + 1e-6
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    image, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = MEAN + DEVIATION * image
    x = add_noise(scheduler, image, noise, first)
    for k in range(first, len(times)):
        timestep = scheduler.timesteps[k]
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(ideal(objective)(seen, times[k][None]), timestep, x, return_dict=False)[0]
    kept, added = objective.alpha_sigma(times[first][None])
    expected = MEAN + DEVIATION * (added * noise + kept * (image - MEAN)) / (kept**2 * DEVIATION**2 + added**2).sqrt()
    assert (x - expected).abs().max() < 0.12
    assert torch.equal(add_noise(scheduler, image, noise, len(times)), image)


def test_strength_says_how_noisy_the_beginning_is_whatever_the_number_of_steps():
    for steps in (10, 20, 100):
        scheduler = make_scheduler("euler", "flow_prediction")
        set_timesteps(scheduler, steps)
        assert get_timesteps(scheduler, 1.0) == 0
        assert get_timesteps(scheduler, 0.0) == len(scheduler.timesteps)
        assert abs(float(timesteps_to_sigmas(scheduler)[get_timesteps(scheduler, 0.5)]) - 0.5) < 1 / steps


@pytest.mark.parametrize("name", [name for name in Scheduler.__args__ if name != "ddim"])
def test_at_strength_zero_the_picture_goes_through_the_vae_and_no_further(pipeline, monkeypatch, name):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, "flow_prediction"))
    picture = render(SCENE)
    (drawn,) = pipeline("a blue circle", image=picture, strength=0.0).images
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = decode_latents(pipeline.vae, encode_image(pipeline.vae, pixels))
        by_hand = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
    assert torch.allclose(expected, by_hand, atol=1e-4)
    expected = (expected[0].permute(1, 2, 0).clamp(-1, 1).numpy() + 1) * 127.5
    assert np.abs(np.asarray(drawn) - expected).max() <= 1
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(picture)).mean() < 4  # the VAE's error is small


@pytest.mark.parametrize("name", ["euler", "stochastic", "heun", "dpm++", "unipc"])
def test_outside_the_mask_pixels_stay_and_inside_they_change(pipeline, monkeypatch, name):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(name, "flow_prediction"))
    picture = render(SCENE)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (35, 3, 61, 29))  # not along the edges of latents
    generator = torch.Generator().manual_seed(0)
    settings = {"image": picture, "mask_image": mask, "num_inference_steps": 6, "generator": generator}
    drawn = np.asarray(pipeline("a blue star", **settings).images[0]).astype(int)
    inside = np.asarray(mask) > 0
    change = np.abs(drawn - np.asarray(picture)).max(axis=2)
    assert change[~inside].max() <= 1 and np.median(change[inside]) > 5
    latents = pipeline("a blue star", output_type="latent", **settings).images
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        original = encode_image(pipeline.vae, pixels)
    redrawn = latent_mask(torch.from_numpy(inside)[None, None].float(), 8).bool().expand_as(latents)
    assert torch.allclose(latents[~redrawn], original[~redrawn], atol=1e-5)
    assert (latents[redrawn] - original[redrawn]).abs().max() > 0.1


def test_a_latent_is_redrawn_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 7:9, 16] = 1
    expected = torch.zeros(4, 4)
    expected[0:2, 2] = 1
    assert torch.equal(latent_mask(mask, 8)[0, 0], expected)


def test_a_picture_of_another_shape_is_cropped_and_not_squeezed(pipeline):
    wide = Image.new("RGB", (192, 64), "white")
    wide.paste(render(SCENE), (64, 0))
    (drawn,) = pipeline("a red circle", image=wide, strength=0.0).images
    (alone,) = pipeline("a red circle", image=render(SCENE), strength=0.0).images
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(alone)).max() <= 1


def test_several_pictures_are_changed_each_by_its_prompt(pipeline):
    other = render(Scene((Object("green", "star", "large"),), ((0.75, 0.25),), (0.2025,), "black"))
    pictures = [render(SCENE), other]
    drawn = pipeline(["a red circle", "a blue star"], image=pictures, num_images_per_prompt=2, strength=0.0).images
    for k, image in enumerate(drawn):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(pictures[k // 2])).mean() < 6
