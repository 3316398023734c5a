"""The controls of the page: what to generate and how, and the order that they stand for."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import gradio as gr

from dit.commands.demo.models import NO_LORA, Loaded, Models
from dit.commands.demo.orders import MOST, Order
from dit.commands.demo.words import answer, text
from dit.commands.inputs import InputImage, check_numbers
from dit.config import DEFAULTS
from dit.errors import UserError

LARGEST = 4  # times the size of training: of what is generated, and of what an upload is reduced to
# The controls that say how to generate, in their order on the page.
SETTINGS = ("model", "scheduler", "num_inference_steps", "guidance_scale", "width", "height", "lora", "lora_scale")
AT_ONCE: dict[str, Any] = {"show_progress": "hidden", "queue": False}  # of handlers that take no time


def what_controls(place: str) -> tuple[gr.Textbox, gr.Textbox, gr.Number, gr.Checkbox, gr.Slider]:
    """Make the controls that say what to generate; their elements are called after `place`."""
    prompt = gr.Textbox(
        label=text("prompt"),
        info=text("prompt_info"),
        autofocus=True,
        max_lines=4,
        max_length=2000,
        elem_id=f"{place}-prompt",
    )
    negative = gr.Textbox(
        label=text("negative_prompt"),
        info=text("negative_prompt_info"),
        max_lines=4,
        max_length=2000,
        elem_id=f"{place}-negative_prompt",
    )
    with gr.Row():
        seed = gr.Number(0, label=text("seed"), precision=0, minimum=0, maximum=2**31 - 1, elem_id=f"{place}-seed")
        new_seed = gr.Checkbox(True, label=text("new_seed"), elem_id=f"{place}-new_seed")
    count = gr.Slider(1, MOST, 1, step=1, label=text("count"), elem_id=f"{place}-count")
    return prompt, negative, seed, new_seed, count


def settings_controls(models: Models, first: Loaded, place: str, label: str, is_open: bool = False) -> list[Any]:
    """Make the controls that say how to generate, in the order of `SETTINGS`, as they are for the model `first`."""
    names = list(models.folders)
    with gr.Accordion(text(label), open=is_open, elem_id=f"{place}-settings"):
        with gr.Row():
            model = gr.Dropdown(names, value=names[0], label=text("model"), elem_id=f"{place}-model")
            scheduler = gr.Dropdown(
                first.schedulers, value=DEFAULTS.scheduler, label=text("scheduler"), elem_id=f"{place}-scheduler"
            )
        steps = gr.Slider(1, 100, DEFAULTS.num_inference_steps, step=1, label=text("steps"), elem_id=f"{place}-steps")
        guidance = gr.Slider(
            1,
            10,
            DEFAULTS.guidance_scale,
            step=0.1,
            label=text("guidance"),
            info=text("guidance_info"),
            elem_id=f"{place}-guidance",
        )
        size, cell = first.size, first.cell
        sides = [
            gr.Slider(cell, LARGEST * size, pixels, step=cell, label=text(side), elem_id=f"{place}-{side}")
            for side, pixels in zip(("width", "height"), first.default_size, strict=True)
        ]
        with gr.Row(visible=bool(models.loras)):
            lora = gr.Dropdown(
                [NO_LORA, *models.loras], value=NO_LORA, label=text("lora"), info=text("lora_info"), elem_id=f"{place}-lora"
            )
            scale = gr.Slider(
                0, 2, 1, step=0.05, label=text("lora_scale"), info=text("lora_scale_info"), elem_id=f"{place}-lora_scale"
            )
    return [model, scheduler, steps, guidance, *sides, lora, scale]


def roll(seed: gr.Number, new_seed: gr.Checkbox) -> dict[str, Any]:
    """Return the first step of an event: a new seed, if one is wanted."""
    return {"fn": roll_seed, "inputs": [seed, new_seed], "outputs": seed, **AT_ONCE}


def roll_seed(seed: int | None, new: bool) -> int:
    """Return a new seed, or the given one."""
    return random.randrange(2**31) if new else int(seed or 0)


def make_order(
    request: gr.Request,
    prompt: str,
    negative: str,
    seed: float,
    count: float,
    settings: tuple,
    image: InputImage | None = None,
    mask: InputImage | None = None,
    strength: float | None = None,
) -> Order:
    """Collect what the controls say; what is painted is generated anew, whatever the strength.

    Raises:
        UserError: there is no prompt, or a number is impossible.
    """
    if not (prompt or "").strip():
        raise UserError(answer(request, "no_prompt"))
    model, scheduler, steps, guidance, width, height, lora, scale = settings
    how = Namespace(
        prompt=prompt.strip(),
        negative_prompt=(negative or "").strip(),
        seed=int(seed or 0),
        num_images_per_prompt=int(count),
        batch_size=int(count),
        guidance_interval=(0.0, 1.0),
        strength=strength if image and not mask else None,
        scheduler=scheduler,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        width=int(width),
        height=int(height),
    )
    check_numbers(how)
    return Order(model, how, image, mask, None if lora == NO_LORA else (lora, float(scale)))
