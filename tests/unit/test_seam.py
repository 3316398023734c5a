"""The border of a mask: between what the VAE decodes inside and the original pixels outside."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dit.encoders.loading import EncoderSource, load_vae
from dit.pipeline.img2img import SourceImage, latent_mask
from dit.pipeline.seam import hide_seam
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Description, Object, Scene
from dit.utils.autoencoder import decode_latents, encode_image
from dit.utils.images import to_tensor

COUNT = 16  # scenes; the figures in docs/generation.md are of 60
LEVELS = 127.5  # grey levels of a difference of 1


def without_first(scene: Scene) -> Scene:
    count = len(scene.objects)
    values = {name: getattr(scene, name) for name in scene.__dataclass_fields__}
    return replace(scene, **{name: v[1:] for name, v in values.items() if isinstance(v, tuple) and len(v) == count})


@cache
@torch.no_grad()
def encoded(layout: str, case: str) -> tuple[AutoencoderKL, list[torch.Tensor], list[torch.Tensor]]:
    """Scenes, and what a model would make of them that fills the mask perfectly (another object, or none); latents of both."""
    vae = load_vae(EncoderSource("builtin"), torch.float32)[0]
    rng, originals, wanted = np.random.default_rng(1), [], []
    for _ in range(COUNT):
        scene = sample_scene(Description((Object("red", "circle"), Object("green", "heart"))), rng, layout)
        star = replace(scene, objects=(Object("blue", "star", scene.objects[0].size), *scene.objects[1:]))
        originals.append(np.asarray(render(scene)))
        wanted.append(np.asarray(render(star if case == "replaced" else without_first(scene))))
    images = [to_tensor(torch.from_numpy(np.stack(arrays))) for arrays in (originals, wanted)]
    return vae, images, [encode_image(vae, pixels) for pixels in images]


def changed(first: torch.Tensor, second: torch.Tensor, margin: int) -> torch.Tensor:
    """A mask over what differs, and `margin` pixels around it; fewer than 0 are pixels that are missing."""
    mask = ((first - second).abs().amax(1, keepdim=True) > 0.01).float()
    grown = F.max_pool2d(mask if margin > 0 else 1 - mask, 2 * abs(margin) + 1, 1, abs(margin))
    return grown if margin > 0 else 1 - grown


def seam(shown: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean difference, in grey levels, of the steps across the mask's border from those of the image that has no seam."""
    total, count = 0.0, 0.0
    for axis in (2, 3):
        steps = (image.diff(dim=axis) for image in (shown, wanted))
        border = mask.diff(dim=axis).abs()
        first, second = steps
        total += float(((first - second).abs().mean(1, keepdim=True) * border).sum())
        count += float(border.sum())
    return LEVELS * total / count


@torch.no_grad()
def measure(layout: str, case: str, margin: int) -> tuple[float, float]:
    """The seam of pixels that are put back as they are, and of `restore_pixels`."""
    vae, (original, other), (kept, new) = encoded(layout, case)
    mask = changed(original, other, margin)
    inside = latent_mask(mask, 8)
    latents = torch.where(inside > 0, new, kept)
    decoded = decode_latents(vae, latents)
    restored = SourceImage(original, latents, latents, mask, inside).restore_pixels(decoded)
    outside = (mask == 0).expand_as(restored)
    assert torch.equal(restored[outside], original[outside])
    wanted, plain = (torch.where(mask > 0, image, original) for image in (other, decoded))
    before, after = (seam(shown.clamp(-1, 1), wanted, mask) for shown in (plain, restored))
    return before, after


CASES = [
    ("replaced", 4, 0.5),
    ("removed", 4, 0.5),
    ("removed", 2, 0.5),
    ("removed", 1, 0.5),
    ("removed", 0, 0.85),
    ("removed", -1, 1.0),
]


@pytest.mark.parametrize("layout", ["quarters", "free"])
@pytest.mark.parametrize(("case", "margin", "at_most"), CASES)
def test_seam_is_smaller(layout, case, margin, at_most):
    """Where the mask leaves some pixels around an object, a fraction is left; where it cuts it, nothing of it comes back."""
    before, after = measure(layout, case, margin)
    print(f"\n{layout}, {case}, margin {margin}: {before:.2f} grey levels before, {after:.2f} after")
    assert after < at_most * before


def test_other_content_is_left_alone():
    """A red square under the mask, where the model generated green: nothing of the red comes back at the border."""
    red, green = torch.tensor([1.0, -1, -1]), torch.tensor([-1.0, 1, -1])
    original, generated = (colour[None, :, None, None].expand(1, 3, 32, 32) for colour in (red, green))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    assert torch.equal(hide_seam(generated, original, mask), generated)


def test_without_a_border_nothing_changes():
    generated, original = torch.rand(2, 1, 3, 16, 16)
    assert torch.equal(hide_seam(generated, original, torch.ones(1, 1, 16, 16)), generated)
    far = torch.zeros(1, 1, 16, 16)
    far[..., :8] = 1
    assert torch.equal(hide_seam(generated, original, far)[..., :4], generated[..., :4])
