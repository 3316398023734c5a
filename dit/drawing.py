"""Draw any number of prompts in batches, each from a seed of its own, with one progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dit.errors import UserError
from dit.pipeline import DiTTextToImagePipeline, generators

ALLOCATOR = "DefaultCPUAllocator"  # what a CPU's memory error names; its class is RuntimeError


def draw(
    pipeline: DiTTextToImagePipeline, prompts: list[str], seed: int, batch_size: int, **settings: Any
) -> Iterator[Image.Image]:
    """Yield a picture for each of `prompts`, prompt k from `seed` + k: a picture does not depend on its neighbours.

    The batch size changes no more than how sums are rounded.

    Args:
        pipeline: what draws.
        prompts: one for each picture.
        seed: of the first picture.
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
        bar.update(len(tensors["latents"]))  # steps of one picture: the last batch may be smaller
        return {}

    logger = logging.getLogger("dit.pipeline")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would say of each batch again which prompts are too long; `dit.text.remarks` does so once
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            noise = generators(range(seed + start, seed + start + len(batch)))
            pictures = pipeline(batch, generator=noise, callback_on_step_end=advance, **settings).images
            if bar is not None and start + len(batch) == len(prompts):
                bar.close()  # before the last pictures are handed on, so that it does not go on over what is said of them
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
