"""Draw one order in a thread of its own, so that pictures of the way can be shown, and it can be stopped between steps."""

from __future__ import annotations

import queue
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from dit.commands.demo.models import Loaded
from dit.commands.generate import png_facts
from dit.commands.inputs import InputImage
from dit.commands.png import write_png
from dit.pipeline.generate import generate_images
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler, scheduler_name
from dit.utils.images import decode_latents, grid, to_images

PREVIEWS = 12  # of a drawing, at most: each takes one pass of the VAE
MOST = 16  # pictures at once


@dataclass(frozen=True)
class Preview:
    """The picture on its way: `steps` of `total` are done, after `seconds` of drawing."""

    image: Image.Image
    step: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Drawn:
    """A finished picture, and how it was made, as its PNG says it."""

    image: Image.Image
    facts: dict[str, str]


def draw(loaded: Loaded, order: Namespace, image: InputImage | None, mask: InputImage | None) -> Iterator[Preview | list[Drawn]]:
    """Yield previews, and then the list of finished pictures. Closing the generator stops the drawing before its next step.

    Args:
        loaded: the model.
        order: `prompt`, `num_images_per_prompt`, and what else is named as in `dit generate`.
        image, mask: what to change, and where.

    Raises:
        UserError: the order is impossible, or the memory does not hold it.
    """
    pipeline, began = loaded.pipeline, time.monotonic()
    pipeline.scheduler = make_scheduler(order.scheduler, pipeline.config.prediction_type)
    updates: queue.SimpleQueue[Preview | list[Drawn] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def on_step_end(running: DiTTextToImagePipeline, step: int, timestep, tensors: dict) -> dict:
        total = running.num_timesteps
        if stop.is_set():
            running._interrupt = True
        elif (step + 1) % -(-total // PREVIEWS) == 0:
            images = to_images(decode_latents(running.vae, tensors["latents"]))
            updates.put(Preview(tile(images), step + 1, total, time.monotonic() - began))
        return {}

    def work() -> None:
        try:
            updates.put(_generate(loaded, order, image, mask, on_step_end))
        except BaseException as error:  # it is raised where the pictures are waited for
            updates.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            update = updates.get()
            if isinstance(update, BaseException):
                raise update
            yield update
            if isinstance(update, list):
                return
    finally:
        stop.set()
        thread.join()


def _generate(loaded: Loaded, order: Namespace, image: InputImage | None, mask: InputImage | None, on_step_end) -> list[Drawn]:
    pipeline, count = loaded.pipeline, order.num_images_per_prompt
    images = generate_images(
        pipeline,
        [order.prompt] * count,
        range(order.seed, order.seed + count),
        batch_size=count,
        negative_prompt=order.negative_prompt,
        image=image and image.image,
        mask_image=mask and mask.image,
        strength=order.strength,
        height=order.height,
        width=order.width,
        num_inference_steps=order.num_inference_steps,
        guidance_scale=order.guidance_scale,
        callback_on_step_end=on_step_end,
    )
    made_with = {
        "scheduler": scheduler_name(pipeline.scheduler),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "model": f"sha256:{loaded.weights}",
    }
    facts = png_facts(order, image, mask, made_with, pipeline.config.image_size)
    return [Drawn(one, {"prompt": order.prompt, "seed": str(order.seed + k)} | facts) for k, one in enumerate(images)]


def tile(images: list[Image.Image]) -> Image.Image:
    """Return one picture of all: as they are one below or beside the other."""
    return grid(images, columns=-(-len(images) // max(1, int(len(images) ** 0.5)))) if len(images) > 1 else images[0]


def save(folder: Path, drawn: Drawn) -> Path:
    """Write a picture into `folder` under a name that none has yet: the time, and its seed. Nothing is ever overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}-seed{drawn.facts['seed']}.png"
    write_png(path, drawn.image, drawn.facts)
    return path
