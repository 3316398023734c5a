"""What the sample stage does: choose the prompts of the evaluation, generate their images, and grids that show them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.config import GRID_PROMPTS, Sample
from dit.dataset.aspect_ratios import Size, nearest_size
from dit.dataset.decode import read_named_size
from dit.dataset.reader import Entry, read_metadata, read_source
from dit.dataset.storage import StoredImages
from dit.model.transformer import forward_flops
from dit.pipeline.generate import generate_images, load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.shapes.prompts import unseen_prompts
from dit.shapes.scene import Kind
from dit.utils.autoencoder import decode_latents
from dit.utils.files import write_json
from dit.utils.hardware import matmul_peak
from dit.utils.images import grid, labelled_grid, to_images

SHOWN, COLUMNS = 24, 6  # images in a grid
REPEATED, TIMES = 20, 5  # prompts with several images, and how many: how much do they differ?


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the image to generate for it.

    Attributes:
        file: name of the image.
        text: the caption.
        seed: of its noise.
        group: "val" for a caption of the validation set, "unseen" for one with a colour and shape never seen together,
            "diversity" for one of several images of the same caption, "own" for one of `sample.prompts`.
        size: width and height in pixels; None for the pipeline's default.
    """

    file: str
    text: str
    seed: int
    group: str
    size: Size | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what prompts.json holds of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def choose_prompts(raw: Path, recipe: str, settings: Sample, sizes: Sequence[Sequence[int]] | None = None) -> list[Prompt]:
    """Choose `num_samples` prompts, and some more in groups of their own.

    They are the first caption of each validation image and, of the recipe `shapes`, as many prompts again with unseen pairs. Then
    come some captions several times each, spread over the validation set, and `prompts`.

    Where the model was trained on several `sizes`, as its model_index.json lists them, a caption of the validation set gets the
    one that its image has.
    """
    held_out: dict[str, Entry] = {}
    for entry in read_metadata(raw):
        if entry.split == "val":
            held_out.setdefault(entry.image, entry)
    entries = list(held_out.values())
    unseen: list[str] = []
    if recipe == "shapes":
        source = read_source(raw)
        unseen = unseen_prompts(settings.num_samples // 2, settings.seed, Kind(source["layout"], source["level"]))
    stored, trained = StoredImages(raw), [(width, height) for width, height in sizes or ()]

    def known(entry: Entry, group: str) -> tuple[str, Size | None, str]:
        return entry.text, _size_of(entry, stored, trained), group

    spread = np.unique(np.linspace(0, len(entries) - 1, REPEATED).round().astype(int))
    texts = [known(entry, "val") for entry in entries[: settings.num_samples - len(unseen)]]
    texts += [(text, None, "unseen") for text in unseen]
    texts += [chosen for k in spread for chosen in [known(entries[k], "diversity")] * TIMES]
    texts += [(text, None, "own") for text in settings.prompts]
    return [Prompt(f"{k:05d}.png", text, settings.seed + k, group, size) for k, (text, size, group) in enumerate(texts)]


def _size_of(entry: Entry, stored: StoredImages, sizes: list[Size]) -> Size | None:
    if not sizes:
        return None
    found = read_named_size(stored.read(entry.stored), stored.folder / entry.stored)
    return sizes[nearest_size(found, sizes)]


def sample(model: Path, prompts: list[Prompt], settings: Sample, images: Path, grids: Path) -> dict[str, float]:
    """Generate an image for every prompt into `images`, with `prompts.json` beside them, and grids of them into `grids`.

    Returns:
        `sampling_seconds`, without loading and writing; `sampling_images_per_second`; and `sampling_mfu`: the share of the
        hardware's matrix-product peak that the transformer's operations make of that time, [0, 1].
    """
    pipeline = load_pipeline(model, settings.scheduler)
    images.mkdir(parents=True, exist_ok=True)
    grids.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[tuple[Image.Image, str]]] = {}
    seconds, began = 0.0, time.perf_counter()
    for prompt, image in sample_prompts(pipeline, prompts, settings):
        seconds += time.perf_counter() - began
        image.save(images / prompt.file)
        pairs = shown.setdefault(prompt.group, [])
        if len(pairs) < (TIMES**2 if prompt.group == "diversity" else SHOWN):
            pairs.append((image, prompt.text))
        began = time.perf_counter()
    write_json(images / "prompts.json", [prompt.to_dict() for prompt in prompts])
    for group, pairs in shown.items():
        columns = TIMES if group == "diversity" else COLUMNS
        samples, labels = zip(*pairs, strict=True)
        labelled_grid(samples, labels, columns=min(columns, len(pairs))).save(grids / f"{group}.png")
    chosen = [*(prompt for prompt in prompts if prompt.group == "own"), *prompts][:GRID_PROMPTS]
    settings_grid(pipeline, chosen, settings.grid_guidance_scales, settings.grid_steps).save(grids / "settings.png")
    denoising_strip(pipeline, chosen, settings.num_inference_steps, settings.guidance_scale).save(grids / "denoising.png")
    flops = len(prompts) * sampling_flops(pipeline, settings.num_inference_steps, settings.guidance_scale)
    peak = matmul_peak(pipeline.device, pipeline.transformer.dtype)
    return {
        "sampling_seconds": round(seconds, 2),
        "sampling_images_per_second": round(len(prompts) / seconds, 2),
        "sampling_mfu": round(flops / seconds / peak, 4),
    }


def sample_prompts(
    pipeline: DiTTextToImagePipeline, prompts: Sequence[Prompt], settings: Sample
) -> Iterator[tuple[Prompt, Image.Image]]:
    """Yield each of `prompts` with its image, size after size, in batches of `settings.batch_size`, under a progress bar."""
    how = (settings.num_inference_steps, settings.guidance_scale, settings.batch_size)
    with tqdm(total=len(prompts), desc="sample", unit="image") as progress:
        for size in dict.fromkeys(prompt.size for prompt in prompts):
            own = [prompt for prompt in prompts if prompt.size == size]
            width, height = size or (None, None)
            for pair in zip(own, generate_prompts(pipeline, own, *how, width=width, height=height), strict=True):
                progress.update()
                yield pair


def generate_prompts(
    pipeline: DiTTextToImagePipeline,
    prompts: Sequence[Prompt],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
    **settings: Any,
) -> Iterator[Image.Image]:
    """Yield the image of each of `prompts`, by default all in one batch; `settings` are as of `generate_images`."""
    how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **settings}
    texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
    return generate_images(pipeline, texts, seeds, batch_size or len(prompts), **how)


def sampling_flops(pipeline: DiTTextToImagePipeline, steps: int, guidance_scale: float) -> int:
    """Count the transformer's operations for one image of `image_size` squared, without the keys and values of the text."""
    side = pipeline.config.image_size // pipeline.vae_scale_factor
    return steps * (2 if guidance_scale > 1 else 1) * forward_flops(pipeline.transformer, (side, side), 0)


MOMENTS = 8  # images in a row of the strip
CELL = 384  # pixels of a cell in the grid of settings; four images of 64 pixels are enlarged to twice their size


def settings_grid(
    pipeline: DiTTextToImagePipeline, prompts: Sequence[Prompt], guidance_scales: Sequence[float], steps: Sequence[int]
) -> Image.Image:
    """Return a row for each guidance scale, a column for each number of steps; in each cell the same one to four prompts."""
    cells, labels = [], []
    for scale in guidance_scales:
        for count in steps:
            images = list(generate_prompts(pipeline, prompts, count, scale))
            cells.append(grid(images, columns=2 if len(prompts) > 1 else 1, gap=2))
            labels.append(f"guidance {scale:g}, {count} steps")
    return labelled_grid(cells, labels, columns=len(steps), cell=CELL)


@torch.no_grad()
def denoising_strip(
    pipeline: DiTTextToImagePipeline, prompts: Sequence[Prompt], steps: int, guidance_scale: float
) -> Image.Image:
    """Return a row for each of `prompts`: the latents as the VAE decodes them, from noise to image, at up to `MOMENTS` steps."""
    seen: list[tuple[float, torch.Tensor]] = []

    def watch(pipeline: DiTTextToImagePipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        seen.append((float(timestep) / pipeline.scheduler.config.num_train_timesteps, tensors["latents"]))
        return {}

    list(generate_prompts(pipeline, prompts, steps, guidance_scale, output_type="latent", callback_on_step_end=watch))
    # A callback sees the latents after a step; its noise level is that of the next one, and 0 after the last.
    levels = [*(level for level, _ in seen[1:]), 0.0]
    chosen = np.unique(np.linspace(0, len(seen) - 1, MOMENTS).round().astype(int))
    columns = [to_images(decode_latents(pipeline.vae, seen[k][1])) for k in chosen]
    images = [column[row] for row in range(len(prompts)) for column in columns]
    labels = [prompt.text if k == chosen[-1] else f"step {k + 1}, noise {levels[k]:.2f}" for prompt in prompts for k in chosen]
    return labelled_grid(images, labels, columns=len(chosen), cell=128)
