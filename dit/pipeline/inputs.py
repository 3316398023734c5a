"""Check what a call of the pipeline is given, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from dit.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def latent_shape(count: int, height: Any, width: Any, factor: int, patch_size: int, channels: int) -> tuple[int, int, int, int]:
    """Return the shape of the latents of `count` images of `height` x `width` pixels; a latent has `factor` pixels a side.

    Raises:
        UserError: a size is unknown, or the patches do not fill it.
    """
    if height is None or width is None:
        raise UserError("height, width: this pipeline does not know the size of its training; give both, or image_size to it")
    if not (isinstance(height, Integral) and isinstance(width, Integral)):
        raise UserError(f"height, width: {height!r} x {width!r} are not numbers of pixels; other arguments need their names")
    cell = factor * patch_size
    if height % cell or width % cell or min(height, width) < 1:
        raise UserError(f"height and width must be multiples of {cell}, not {height} x {width}")
    return count, channels, int(height) // factor, int(width) // factor


def check_inputs(
    shape: tuple[int, ...],
    num_inference_steps: int,
    guidance_rescale: float,
    guidance_interval: tuple[float, float],
    generators: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
) -> None:
    """Raise a `UserError` for the first argument that is impossible where the latents are of `shape` (N, C, h, w)."""
    count, (low, high) = shape[0], guidance_interval
    problems = {
        f"num_images_per_prompt: {count} images cannot be generated; 1 or more would be right": count < 1,
        f"num_inference_steps: {num_inference_steps} is not a positive number": num_inference_steps < 1,
        f"guidance_rescale: {guidance_rescale} is not between 0 and 1": not 0 <= guidance_rescale <= 1,
        f"guidance_interval: {guidance_interval} does not rise from 0 to 1": not 0 <= low <= high <= 1,
        f"generator: a list needs one for each of {count} images": isinstance(generators, list) and len(generators) != count,
        f"latents: must be of shape {shape}": latents is not None and tuple(latents.shape) != shape,
        f"output_type: {output_type!r}; one of {', '.join(OUTPUT_TYPES)} would be right": output_type not in OUTPUT_TYPES,
    }
    problem = next((text for text, wrong in problems.items() if wrong), None)
    if problem:
        raise UserError(problem)


def callback_tensors(callback: Any, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return which tensors `callback` is given: `names`, or those that one of `diffusers.callbacks` asks for itself.

    Raises:
        UserError: one is not among `known`.
    """
    chosen = list(getattr(callback, "tensor_inputs", names))
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r} cannot be given; {', '.join(known)} can")
    return chosen
