"""Change an image rather than generate a new one: image-to-image and inpainting.

Image-to-image begins part of the way, at the image with noise on it (SDEdit: Meng et al. 2022, arXiv:2108.01073).
Inpainting puts the noisy original back outside the mask after every step (RePaint: Lugmayr et al. 2022, arXiv:2201.09865,
equation 8, without its resampling).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image

from dit.dataset.rgb import is_transparent, to_8bit, to_rgb, turn_upright
from dit.errors import UserError, one_line
from dit.pipeline.schedulers import timesteps_to_sigmas
from dit.pipeline.seam import hide_seam
from dit.utils.autoencoder import encode_image, vae_factor
from dit.utils.images import lies_over

if TYPE_CHECKING:
    from dit.utils.autoencoder import Autoencoder

ROUNDING = 0.01  # what a resize with overshoot or a conversion to bf16 may leave outside [0, 1]


@dataclass(frozen=True)
class SourceImage:
    """The image that each of N generated ones starts from.

    Attributes:
        pixels: (N, 3, H, W) float32 in [-1, 1].
        latents: (N, C, h, w), of the VAE.
        noise: (N, C, h, w), what the latents are mixed with.
        mask: (N, 1, H, W), 1 where pixels change and 0 elsewhere; None where all do.
        latent_mask: (N, 1, h, w), the same of latents.
    """

    pixels: torch.Tensor
    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None

    @classmethod
    def prepare(
        cls,
        vae: Autoencoder,
        image_processor: VaeImageProcessor,
        mask_processor: VaeImageProcessor,
        image: PipelineImageInput,
        mask_image: PipelineImageInput | None,
        noise: torch.Tensor,
        prompts: int,
        times: int,
    ) -> SourceImage:
        """Preprocess what a call of the pipeline is given, for `times` images of each of the `prompts`.

        Raises:
            UserError: an argument is no image, or there are too few or too many.
        """
        factor = vae_factor(vae.config)
        size = (noise.shape[2] * factor, noise.shape[3] * factor)
        pixels = _preprocess("image", image_processor, 3, image, size, prompts, times).to(noise.device)
        latents = encode_image(vae, pixels)
        if mask_image is None:
            return cls(pixels, latents, noise)
        mask = _preprocess("mask_image", mask_processor, 1, mask_image, size, prompts, times).to(noise.device)
        return cls(pixels, latents, noise, mask, latent_mask(mask, factor))

    def add_noise(self, scheduler: SchedulerMixin, k: int) -> torch.Tensor:
        """Return the latents with as much noise as `scheduler` expects before its step `k`."""
        return add_noise(scheduler, self.latents, self.noise, k)

    def restore_latents(self, scheduler: SchedulerMixin, latents: torch.Tensor, k: int) -> torch.Tensor:
        """Return `latents` with the noisy original outside the mask, as before step `k`."""
        if self.latent_mask is None:
            return latents
        return torch.where(self.latent_mask > 0, latents, self.add_noise(scheduler, k))

    def restore_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return `pixels` (N, 3, H, W) with those of the original outside the mask, and no seam between them."""
        if self.mask is None:
            return pixels
        return torch.where(self.mask > 0, hide_seam(pixels, self.pixels, self.mask), self.pixels)


def check_source(image: Any, mask_image: Any, strength: float) -> None:
    """Raise a `UserError` where the arguments of a call that change an image do not fit each other."""
    if not 0 <= strength <= 1:
        raise UserError(f"strength: {strength} is not between 0 and 1")
    if image is None:
        if mask_image is not None or strength < 1:
            raise UserError("strength, mask_image: they need an image to change")
        return
    (width, height), (mask_width, mask_height) = side_lengths(image), side_lengths(mask_image)
    if mask_image is not None and not lies_over((width, height), (mask_width, mask_height)):
        raise UserError(f"mask_image: {mask_width} x {mask_height} pixels do not lie over the image's {width} x {height}")


def side_lengths(images: Any) -> tuple[int, int]:
    """Return width and height of what diffusers takes for an image, or of the first of several; (0, 0) of anything else.

    That is a PIL image, a numpy array (…, H, W, C) or (H, W), or a tensor (…, H, W).
    """
    if isinstance(images, (list, tuple)) and images:
        return side_lengths(images[0])
    if isinstance(images, Image.Image):
        return turn_upright(images).size
    if isinstance(images, np.ndarray) and images.ndim > 1:
        height, width = images.shape[-3:-1] if images.ndim > 2 else images.shape
        return width, height
    if isinstance(images, torch.Tensor) and images.ndim > 1:
        return images.shape[-1], images.shape[-2]
    return 0, 0


def get_timesteps(scheduler: SchedulerMixin, strength: float) -> int:
    """Return the first of `scheduler.timesteps` whose noise level is at most `strength` in [0, 1]; their number if there is none.

    Levels are those of the training, 1 is pure noise: so `strength` means the same with every scheduler and step count.
    """
    sigmas = timesteps_to_sigmas(scheduler)
    for k in range(0, len(sigmas), scheduler.order):  # a step of order 2 has two timesteps, and begins at its first
        if sigmas[k] <= strength + 1e-6:
            return k
    return len(sigmas)


def add_noise(scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, k: int) -> torch.Tensor:
    """Return `latents` (N, C, h, w) with as much of `noise` as `scheduler` expects before its step `k`; none after the last."""
    if k == len(scheduler.timesteps):
        return latents
    timestep = scheduler.timesteps[k : k + 1]
    if hasattr(scheduler, "scale_noise"):  # of a flow
        return scheduler.scale_noise(latents, timestep, noise)
    return scheduler.add_noise(latents, noise, timestep)


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Return which latents change: (N, 1, H / factor, W / factor), 1 where any pixel of `mask` (N, 1, H, W) is 1."""
    return F.max_pool2d(mask, factor)


def _standardise(name: str, image: Any, channels: int, size: tuple[int, int], factor: int) -> Image.Image | torch.Tensor:
    """Convert what diffusers takes for an image or a batch, so that its values mean what they mean in training.

    Args:
        name: of the argument.
        image: PIL image, numpy array (H, W), (H, W, C) or (N, H, W, C), or tensor (H, W), (C, H, W) or (N, C, H, W); a mask as a
            tensor (N, H, W), too.
        channels: 3 for an image, where C may be 1 to 4 (grey, grey and alpha, RGB, RGB and alpha), 1 for a mask.
        size: (H, W) of the result, for the message.
        factor: pixels of a latent's side.

    Returns:
        A PIL image, RGB or L, or a tensor (N, channels, H, W) float32 in [0, 1]; white where it was transparent.
    """
    if isinstance(image, Image.Image) and image.mode != "F":
        image = turn_upright(image)
        if channels == 3:
            return to_rgb(image)
        if is_transparent(image):
            raise UserError(
                f"{name}: transparent in places, which may mean either; put it on a background, white where it changes"
            )
        return to_8bit(image).convert("L")
    values: Any = np.asarray(image) if isinstance(image, Image.Image) else image
    is_tensor = isinstance(values, torch.Tensor)
    shape = tuple(values.shape)
    is_latents = is_tensor and values.is_floating_point() and len(shape) > 2 and shape[-3] >= 4
    is_latents &= shape[-2:] == (size[0] // factor, size[1] // factor)
    if is_tensor:
        values = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
        if len(shape) > 2 + (channels == 1):
            values = np.moveaxis(values, -3, -1)
    if len(shape) == 2 or (is_tensor and channels == 1 and len(shape) == 3):
        values = values[..., None]
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[-1] not in ((1, 2, 3, 4) if channels == 3 else (1,)) or is_latents:
        raise UserError(
            f"{name}: {shape} are no images of {channels} x {size[0]} x {size[1]}; an array has its channels last, a tensor first"
        )
    pixels = torch.from_numpy(_to_unit_interval(name, values, is_mask=channels == 1)).permute(0, 3, 1, 2)
    if pixels.shape[1] in (2, 4):
        pixels, alpha = pixels[:, :-1], pixels[:, -1:]
        pixels = pixels * alpha + (1 - alpha)
    return pixels.expand(-1, channels, -1, -1)


def _to_unit_interval(name: str, values: np.ndarray, is_mask: bool) -> np.ndarray:
    """Return `values` as float32 in [0, 1]: floats are there already, integers are 0 to 255, those of uint16 0 to 65,535.

    A mask of integers may also consist of 0 and 1.

    Raises:
        UserError: they are not in that range.
    """
    kind, largest = values.dtype.kind, 1
    if kind in "iu" and not (is_mask and values.max() <= 1):
        largest = np.iinfo(np.uint16).max if values.dtype == np.uint16 else np.iinfo(np.uint8).max
    low, high = values.min(), values.max()
    slack = ROUNDING if kind == "f" else 0
    if kind not in "biuf" or not (low >= -slack and high <= largest + slack):  # nor are NaNs
        raise UserError(
            f"{name}: {values.dtype} from {low:g} to {high:g}; floats from 0 to 1, or uint8 from 0 to 255, would be right"
        )
    return (values.astype(np.float32) / np.float32(largest)).clip(0, 1)


def _preprocess(
    name: str, processor: VaeImageProcessor, channels: int, images: Any, size: tuple[int, int], prompts: int, times: int
) -> torch.Tensor:
    """Return the argument `name` as (N, channels, H, W) float32, one for each generated image; `size` is (H, W)."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    try:
        parts = [_standardise(name, image, channels, size, processor.config.vae_scale_factor) for image in images]
        pixels = torch.cat([processor.preprocess(part, *size, resize_mode="crop") for part in parts])
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, ArithmeticError, OSError, SyntaxError) as error:
        raise UserError(f"{name}: not an image, nor several ({one_line(error)})") from None
    if len(pixels) not in (1, prompts):
        raise UserError(f"{name}: {len(pixels)} are given; one for all, or one for each of {prompts} prompts, would be right")
    return pixels.to(torch.float32).repeat_interleave(times * (prompts if len(pixels) == 1 else 1), 0)
