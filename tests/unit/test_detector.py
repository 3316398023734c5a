"""The detector behind prompt accuracy: right about rendered scenes and what a VAE makes of them, and not to be fooled."""

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
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import UNSEEN_PAIRS, Kind, Object, Scene, sample_description
from dit.shapes.scoring import score_objects
from dit.utils.images import to_images, to_tensor

COUNT = 1000
KINDS = pytest.mark.parametrize(("layout", "level"), [("free", 1), ("free", 3), ("quarters", 2)])


@functools.cache
def examples(layout: str, level: int) -> tuple[list[np.ndarray], list[str]]:
    """Rendered scenes and their captions; half of them with a pair that training never shows."""
    images, captions = [], []
    for k in range(COUNT):
        rng = np.random.default_rng([777, k])
        description = sample_description(rng, Kind(layout, level), must_have=sorted(UNSEEN_PAIRS) if k % 2 else ())
        captions.append(describe(description, rng))
        images.append(np.asarray(render(sample_scene(description, rng, layout))))
    return images, captions


def share_right(images, captions) -> float:
    return float(np.mean([score_objects(p, parse(c)).correct for p, c in zip(images, captions, strict=True)]))


@KINDS
def test_score_objects_fresh_scenes(layout, level):
    assert share_right(*examples(layout, level)) >= 0.99


@KINDS
def test_score_objects_blurred_noisy_and_tinted_scenes(layout, level):
    images, captions = examples(layout, level)
    rng = np.random.default_rng(0)

    def distort(pixels: np.ndarray) -> np.ndarray:
        blurred = ndimage.gaussian_filter(pixels.astype(float), (0.6, 0.6, 0))
        return np.clip(blurred + rng.normal(0, 3, pixels.shape) + rng.uniform(-4, 4, 3), 0, 255)

    assert share_right([distort(p) for p in images], captions) >= 0.98


@pytest.mark.parametrize(
    ("layout", "level"),
    [
        pytest.param("free", 1, marks=pytest.mark.slow),
        pytest.param(
            "free",
            3,
            marks=[
                pytest.mark.slow,
                pytest.mark.xfail(strict=True, reason="0.922: stars and triangles of four small objects are blurred too much"),
            ],
        ),
        ("quarters", 2),
    ],
)
@torch.no_grad()
def test_score_objects_reconstructions_of_bundled_vae(layout, level):
    images, captions = examples(layout, level)
    vae, _ = load_vae(EncoderSource("builtin"))
    decoded = []
    for start in range(0, COUNT, 100):
        pixels = to_tensor(torch.from_numpy(np.stack([np.asarray(p) for p in images[start : start + 100]])))
        decoded += to_images(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
    assert share_right(decoded, captions) >= 0.98


@KINDS
def test_score_objects_shuffled_captions(layout, level):
    images, captions = examples(layout, level)
    assert share_right(images, captions[1:] + captions[:1]) <= 0.05


def scene(*objects: Object) -> Scene:
    radii = tuple(0.2 if shown.size == "large" else 0.12 for shown in objects)
    return Scene(objects, ((0.3, 0.3), (0.7, 0.7))[: len(objects)], radii, "white")


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
def test_score_objects_finds_each_kind_of_mistake(caption, problem):
    result = score_objects(render(scene(RED, BLUE)), parse(caption))
    assert result.correct == (problem is None)
    assert problem is None or result.problem.startswith(problem)


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("a red circle in the top left corner and a blue star", ""),
        ("a red circle at the bottom right and a blue star", "right things, wrong places"),
        ("a red circle in the top right corner and a blue star", "right things, wrong places"),
        ("a blue star in the bottom right corner and a red circle", ""),
    ],
)
def test_score_objects_corners(caption, problem):
    corners = Scene((RED, BLUE), ((0.2, 0.2), (0.75, 0.75)), (0.14, 0.21), "white")
    assert score_objects(render(corners), parse(caption)).problem == problem


@pytest.mark.parametrize(
    ("middle", "problem"),
    [((0.5, 0.5), ""), ((0.5, 0.2), "right things, wrong places"), ((0.8, 0.2), "right things, wrong places")],
)
def test_score_objects_between(middle, problem):
    heart, cross = Object("teal", "heart", "small"), Object("pink", "cross", "small")
    shown = Scene((RED, heart, cross), (middle, (0.18, 0.5), (0.82, 0.55)), (0.13, 0.13, 0.13), "black")
    caption = "a red circle between a teal heart and a pink cross"
    assert score_objects(render(shown), parse(caption)).problem == problem


def large(colour: str, shape: str) -> np.ndarray:
    return np.asarray(render(Scene((Object(colour, shape, "large"),), ((0.5, 0.5),), (0.2,), "white"))).copy()


@pytest.mark.parametrize(("colour", "shape"), [("blue", "star"), ("pink", "square"), ("red", "circle"), ("teal", "heart")])
def test_score_objects_rejects_damaged_objects(colour, shape):
    caption = parse(f"a {colour} {shape}")
    pixels = large(colour, shape)
    assert score_objects(pixels, caption).correct

    half = pixels.copy()
    half[:, :32] = pixels[:, :1]
    assert not score_objects(half, caption).correct

    squashed = np.broadcast_to(pixels[:, :1], pixels.shape).copy()
    squashed[:48] = np.asarray(Image.fromarray(pixels).resize((64, 48)))
    assert not score_objects(squashed, caption).correct

    two_colours = pixels.copy()
    other = large("orange", shape)
    two_colours[:32] = other[:32]
    assert not score_objects(two_colours, caption).correct


def test_score_objects_rejects_three_quarters_of_a_square():
    pixels = large("green", "square")
    pixels[:, : round(64 * (0.32 + 0.09))] = pixels[:, :1]
    assert not score_objects(pixels, parse("a green square")).correct


def test_detect_empty_image():
    assert detect(np.full((64, 64, 3), 250, np.uint8)).objects == ()


def test_score_objects_noise():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not score_objects(noise, parse("a red circle")).correct


def test_score_objects_larger_image():
    assert score_objects(render(scene(RED, BLUE), 128), parse("a small red circle above a large blue star on white")).correct
