"""Two pictures that say what the sampler does: what guidance and the number of steps change, and how a picture comes about."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from dit.editing import decode_latents
from dit.images import grid, labelled_grid, to_images
from dit.pipeline import DiTTextToImagePipeline

MOMENTS = 8  # pictures in a row of the strip
CELL = 384  # pixels of a cell in the grid of settings; four pictures of 64 pixels are enlarged to twice their size


def settings_grid(
    pipeline: DiTTextToImagePipeline, prompts: Sequence, guidance_scales: Sequence[float], steps: Sequence[int], draw: Callable
) -> Image.Image:
    """A row for each guidance scale, a column for each number of steps; in each cell the same prompts from the same seeds.

    Args:
        pipeline: draws with the scheduler that it has.
        prompts: one to four, as `dit.sampling.Prompt`.
        guidance_scales, steps: what is tried.
        draw: (pipeline, prompts, steps, guidance scale) to pictures.
    """
    cells, labels = [], []
    for scale in guidance_scales:
        for count in steps:
            cells.append(grid(draw(pipeline, prompts, count, scale), columns=2 if len(prompts) > 1 else 1, gap=2))
            labels.append(f"guidance {scale:g}, {count} steps")
    return labelled_grid(cells, labels, columns=len(steps), cell=CELL)


@torch.no_grad()
def denoising_strip(pipeline: DiTTextToImagePipeline, prompts: Sequence, steps: int, guidance_scale: float) -> Image.Image:
    """A row for each of `prompts`: the latents as the VAE decodes them, from noise to picture, at up to `MOMENTS` steps."""
    seen: list[tuple[float, torch.Tensor]] = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((float(timestep) / pipeline.scheduler.config.num_train_timesteps, tensors["latents"]))
        return {}

    pipeline(
        [prompt.text for prompt in prompts],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(prompt.seed) for prompt in prompts],
        output_type="latent",
        callback_on_step_end=watch,
    )
    # A callback sees the latents after a step; its noise level is that of the next one, and 0 after the last.
    levels = [*(level for level, _ in seen[1:]), 0.0]
    chosen = np.unique(np.linspace(0, len(seen) - 1, MOMENTS).round().astype(int))
    columns = [to_images(decode_latents(pipeline.vae, seen[k][1])) for k in chosen]
    pictures = [column[row] for row in range(len(prompts)) for column in columns]
    labels = [
        prompt.text if k == chosen[-1] else f"step {k + 1}, noise {levels[k]:.2f}" for prompt in prompts for k in chosen
    ]
    return labelled_grid(pictures, labels, columns=len(chosen), cell=128)
