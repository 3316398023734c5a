"""Generate images for any number of prompts, in batches, each from its own seed."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dit.errors import UserError
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.utils.hardware import has_fast_bf16


def generate_batch(
    pipeline: DiTTextToImagePipeline, prompts: list[str], seeds: Iterable[int], **settings: Any
) -> list[Image.Image]:
    """Generate an image for each of `prompts`, each from its own seed, in one batch.

    The generators are on the CPU, so that the noise is the same on every machine.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    (images,) = pipeline(prompts, generator=generators, return_dict=False, **settings)
    return list(images)


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


ALLOCATOR = "DefaultCPUAllocator"  # what a CPU's memory error names; its class is RuntimeError


def generate_images(
    pipeline: DiTTextToImagePipeline, prompts: list[str], seed: int, batch_size: int, **settings: Any
) -> Generator[Image.Image, None, None]:
    """Yield an image for each of `prompts`, prompt k from `seed` + k: an image does not depend on its neighbours.

    The batch size changes no more than how sums are rounded.

    Args:
        pipeline: what draws.
        prompts: one for each image.
        seed: of the first image.
        batch_size: how many are drawn at once.
        settings: what else the pipeline is called with, the same for all.

    Raises:
        UserError: a setting is impossible, or the memory does not hold a batch.
    """
    pipeline.set_progress_bar_config(disable=True)
    bar = None

    def advance(pipeline, step, timestep, tensors) -> dict:
        nonlocal bar
        if bar is None:  # now it is known how many steps there are
            pictures = "1 picture" if len(prompts) == 1 else f"{len(prompts)} pictures"
            bar = tqdm(total=len(prompts) * pipeline.num_timesteps, desc=f"drawing {pictures}", unit=" steps", dynamic_ncols=True)
        bar.update(len(tensors["latents"]))  # steps of one image: the last batch may be smaller
        return {}

    logger = logging.getLogger("dit.pipeline.pipeline")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn of a long prompt in each batch; `prompt_warnings` does so once
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            seeds = range(seed + start, seed + start + len(batch))
            pictures = generate_batch(pipeline, batch, seeds, callback_on_step_end=advance, **settings)
            if bar is not None and start + len(batch) == len(prompts):
                bar.close()  # before the last images are handed on, so that it does not go on over what is said of them
            yield from pictures
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and ALLOCATOR not in str(error):
            raise
        if len(batch) == 1:
            raise UserError("the memory does not hold this picture; a smaller --height and --width may fit") from None
        raise UserError(f"the memory does not hold {len(batch)} pictures at once; try --batch_size {len(batch) // 2}") from None
    finally:
        logger.setLevel(level)
        if bar is not None:
            bar.close()
