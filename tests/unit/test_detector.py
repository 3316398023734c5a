"""The judge behind prompt accuracy: right about drawings and what a VAE makes of them, and not to be fooled."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dit.encoders.loading import EncoderSource, load_vae
from dit.shapes.captions import describe, parse
from dit.shapes.detector import detect
from dit.shapes.scene import UNSEEN_PAIRS, Object, Scene, render, sample_description, sample_scene
from dit.shapes.scoring import judge
from dit.utils.images import to_images, to_tensor

COUNT = 1000


@functools.cache
def drawings() -> tuple[list[np.ndarray], list[str]]:
    """Half of them with a pair that training never shows."""
    pictures, captions = [], []
    for k in range(COUNT):
        rng = np.random.default_rng([777, k])
        description = sample_description(rng, must_have=sorted(UNSEEN_PAIRS) if k % 2 else ())
        captions.append(describe(description, rng))
        pictures.append(np.asarray(render(sample_scene(description, rng))))
    return pictures, captions


def share_right(pictures, captions) -> float:
    return float(np.mean([judge(p, parse(c)).correct for p, c in zip(pictures, captions, strict=True)]))


def test_fresh_drawings_are_judged_right():
    assert share_right(*drawings()) >= 0.99


def test_blurred_noisy_and_tinted_drawings_are_judged_right():
    pictures, captions = drawings()
    rng = np.random.default_rng(0)

    def distort(pixels: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(pixels.astype(float), (0.6, 0.6, 0))
        return np.clip(blurred + rng.normal(0, 3, pixels.shape) + rng.uniform(-4, 4, 3), 0, 255)

    assert share_right([distort(p) for p in pictures], captions) >= 0.98


@torch.no_grad()
def test_reconstructions_of_the_vae_in_the_box_are_judged_right():
    pictures, captions = drawings()
    vae, _ = load_vae(EncoderSource("builtin"))
    decoded = []
    for start in range(0, COUNT, 100):
        pixels = to_tensor(torch.from_numpy(np.stack([np.asarray(p) for p in pictures[start : start + 100]])))
        decoded += to_images(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
    assert share_right(decoded, captions) >= 0.98


def test_shuffled_captions_are_judged_wrong():
    pictures, captions = drawings()
    assert share_right(pictures, captions[1:] + captions[:1]) <= 0.05


def scene(*things: Object, at=((0.3, 0.3), (0.7, 0.7), (0.3, 0.75)), background: str = "white") -> Scene:
    radii = tuple(0.2 if thing.size == "large" else 0.12 for thing in things)
    return Scene(things, at[: len(things)], radii, background)


RED, BLUE = Object("red", "circle", "small"), Object("blue", "star", "large")


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("a red circle and a blue star", None),
        ("a blue star and a red circle", None),
        ("a small red circle and a large blue star on a white background", None),
        ("a red circle above a blue star", None),
        ("a red circle left of a blue star", None),
        ("a red square and a blue star", "shows small red circle, large blue star"),
        ("an orange circle and a blue star", "shows"),
        ("a blue circle and a red star", "shows"),
        ("a large red circle and a blue star", "shows"),
        ("a red circle right of a blue star", "right things, wrong places"),
        ("a red circle below a blue star", "right things, wrong places"),
        ("a red circle and a blue star on a black background", "background white, not black"),
        ("a red circle", "2 things instead of 1"),
        ("a red circle, a blue star and a green cross", "2 things instead of 3"),
    ],
)
def test_each_kind_of_mistake_is_found(caption, problem):
    verdict = judge(render(scene(RED, BLUE)), parse(caption))
    assert verdict.correct == (problem is None)
    assert problem is None or verdict.problem.startswith(problem)


def large(colour: str, shape: str) -> np.ndarray:
    return np.asarray(render(Scene((Object(colour, shape, "large"),), ((0.5, 0.5),), (0.2,), "white"))).copy()


@pytest.mark.parametrize(("colour", "shape"), [("blue", "star"), ("pink", "square"), ("red", "circle"), ("teal", "heart")])
def test_a_whole_thing_is_accepted_and_a_damaged_one_is_not(colour, shape):
    caption = parse(f"a {colour} {shape}")
    pixels = large(colour, shape)
    assert judge(pixels, caption).correct

    half = pixels.copy()
    half[:, :32] = pixels[:, :1]
    assert not judge(half, caption).correct

    squashed = np.broadcast_to(pixels[:, :1], pixels.shape).copy()
    squashed[:48] = np.asarray(Image.fromarray(pixels).resize((64, 48)))
    assert not judge(squashed, caption).correct

    two_colours = pixels.copy()
    other = large("orange", shape)
    two_colours[:32] = other[:32]
    assert not judge(two_colours, caption).correct


def test_a_square_that_lost_a_quarter_is_no_square():
    pixels = large("green", "square")
    pixels[:, : round(64 * (0.32 + 0.09))] = pixels[:, :1]
    assert not judge(pixels, parse("a green square")).correct


def test_an_empty_picture_shows_nothing_and_noise_shows_nothing_right():
    assert detect(np.full((64, 64, 3), 250, np.uint8)).things == ()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not judge(noise, parse("a red circle")).correct


def test_larger_pictures_are_judged_the_same():
    assert judge(render(scene(RED, BLUE), 128), parse("a small red circle above a large blue star on white")).correct
