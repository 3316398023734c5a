"""Load a trained model, and generate images for any number of prompts, in batches, each from its own seed."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dit.errors import memory_errors
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.utils.hardware import has_fast_bf16


def load_pipeline(folder: str | Path, scheduler: str | None = None) -> DiTTextToImagePipeline:
    """Load the pipeline as the sample stage and `dit generate` use it.

    On the GPU if there is one; the transformer in bf16 where that is fast, the encoders in fp32; with the scheduler of that name,
    or with the one that `from_pretrained` finds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    pipeline = DiTTextToImagePipeline.from_pretrained(folder, transformer_dtype=fast).to(device)
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.config.prediction_type)
    return pipeline


def generate_images(
    pipeline: DiTTextToImagePipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    progress: bool = False,
    **settings: Any,
) -> Generator[Image.Image, None, None]:
    """Yield an image for each of `prompts`, each from its own seed: an image does not depend on its neighbours.

    The batch size changes no more than how sums are rounded. The noise is the same on every machine: it comes from the CPU.

    Args:
        pipeline: the model; its own progress bar and its warnings of long prompts, of each batch again, are switched off.
        prompts: one for each image.
        seeds: one for each image.
        batch_size: the number of images that are generated at once.
        progress: whether a bar counts the steps.
        settings: other arguments of the pipeline's call, the same for all images.

    Raises:
        UserError: a setting is impossible, or the memory does not hold a batch.
    """
    pipeline.set_progress_bar_config(disable=True)
    bar: tqdm | None = None

    def advance(pipeline: DiTTextToImagePipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        nonlocal bar
        if bar is None:  # now the number of steps is known
            images = "1 image" if len(prompts) == 1 else f"{len(prompts)} images"
            bar = tqdm(total=len(prompts) * pipeline.num_timesteps, desc=f"generate {images}", unit=" steps", dynamic_ncols=True)
        bar.update(len(tensors["latents"]))  # steps of one image: the last batch may be smaller
        return {}

    if progress:
        settings["callback_on_step_end"] = advance
    try:
        for start in range(0, len(prompts), batch_size):
            batch = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            with _quiet(logging.getLogger("dit.pipeline.pipeline")), memory_errors(_fewer(len(batch))):
                (images,) = pipeline(batch, generator=generators, return_dict=False, **settings)
            if bar is not None and start + len(batch) == len(prompts):
                bar.close()  # before the last images are handed on, so that their names are not printed over it
            yield from images
    finally:
        if bar is not None:
            bar.close()


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fewer(count: int) -> str:
    """Advise what to do where the memory does not hold `count` images at once."""
    if count == 1:
        return "a smaller height and width may fit"
    return f"{count} images at once are too many, {count // 2} may fit: --batch_size, in params.yaml sample.batch_size"
