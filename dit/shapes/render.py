"""Render scenes: outlines of the shapes, coverage masks, pixels."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from dit.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Point, Scene

SHADING = 0.07  # brightness runs from +7 % at the top to -7 % at the bottom, of the background and of each shape
SUPERSAMPLING = 4


def outline(shape: str, turn: float = 0.0) -> np.ndarray:
    """Return the polygon of `shape`, turned clockwise by `turn` degrees: (K, 2), y downwards.

    It is centred in the box from -1 to 1, and its larger side fills it.
    """
    angle = math.radians(turn)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    points = _points(shape) @ rotation
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * 2 / (high - low).max()


@lru_cache
def _points(shape: str) -> np.ndarray:
    """Return the polygon of `shape`, upright, of any size: (K, 2), y downwards."""
    if shape == "circle":
        turns = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return np.stack([np.cos(turns), np.sin(turns)], axis=1)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        return np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
    if shape == "star":
        turns, radii = math.pi * (np.arange(10) / 5 - 0.5), np.array([1.0, 0.45] * 5)
        return np.stack([radii * np.cos(turns), radii * np.sin(turns)], axis=1)
    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        return np.stack([16 * np.sin(turns) ** 3 / 16, -y / 15], axis=1)
    if shape == "cross":
        w = 0.34
        corners = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        return np.array(corners)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render_mask(shape: str, centre: Point, radius: float, image_size: int, turn: float = 0.0) -> np.ndarray:
    """Render how much of each pixel `shape` covers: (image_size, image_size) float32 in [0, 1], antialiased."""
    big = image_size * SUPERSAMPLING
    canvas = Image.new("L", (big, big))
    points = (np.array(centre) + outline(shape, turn) * radius) * big
    ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points.tolist()], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def render(scene: Scene, image_size: int = 64) -> Image.Image:
    """Render `scene` as an RGB image of `image_size` pixels square."""
    slope = np.linspace(1 + SHADING, 1 - SHADING, image_size, dtype=np.float32)[:, None]  # (H, 1)
    down = np.linspace(0, 1, image_size, dtype=np.float32)[:, None]
    top, bottom = np.array(BACKGROUNDS[scene.background], np.float32)
    background = slope * (top + down * (bottom - top))  # (H, 3)
    pixels = np.broadcast_to(background[:, None], (image_size, image_size, 3)).copy()
    rows = (np.arange(image_size, dtype=np.float32) + 0.5)[:, None, None] / image_size
    drawn = zip(scene.objects, scene.positions, scene.radii, scene.turns, strict=True)
    for shown, centre, radius, turn in drawn:
        cover = render_mask(shown.shape, centre, radius, image_size, turn)[:, :, None]
        shade = 1 - SHADING * np.clip((rows - centre[1]) / radius, -1, 1)
        pixels += cover * (shade * np.array(COLOURS[shown.colour], np.float32) - pixels)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
