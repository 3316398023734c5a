"""The page of `dit demo`: what is on it, and what its buttons do."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

import gradio as gr
from PIL import Image, ImageOps

from dit.commands.demo.drawing import MOST, Preview, draw, save, tile
from dit.commands.demo.models import Loaded, Models
from dit.commands.demo.nearest import NearestTrainingImages
from dit.commands.demo.words import answer, labels
from dit.commands.generate import input_warnings
from dit.commands.inputs import InputImage, check_numbers
from dit.commands.prompt_warnings import prompt_warnings
from dit.config import DEFAULTS, STRENGTH, Scheduler
from dit.dataset.decode import open_named
from dit.dataset.rgb import to_rgb
from dit.errors import UserError

logger = logging.getLogger(__name__)
BRUSH = ("#ff7a00", 0.6)  # colour and opacity: what is below stays visible
UPLOAD = "50mb"
WAITING = 8  # drawings that may wait in the queue
CSS = """
.pixels img { image-rendering: pixelated; }
.large img { height: 384px; width: 100%; object-fit: contain; }
.small .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) !important; }
.gradio-container { max-width: 1400px !important; margin: auto; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is downloaded
SETTINGS = ("model", "scheduler", "num_inference_steps", "guidance_scale", "width", "height")
text = gr.I18n()


class Page:
    """The page's state and its handlers; `blocks` is the page itself.

    Args:
        models: what may be chosen.
        output: the folder that pictures are saved in.
        root: the project's folder, where the training images are looked for.
    """

    def __init__(self, models: Models, output: Path, root: Path):
        self.models, self.output = models, output
        self.nearest = NearestTrainingImages(root)
        first = self.models.load(next(iter(models.folders)))
        self.size = first.pipeline.config.image_size
        self.cell = first.pipeline.vae_scale_factor * first.pipeline.transformer.config.patch_size
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="dit demo", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
            gr.Markdown(text("title"))
            history = gr.State([])  # of this browser's session: the pictures' files and facts, the newest first
            chosen = gr.State(None)
            with gr.Tab(text("tab_draw")):
                self._build_draw(history, chosen)
            with gr.Tab(text("tab_compare")):
                self._build_compare()
        return blocks

    def _build_draw(self, history: gr.State, chosen: gr.State) -> None:
        with gr.Row():
            with gr.Column():
                prompt, negative, seed, new_seed, count = self._what("draw")
                settings = self._settings("draw", "settings")
                with gr.Accordion(text("change"), open=False, elem_id="change") as change:
                    gr.Markdown(text("change_info"))
                    upload = gr.UploadButton(cast(str, text("upload")), file_types=["image"], size="sm", elem_id="upload")
                    editor = gr.ImageEditor(
                        type="pil",
                        format="png",  # others lose
                        label=text("editor"),
                        sources=(),
                        brush=gr.Brush(default_size=max(4, self.size // 8), colors=[BRUSH], color_mode="fixed"),
                        layers=False,
                        transforms=(),
                        elem_id="editor",
                        elem_classes="pixels",
                    )
                    strength = gr.Slider(
                        0, 1, STRENGTH, step=0.05, label=text("strength"), info=text("strength_info"), elem_id="strength"
                    )
                with gr.Row():
                    start = gr.Button(text("draw"), variant="primary", elem_id="draw")
                    cancel = gr.Button(text("cancel"), variant="stop", elem_id="cancel")
            with gr.Column():
                live = shown_image("live")
                status = gr.HTML(elem_id="status", container=True)
                gallery = shown_gallery("gallery")
                facts = gr.Textbox(label=text("facts"), lines=3, buttons=["copy"], interactive=False, elem_id="facts")
                with gr.Row():
                    again = gr.Button(text("again"), size="sm", elem_id="again")
                    edit = gr.Button(text("edit"), size="sm", elem_id="edit")
                    near = gr.Button(text("nearest"), size="sm", elem_id="near")
                neighbours = shown_gallery("nearest_gallery", visible=False)
        inputs = [prompt, negative, seed, count, *settings, editor, strength, history]
        controls = [prompt, negative, seed, count, *settings, new_seed, editor]
        results = [live, status, gallery, history]
        shown = {"show_progress": "minimal", "show_progress_on": status}

        drawing = {"fn": self.draw, "inputs": inputs, "outputs": results, "concurrency_id": "model", **shown}
        roll = {"fn": roll_seed, "inputs": [seed, new_seed], "outputs": seed, "show_progress": "hidden", "queue": False}
        events = [gr.on([start.click, prompt.submit], **roll).then(**drawing)]
        gallery.select(self.choose, [history], [chosen, facts], show_progress="hidden")
        events.append(again.click(self.recall, [chosen], controls, show_progress="hidden").success(**drawing))
        edit.click(self.put_into_editor, [chosen], [editor, change, prompt], show_progress="hidden")
        upload.upload(self.take_upload, [upload, *settings], [editor], show_progress="minimal")
        near.click(self.show_nearest, [chosen], [neighbours], concurrency_id="model")
        cancel.click(self.cancelled, None, [status], cancels=events, show_progress="hidden", queue=False)

    def _build_compare(self) -> None:
        prompt, negative, seed, new_seed, count = self._what("compare")
        sides, images = [], []
        with gr.Row():
            for side in ("a", "b"):
                with gr.Column():
                    sides.append(self._settings(side, f"settings_{side}", is_open=True))
                    images.append(shown_image(f"result_{side}"))
        with gr.Row():
            start = gr.Button(text("draw_both"), variant="primary", elem_id="draw_both")
            cancel = gr.Button(text("cancel"), variant="stop")
        status = gr.HTML(container=True, elem_id="compare_status")
        roll = {"fn": roll_seed, "inputs": [seed, new_seed], "outputs": seed, "show_progress": "hidden", "queue": False}
        event = gr.on([start.click, prompt.submit], **roll).then(
            self.compare,
            [prompt, negative, seed, count, *sides[0], *sides[1]],
            [*images, status],
            concurrency_id="model",
            show_progress="minimal",
            show_progress_on=status,
        )
        cancel.click(self.cancelled, None, [status], cancels=[event], show_progress="hidden", queue=False)

    def _what(self, place: str) -> tuple[gr.Textbox, gr.Textbox, gr.Number, gr.Checkbox, gr.Slider]:
        """Make the controls that say what to draw; their elements are called after `place`."""
        prompt = gr.Textbox(
            label=text("prompt"),
            info=text("prompt_info"),
            autofocus=True,
            elem_id=f"{place}-prompt",
            max_lines=4,
            max_length=2000,
        )
        negative = gr.Textbox(
            label=text("negative_prompt"),
            info=text("negative_prompt_info"),
            elem_id=f"{place}-negative_prompt",
            max_lines=4,
            max_length=2000,
        )
        with gr.Row():
            seed = gr.Number(0, label=text("seed"), precision=0, minimum=0, maximum=2**31 - 1, elem_id=f"{place}-seed")
            new_seed = gr.Checkbox(True, label=text("new_seed"), elem_id=f"{place}-new_seed")
        count = gr.Slider(1, MOST, 1, step=1, label=text("count"), elem_id=f"{place}-count")
        return prompt, negative, seed, new_seed, count

    def _settings(self, place: str, label: str, is_open: bool = False) -> list[Any]:
        """Make the controls that say how to draw, in the order of `SETTINGS`."""
        names, schedulers = list(self.models.folders), list(get_args(Scheduler))
        with gr.Accordion(text(label), open=is_open, elem_id=f"{place}-settings"):
            with gr.Row():
                model = gr.Dropdown(names, value=names[0], label=text("model"), elem_id=f"{place}-model")
                scheduler = gr.Dropdown(
                    schedulers, value=DEFAULTS.scheduler, label=text("scheduler"), elem_id=f"{place}-scheduler"
                )
            steps = gr.Slider(1, 100, DEFAULTS.num_inference_steps, step=1, label=text("steps"), elem_id=f"{place}-steps")
            guidance = gr.Slider(
                1, 10, DEFAULTS.guidance_scale, step=0.1, label=text("guidance"), info=text("guidance_info"),
                elem_id=f"{place}-guidance",
            )  # fmt: skip
            sides = [
                gr.Slider(self.cell, 4 * self.size, self.size, step=self.cell, label=text(side), elem_id=f"{place}-{side}")
                for side in ("width", "height")
            ]
        return [model, scheduler, steps, guidance, *sides]

    def draw(self, request: gr.Request, prompt, negative, seed, count, *rest) -> Iterator[tuple]:  # noqa: D417
        """Draw what the controls say: live pictures and the time left, then the results, which have been saved."""
        settings, (editor, strength, history) = rest[: len(SETTINGS)], rest[len(SETTINGS) :]
        with in_words(request):
            order = make_order(request, prompt, negative, seed, count, settings)
            image, mask = read_editor(editor)
            order.strength = strength if image and not mask else None  # what is painted is drawn anew
            check_numbers(order)
            yield gr.skip(), note(answer(request, "starting")), gr.skip(), gr.skip()
            loaded, began = self.models.load(order.model), time.monotonic()
            self.warn(loaded, order, image, mask)
            for update in draw(loaded, order, image, mask):
                if isinstance(update, Preview):
                    yield update.image, progress(request, update), gr.skip(), gr.skip()
                    continue
                made = [{"file": str(save(self.output, one)), "facts": one.facts, "model": order.model} for one in update]
                history = [*made, *history]
                done = note(answer(request, "done", seconds=time.monotonic() - began, folder=self.output.name))
                yield tile([one.image for one in update]), done, [one["file"] for one in history], history

    def compare(self, request: gr.Request, prompt, negative, seed, count, *rest) -> Iterator[tuple]:  # noqa: D417
        """Draw with both settings, from the same seeds, one after the other."""
        with in_words(request):
            orders = [
                make_order(request, prompt, negative, seed, count, settings)
                for settings in (rest[: len(SETTINGS)], rest[len(SETTINGS) :])
            ]
            for order in orders:
                check_numbers(order)
            images: list[Any] = [None, None]
            yield *images, note(answer(request, "starting"))
            began, made = time.monotonic(), []
            for side, order in enumerate(orders):
                loaded = self.models.load(order.model)
                self.warn(loaded, order, None, None)
                for update in draw(loaded, order, None, None):
                    if isinstance(update, Preview):
                        images[side] = update.image
                        yield *images, progress(request, update)
                        continue
                    images[side] = tile([one.image for one in update])
                    made += update
            for one in made:
                save(self.output, one)
            yield *images, note(answer(request, "done", seconds=time.monotonic() - began, folder=self.output.name))

    def warn(self, loaded: Loaded, order: Namespace, image: InputImage | None, mask: InputImage | None) -> None:
        """Show what is done as asked, and may not be what was meant."""
        for prompt in (order.prompt, order.negative_prompt):
            for line in prompt_warnings(loaded.pipeline.tokenizer, prompt):
                gr.Warning(line, title="dit")
        for line in input_warnings(order, image, mask, self.size, self.cell):
            gr.Warning(line.removeprefix("--"), title="dit")

    def cancelled(self, request: gr.Request) -> str:
        """Say that the drawing has been stopped; gradio closes the generator, and with it the drawing."""
        return note(answer(request, "cancelled"))

    def choose(self, event: gr.SelectData, history: list[dict]) -> tuple[dict, str]:
        """Show how a picture of the gallery was made."""
        picture = history[cast(int, event.index)]
        return picture, "\n".join(f"{name}: {value}" for name, value in picture["facts"].items())

    def recall(self, request: gr.Request, chosen: dict | None) -> list[Any]:
        """Set the controls to what the chosen picture was made with."""
        picture = self._chosen(chosen, request)
        facts = picture["facts"]
        texts = [facts["prompt"], facts.get("negative_prompt", ""), int(facts["seed"]), 1]
        numbers = [int(facts["num_inference_steps"]), float(facts["guidance_scale"]), int(facts["width"]), int(facts["height"])]
        editor = gr.skip() if "image" in facts else None  # what it was changed from is still there, or not kept
        return [*texts, picture["model"], facts["scheduler"], *numbers, False, editor]

    def put_into_editor(self, request: gr.Request, chosen: dict | None) -> tuple[str, Any, str]:
        """Open the editor with the chosen picture, and its prompt."""
        picture = self._chosen(chosen, request)
        return picture["file"], gr.Accordion(open=True), picture["facts"]["prompt"]

    def take_upload(self, request: gr.Request, file: str, *settings: Any) -> Image.Image:
        """Put an uploaded picture into the editor, at the size that is drawn: its middle, resized."""
        with in_words(request):
            *_, width, height = settings
            return ImageOps.fit(
                open_named(Path(file).read_bytes(), Path(file).name), (int(width), int(height)), Image.Resampling.LANCZOS
            )

    def show_nearest(self, request: gr.Request, chosen: dict | None) -> Any:
        """Show the training images that are nearest to the chosen picture."""
        picture = self._chosen(chosen, request)
        with in_words(request):
            found = self.nearest.find(Image.open(picture["file"]).convert("RGB"))
            if found is None:
                raise gr.Error(answer(request, "no_training_set"), title="dit", print_exception=False)
            return gr.Gallery(found, visible=True)

    def _chosen(self, chosen: dict | None, request: gr.Request) -> dict:
        if chosen is None:
            raise gr.Error(answer(request, "choose_first"), title="dit", print_exception=False)
        return chosen


def shown_image(name: str) -> gr.Image:
    """Make a place for a picture that is drawn, pixel by pixel as it is, enlarged."""
    return gr.Image(
        label=text(name),
        interactive=False,
        format="png",
        height=400,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["pixels", "large"],
    )


def shown_gallery(name: str, visible: bool = True) -> gr.Gallery:
    """Make a place for many small pictures."""
    return gr.Gallery(
        label=text(name),
        interactive=False,
        format="png",
        height=200,
        object_fit="contain",
        allow_preview=False,
        fit_columns=False,
        buttons=["download"],
        visible=visible,
        elem_id=name,
        elem_classes=["pixels", "small"],
    )


def roll_seed(seed: int | None, new: bool) -> int:
    """Return a new seed, or the given one."""
    return random.randrange(2**31) if new else int(seed or 0)


def make_order(request: gr.Request, prompt: str, negative: str, seed: float, count: float, settings: tuple) -> Namespace:
    """Collect what the controls say, under the names that the flags of `dit generate` have."""
    if not (prompt or "").strip():
        raise gr.Error(answer(request, "no_prompt"), title="dit", print_exception=False)
    model, scheduler, steps, guidance, width, height = settings
    if scheduler not in get_args(Scheduler):  # what a browser sends need not come from the list
        raise UserError(f"scheduler: {scheduler!r} is not one of {', '.join(get_args(Scheduler))}")
    if not 1 <= count <= MOST:
        raise UserError(f"num_images_per_prompt: {count} is not between 1 and {MOST}")
    return Namespace(
        prompt=prompt.strip(),
        negative_prompt=(negative or "").strip(),
        seed=int(seed or 0),
        num_images_per_prompt=int(count),
        batch_size=int(count),
        model=model,
        scheduler=scheduler,
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        guidance_interval=(0.0, 1.0),
        width=int(width),
        height=int(height),
        strength=None,
    )


def read_editor(editor: dict | None) -> tuple[InputImage | None, InputImage | None]:
    """Return the picture to change, and the mask that was painted; None where there is none."""
    if editor is None or editor["background"] is None:
        return None, None
    background = editor["background"]
    painted = [layer.getchannel("A").point(lambda alpha: 255 * (alpha > 255 * BRUSH[1] / 2)) for layer in editor["layers"]]
    mask = next((layer for layer in painted if layer.getbbox()), None)
    return as_input(to_rgb(background)), mask and as_input(mask)


def as_input(image: Image.Image) -> InputImage:
    """Return `image` with the hash of its pixels: it is no file any more."""
    return InputImage(image, hashlib.sha256(image.tobytes()).hexdigest())


def note(line: str) -> str:
    """Return a line for the status."""
    return f"<p>{line}</p>"


def progress(request: gr.Request, update: Preview) -> str:
    """Return the status while drawing: a bar, and about how long it takes."""
    left = update.seconds / update.step * (update.total - update.step)
    line = answer(request, "step", step=update.step, steps=update.total, seconds=left)
    return f'<p>{line}</p><progress value="{update.step}" max="{update.total}" style="width: 100%"></progress>'


@contextmanager
def in_words(request: gr.Request) -> Iterator[None]:
    """Turn what goes wrong into a message on the page; what is no user's mistake goes into the log, too."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error).removeprefix("--"), title="dit", print_exception=False) from None
    except (gr.Error, GeneratorExit):
        raise
    except Exception:
        logger.exception("a drawing failed")
        raise gr.Error(answer(request, "failed"), title="dit", print_exception=False) from None


def launch(page: Page, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until it is interrupted. Nothing is fetched from, or sent to, anywhere else."""
    page.blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    page.blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        max_file_size=UPLOAD,
        theme=THEME,
        css=CSS,
        i18n=labels(),
        footer_links=[],
    )
