"""Generate one order in a thread of its own, so that images on their way can be shown, and it can be stopped between steps."""

from __future__ import annotations

import queue
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from dit.commands.demo.models import Loaded, Models
from dit.commands.generate import Loras, call_settings, generation_warnings, merged_already, png_facts
from dit.commands.inputs import InputImage
from dit.commands.png import write_png
from dit.pipeline.generate import generate_images
from dit.pipeline.lora import apply_loras
from dit.pipeline.pipeline import Callback, DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.utils.autoencoder import decode_latents
from dit.utils.images import grid, to_images

PREVIEWS = 12  # of an order, at most: each takes one pass of the VAE
MOST = 16  # images at once


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Attributes:
        model: one of the names in the list of models.
        settings: named as the flags of `dit generate` are, with `prompt`, `scheduler` and `num_images_per_prompt`.
        image, mask: what to change, and where.
        lora: one of the names in the list of adapters, and their scale.
    """

    model: str
    settings: Namespace
    image: InputImage | None = None
    mask: InputImage | None = None
    lora: tuple[str, float] | None = None


@dataclass(frozen=True)
class Preview:
    """The images on their way, as one: `step` of `total` steps are done, after `seconds`."""

    image: Image.Image
    step: int
    total: int
    seconds: float


@dataclass(frozen=True)
class Generated:
    """A finished image, and how it was made, as its PNG says it."""

    image: Image.Image
    facts: dict[str, str]


class _Stopped(Exception):
    """Ends a generation that nobody waits for any more."""


def generate(models: Models, order: Order) -> Iterator[str | Preview | list[Generated]]:
    """Yield warnings, previews, and then the list of finished images.

    Closing the generator stops it at its next step; another one begins when it has ended.

    Raises:
        UserError: the order is impossible, or the memory does not hold it.
    """
    updates: queue.SimpleQueue[str | Preview | list[Generated] | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            with models.lock:
                if not stop.is_set():
                    loaded = models.load(order.model)
                    loras = [(models.loras[order.lora[0]], order.lora[1])] if order.lora else []
                    loaded.pipeline.unload_lora_weights()
                    apply_loras(loaded.pipeline, loras)
                    folder, prompts = models.folders[order.model], [order.settings.prompt]
                    for line in merged_already(folder, loras) if folder else ():
                        updates.put(line)
                    for line in generation_warnings(loaded.pipeline, order.settings, prompts, order.image, order.mask):
                        updates.put(line)
                    updates.put(_generate(loaded, order, loras, _report(updates, stop)))
        except _Stopped:
            pass
        except BaseException as error:  # it is raised where the images are waited for
            updates.put(error)

    threading.Thread(target=work, daemon=True).start()
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


def _report(updates: queue.SimpleQueue, stop: threading.Event) -> Callback:
    """Return the pipeline's callback: it puts some of the images on their way into `updates`, and looks at `stop`."""
    began = time.monotonic()

    def on_step_end(pipeline: DiTTextToImagePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if stop.is_set():
            raise _Stopped
        total = pipeline.num_timesteps
        if (step + 1) % -(-total // PREVIEWS) == 0:
            images = to_images(decode_latents(pipeline.vae, tensors["latents"]))
            updates.put(Preview(tile(images), step + 1, total, time.monotonic() - began))
        return {}

    return on_step_end


def _generate(loaded: Loaded, order: Order, loras: Loras, on_step_end: Callback) -> list[Generated]:
    pipeline, settings, image, mask = loaded.pipeline, order.settings, order.image, order.mask
    pipeline.scheduler = make_scheduler(settings.scheduler, pipeline.config.prediction_type)
    count = settings.num_images_per_prompt
    images = generate_images(
        pipeline,
        [settings.prompt] * count,
        range(settings.seed, settings.seed + count),
        batch_size=count,
        **call_settings(settings, image, mask),
        callback_on_step_end=on_step_end,
    )
    facts = png_facts(pipeline, loaded.weights, settings, image, mask, loras)
    return [Generated(one, {"prompt": settings.prompt, "seed": str(settings.seed + k)} | facts) for k, one in enumerate(images)]


def tile(images: list[Image.Image]) -> Image.Image:
    """Return all images as one."""
    return grid(images, columns=-(-len(images) // max(1, int(len(images) ** 0.5)))) if len(images) > 1 else images[0]


def save(folder: Path, generated: Generated) -> Path:
    """Write an image into `folder` under a name that none has yet: the time, and its seed. Nothing is ever overwritten."""
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S-%f}-seed{generated.facts['seed']}.png"
    write_png(path, generated.image, generated.facts)
    return path
