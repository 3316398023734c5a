"""Which prompts a model is judged on, and the images it draws for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.config import GRID_PROMPTS, Sample
from dit.dataset.reader import read_metadata
from dit.encoders.vae import decode_latents
from dit.model.transformer import forward_flops
from dit.pipeline.generate import generate_batch, load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.shapes.prompts import unseen_prompts
from dit.utils.files import write_json
from dit.utils.hardware import matmul_peak
from dit.utils.images import grid, labelled_grid, to_images

SHOWN, COLUMNS = 24, 6  # images in a grid
REPEATED, TIMES = 20, 5  # prompts that are drawn again and again, and how often: how much do their images differ?


@dataclass(frozen=True)
class Prompt:
    """One image to draw.

    Attributes:
        file: name of the image.
        text: the caption.
        seed: of its noise.
        group: "val" for a caption of the validation set, "unseen" for one with a colour and shape never seen together,
            "diversity" for one of several images of the same caption, "own" for one of `sample.prompts`.
    """

    file: str
    text: str
    seed: int
    group: str


def choose_prompts(raw: Path, recipe: str, settings: Sample) -> list[Prompt]:
    """Choose `num_samples` prompts, and some more in groups of their own.

    They are the first caption of each validation image and, of the recipe `shapes`, as many prompts again with unseen pairs. Then
    come some captions several times each, spread over the validation set, and `prompts`.
    """
    captions: dict[str, str] = {}
    for entry in read_metadata(raw):
        if entry.split == "val":
            captions.setdefault(entry.image, entry.text)
    known = list(captions.values())
    unseen = unseen_prompts(settings.num_samples // 2, settings.seed) if recipe == "shapes" else []
    spread = np.unique(np.linspace(0, len(known) - 1, REPEATED).round().astype(int))
    texts = [(text, "val") for text in known[: settings.num_samples - len(unseen)]]
    texts += [(text, "unseen") for text in unseen]
    texts += [(known[k], "diversity") for k in spread for _ in range(TIMES)]
    texts += [(text, "own") for text in settings.prompts]
    return [Prompt(f"{k:05d}.png", text, settings.seed + k, group) for k, (text, group) in enumerate(texts)]


def sample(model: Path, prompts: list[Prompt], settings: Sample, images: Path, grids: Path) -> dict[str, float]:
    """Draw every prompt into `images`, with `prompts.json` beside the images, and grids of them into `grids`.

    Returns:
        `sampling_seconds` of drawing alone, `sampling_images_per_second`, and `sampling_mfu`: the share of the hardware's
        matrix-product peak that the transformer's operations make of that time, [0, 1].
    """
    pipeline = load_pipeline(model, settings.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images.mkdir(parents=True, exist_ok=True)
    grids.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[tuple[Image.Image, str]]] = {}
    seconds = 0.0
    for chunk, pictures, took in draw_prompts(pipeline, prompts, settings):
        seconds += took
        for prompt, picture in zip(chunk, pictures, strict=True):
            picture.save(images / prompt.file)
            shown.setdefault(prompt.group, [])
            if len(shown[prompt.group]) < (TIMES**2 if prompt.group == "diversity" else SHOWN):
                shown[prompt.group].append((picture, prompt.text))
    write_json(images / "prompts.json", [asdict(prompt) for prompt in prompts])
    for group, pairs in shown.items():
        columns = TIMES if group == "diversity" else COLUMNS
        samples, labels = zip(*pairs, strict=True)
        labelled_grid(samples, labels, columns=min(columns, len(pairs))).save(grids / f"{group}.png")
    chosen = [*(prompt for prompt in prompts if prompt.group == "own"), *prompts][:GRID_PROMPTS]
    settings_grid(pipeline, chosen, settings.grid_guidance_scales, settings.grid_steps, draw_batch).save(grids / "settings.png")
    denoising_strip(pipeline, chosen, settings.num_inference_steps, settings.guidance_scale).save(grids / "denoising.png")
    flops = len(prompts) * sampling_flops(pipeline, settings.num_inference_steps, settings.guidance_scale)
    peak = matmul_peak(pipeline.device, pipeline.transformer.dtype)
    return {
        "sampling_seconds": round(seconds, 2),
        "sampling_images_per_second": round(len(prompts) / seconds, 2),
        "sampling_mfu": round(flops / seconds / peak, 4),
    }


def draw_prompts(
    pipeline: DiTTextToImagePipeline, prompts: list[Prompt], settings: Sample
) -> Iterator[tuple[list[Prompt], list[Image.Image], float]]:
    """Draw `prompts`, `settings.batch_size` at a time; yields each batch, its images, and the seconds that they took."""
    with tqdm(total=len(prompts), desc="sample", unit="image") as progress:
        for start in range(0, len(prompts), settings.batch_size):
            chunk = prompts[start : start + settings.batch_size]
            began = time.perf_counter()
            pictures = draw_batch(pipeline, chunk, settings.num_inference_steps, settings.guidance_scale)
            yield chunk, pictures, time.perf_counter() - began
            progress.update(len(chunk))


def draw_batch(pipeline: DiTTextToImagePipeline, prompts: list[Prompt], steps: int, guidance_scale: float) -> list[Image.Image]:
    """Generate an image for each of `prompts`, each from its own seed."""
    texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
    return generate_batch(pipeline, texts, seeds, num_inference_steps=steps, guidance_scale=guidance_scale)


def sampling_flops(pipeline: DiTTextToImagePipeline, steps: int, guidance_scale: float) -> int:
    """Operations of the transformer for one image of the default size; the text's keys and values, once, are left out."""
    side = pipeline.config.image_size // pipeline.vae_scale_factor
    return steps * (2 if guidance_scale > 1 else 1) * forward_flops(pipeline.transformer, (side, side), 0)


MOMENTS = 8  # images in a row of the strip
CELL = 384  # pixels of a cell in the grid of settings; four images of 64 pixels are enlarged to twice their size


def settings_grid(
    pipeline: DiTTextToImagePipeline, prompts: Sequence, guidance_scales: Sequence[float], steps: Sequence[int], draw: Callable
) -> Image.Image:
    """Return a row for each guidance scale, a column for each number of steps; in each cell the same prompts from the same seeds.

    Args:
        pipeline: draws with the scheduler that it has.
        prompts: one to four, as `dit.pipeline.sampling.Prompt`.
        guidance_scales, steps: what is tried.
        draw: (pipeline, prompts, steps, guidance scale) to images.
    """
    cells, labels = [], []
    for scale in guidance_scales:
        for count in steps:
            cells.append(grid(draw(pipeline, prompts, count, scale), columns=2 if len(prompts) > 1 else 1, gap=2))
            labels.append(f"guidance {scale:g}, {count} steps")
    return labelled_grid(cells, labels, columns=len(steps), cell=CELL)


@torch.no_grad()
def denoising_strip(pipeline: DiTTextToImagePipeline, prompts: Sequence, steps: int, guidance_scale: float) -> Image.Image:
    """Return a row for each of `prompts`: the latents as the VAE decodes them, from noise to image, at up to `MOMENTS` steps."""
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
    labels = [prompt.text if k == chosen[-1] else f"step {k + 1}, noise {levels[k]:.2f}" for prompt in prompts for k in chosen]
    return labelled_grid(pictures, labels, columns=len(chosen), cell=128)
