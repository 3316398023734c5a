"""Text (and a picture, and a mask) to image with a trained transformer: the diffusers pipeline that everything draws with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dit.errors import UserError
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.utils.hardware import has_fast_bf16


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """A generator for each picture: of its own seed, and on the CPU, so that its noise is the same on every machine."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def load_pipeline(folder: str | Path, scheduler: str | None = None) -> DiTTextToImagePipeline:
    """The pipeline as `sample` and `dit generate` use it: on the GPU if there is one, the transformer in bf16 where that is
    fast, the encoders in fp32. With the scheduler of that name, or with the one that `from_pretrained` finds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    pipeline = DiTTextToImagePipeline.from_pretrained(folder, transformer_dtype=fast).to(device)
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.config.prediction_type)
    return pipeline


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

    logger = logging.getLogger("dit.pipeline.pipeline")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would say of each batch again which prompts are too long; `dit.pipeline.prompts.prompt_warnings` does so once
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
