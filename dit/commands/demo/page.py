"""The page of `dit demo`: what is on it, and what its buttons do."""

from __future__ import annotations

import html
import logging
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gradio as gr
from PIL import Image

from dit.commands.demo.controls import AT_ONCE, LARGEST, SETTINGS, make_order, roll, settings_controls, what_controls
from dit.commands.demo.editor import BRUSH, editor_value, read_editor
from dit.commands.demo.elements import CSS, THEME, buttons, shown_gallery, shown_image
from dit.commands.demo.messages import on_page
from dit.commands.demo.models import NO_LORA, Models
from dit.commands.demo.nearest import NearestTrainingImages
from dit.commands.demo.orders import Generated, Order, Preview, generate, save, tile
from dit.commands.demo.words import answer, labels, text
from dit.config import DEFAULTS, STRENGTH
from dit.dataset.decode import open_named
from dit.errors import UserError

logger = logging.getLogger(__name__)
UPLOAD = "50mb"
WAITING = 8  # orders that may wait in the queue
KEPT = 100  # images in the gallery of a session; older ones are in the output folder alone


@dataclass(frozen=True)
class Entry:
    """An image of a session's gallery: the order and the facts that it was made with, and its copy that the browser may fetch."""

    order: Order
    facts: dict[str, str]
    copy: str


class Page:
    """The page's handlers; `blocks` is the page itself. What a user has done is in states of that user's session.

    Args:
        models: what may be chosen.
        output: the folder that images are saved in.
        cache: a folder whose files browsers may fetch by their names, so these are not to be guessed.
        nearest: finds the nearest training images; None where they are not for everybody.
    """

    def __init__(self, models: Models, output: Path, cache: Path, nearest: NearestTrainingImages | None):
        self.models, self.output, self.cache, self.nearest = models, output, cache, nearest
        with models.lock:
            self.first = models.load(next(iter(models.folders)))
        with gr.Blocks(title="dit demo", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.blocks:
            gr.Markdown(text("title"))
            self.history = gr.State([])  # entries, the newest first
            self.chosen = gr.State(None)
            with gr.Tab(text("tab_draw")):
                self._build_generate()
            with gr.Tab(text("tab_compare")):
                self._build_compare()

    def _build_generate(self) -> None:
        with gr.Row():
            with gr.Column():
                prompt, negative, seed, new_seed, count = what_controls("draw")
                settings = self._settings("draw", "settings")
                with gr.Accordion(text("change"), open=False, elem_id="change") as change:
                    gr.Markdown(text("change_info"))
                    upload = gr.UploadButton(cast(str, text("upload")), file_types=["image"], size="sm", elem_id="upload")
                    editor = gr.ImageEditor(
                        type="pil",
                        format="png",  # others lose
                        label=text("editor"),
                        sources=(),
                        brush=gr.Brush(default_size=max(4, self.first.size // 8), colors=[BRUSH], color_mode="fixed"),
                        layers=False,
                        transforms=(),
                        elem_id="editor",
                        elem_classes="pixels",
                    )
                    strength = gr.Slider(
                        0, 1, STRENGTH, step=0.05, label=text("strength"), info=text("strength_info"), elem_id="strength"
                    )
                start, cancel = buttons("draw")
            with gr.Column():
                live = shown_image("live")
                status = gr.HTML(elem_id="status", container=True)
                self.gallery = shown_gallery("gallery")
                self.facts = gr.Textbox(
                    label=text("facts"), lines=3, max_lines=20, buttons=["copy"], interactive=False, elem_id="facts"
                )
                with gr.Row():
                    again = gr.Button(text("again"), size="sm", elem_id="again")
                    edit = gr.Button(text("edit"), size="sm", elem_id="edit")
                    near = gr.Button(text("nearest"), size="sm", elem_id="near", visible=self.nearest is not None)
                neighbours = shown_gallery("nearest_gallery", visible=False)

        self.results = [self.history, self.gallery, self.chosen, self.facts]
        run = {
            "fn": self.generate,
            "inputs": [self.history, prompt, negative, seed, count, *settings, editor, strength],
            "outputs": [live, status, *self.results],
        }
        controls = [prompt, negative, seed, new_seed, count, *settings, editor, strength]
        recalled = again.click(self.recall, self.chosen, controls, **AT_ONCE)
        events = [
            start_event(gr.on([start.click, prompt.submit], **roll(seed, new_seed)).then, status, run),
            start_event(recalled.success, status, run),
            start_event(near.click, status, {"fn": self.show_nearest, "inputs": self.chosen, "outputs": [neighbours, status]}),
        ]
        cancel.click(self.cancelled, None, status, cancels=events, **AT_ONCE)
        self.gallery.select(self.choose, self.history, [self.chosen, self.facts, neighbours], **AT_ONCE)
        edit.click(self.put_into_editor, self.chosen, [editor, change, prompt, *settings[4:6]], **AT_ONCE)
        upload.upload(self.take_upload, [upload, settings[0]], editor, show_progress="minimal")

    def _build_compare(self) -> None:
        prompt, negative, seed, new_seed, count = what_controls("compare")
        sides, images = [], []
        with gr.Row():
            for side in ("a", "b"):
                with gr.Column():
                    sides += self._settings(side, f"settings_{side}", is_open=True)
                    images.append(shown_image(f"result_{side}"))
        start, cancel = buttons("draw_both")
        status = gr.HTML(container=True, elem_id="compare_status")
        run = {
            "fn": self.compare,
            "inputs": [self.history, prompt, negative, seed, count, *sides],
            "outputs": [*images, status, *self.results],
        }
        event = start_event(gr.on([start.click, prompt.submit], **roll(seed, new_seed)).then, status, run)
        cancel.click(self.cancelled, None, status, cancels=event, **AT_ONCE)

    def _settings(self, place: str, label: str, is_open: bool = False) -> list[Any]:
        controls = settings_controls(self.models, self.first, place, label, is_open)
        model, scheduler, _, _, width, height, *_ = controls
        model.input(self.fit_model, [model, scheduler], [scheduler, width, height], show_progress="minimal")
        return controls

    def fit_model(self, request: gr.Request, model: str, scheduler: str) -> list[Any]:
        """Offer the sizes and schedulers of the chosen model, which is loaded."""
        with in_words(request), self.models.lock:
            loaded = self.models.load(model)
        fitting = loaded.schedulers
        chosen = scheduler if scheduler in fitting else DEFAULTS.scheduler if DEFAULTS.scheduler in fitting else fitting[0]
        cell, most = loaded.cell, LARGEST * loaded.size
        sides = [gr.Slider(minimum=cell, maximum=most, step=cell, value=side) for side in loaded.default_size]
        return [gr.Dropdown(fitting, value=chosen), *sides]

    def generate(self, request: gr.Request, history, prompt, negative, seed, count, *rest) -> Iterator[list]:  # noqa: D417
        """Generate what the controls say: live images and the time left, then the results, which have been saved."""
        settings, (editor, strength) = rest[: len(SETTINGS)], rest[len(SETTINGS) :]
        try:
            with in_words(request):
                order = make_order(request, prompt, negative, seed, count, settings, *read_editor(editor), strength)
                for image, status, made in self.run(request, order, time.monotonic()):
                    yield [image, status, *self.keep(order, made, history)]
        except gr.Error:
            yield emptied(1, 6)
            raise

    def compare(self, request: gr.Request, history, prompt, negative, seed, count, *settings) -> Iterator[list]:  # noqa: D417
        """Generate with both settings, from the same seeds, one after the other."""
        try:
            with in_words(request):
                both = settings[: len(SETTINGS)], settings[len(SETTINGS) :]
                orders = [make_order(request, prompt, negative, seed, count, one) for one in both]
                images, began = [None, None], time.monotonic()
                for side, order in enumerate(orders):
                    for images[side], status, made in self.run(request, order, began):
                        kept = self.keep(order, made, history)
                        history = kept[0] if made else history
                        half_done = bool(made) and side == 0
                        yield [*images, gr.skip() if half_done else status, *kept]
        except gr.Error:
            yield emptied(2, 7)
            raise

    def run(self, request: gr.Request, order: Order, began: float) -> Iterator[tuple[Any, str, list[Generated]]]:
        """Yield (live image, status, what is done and saved) while `order` is worked on; `began` is when the time started."""
        yield gr.skip(), note(answer(request, "starting")), []
        for update in generate(self.models, order):
            if isinstance(update, str):
                gr.Warning(html.escape(on_page(request, update)), title="dit")
            elif isinstance(update, Preview):
                yield update.image, progress(request, update), []
            else:
                done = answer(request, "done", seconds=time.monotonic() - began, folder=self.output.name)
                yield tile([one.image for one in update]), note(done), update

    def keep(self, order: Order, made: list[Generated], history: list[Entry]) -> list[Any]:
        """Save what was made, and return history, gallery, the chosen entry and its facts: the newest ones."""
        if not made:
            return [gr.skip()] * 4
        entries = []
        for one in made:
            path = save(self.output, one)
            copy = self.cache / secrets.token_hex(16) / path.name
            copy.parent.mkdir(parents=True)
            shutil.copyfile(path, copy)
            entries.append(Entry(order, one.facts, str(copy)))
        history = [*entries, *history][:KEPT]
        shown = gr.Gallery([entry.copy for entry in history], selected_index=0)
        return [history, shown, entries[0], listed(entries[0].facts)]

    def cancelled(self, request: gr.Request) -> str:
        """Say so; gradio closes the generator, and with it the order."""
        return note(answer(request, "cancelled"))

    def choose(self, event: gr.SelectData, history: list[Entry]) -> list[Any]:
        """Show how an image of the gallery was made."""
        index = cast(int, event.index)
        if index >= len(history):  # the page of a server that has been started again since
            return [None, "", gr.Gallery(visible=False)]
        return [history[index], listed(history[index].facts), gr.Gallery(visible=False)]

    def recall(self, request: gr.Request, chosen: Entry | None) -> list[Any]:
        """Set the controls to what the chosen image was made with, so that it is generated again."""
        with in_words(request):
            order = require(request, chosen).order
        how = order.settings
        numbers = [int(require(request, chosen).facts["seed"]), False, 1]
        settings = [
            how.scheduler,
            how.num_inference_steps,
            how.guidance_scale,
            how.width,
            how.height,
            *(order.lora or (NO_LORA, 1)),
        ]
        strength = how.strength if how.strength is not None else gr.skip()
        return [how.prompt, how.negative_prompt, *numbers, order.model, *settings, editor_value(order), strength]

    def put_into_editor(self, request: gr.Request, chosen: Entry | None) -> list[Any]:
        """Open the editor with the chosen image, at its size, and its prompt."""
        with in_words(request):
            entry = require(request, chosen)
        how = entry.order.settings
        return [Image.open(entry.copy), gr.Accordion(open=True), how.prompt, how.width, how.height]

    def take_upload(self, request: gr.Request, file: str, model: str) -> Image.Image:
        """Put an uploaded image into the editor, reduced if it is far larger than what can be generated."""
        with in_words(request):
            image = open_named(Path(file).read_bytes(), Path(file).name)
            with self.models.lock:
                most = LARGEST * self.models.load(model).size
            image.thumbnail((most, most), Image.Resampling.LANCZOS)
            return image

    def show_nearest(self, request: gr.Request, chosen: Entry | None) -> Iterator[list]:
        """Show the training images that are nearest to the chosen image."""
        try:
            with in_words(request):
                entry = require(request, chosen)
                yield [gr.skip(), note(answer(request, "looking"))]
                found = self.nearest.find(Image.open(entry.copy).convert("RGB")) if self.nearest else None
                if found is None:
                    raise UserError(answer(request, "no_training_set"))
                yield [gr.Gallery(found, visible=True), ""]
        except gr.Error:
            yield emptied(1, 2)
            raise


def start_event(trigger: Any, status: gr.HTML, run: dict[str, Any]) -> Any:
    """Let `trigger` start what takes long: one at a time on the whole page, with its place in the queue shown in `status`."""
    return trigger(**run, concurrency_id="model", show_progress="minimal", show_progress_on=status)


def emptied(status: int, count: int) -> list[Any]:
    """Return an update of `count` outputs that empties the status, number `status`: no progress stands after an error."""
    return ["" if k == status else gr.skip() for k in range(count)]


def require(request: gr.Request, chosen: Entry | None) -> Entry:
    """Return the chosen entry; raise a `UserError` where there is none."""
    if chosen is None:
        raise UserError(answer(request, "choose_first"))
    return chosen


def listed(facts: dict[str, str]) -> str:
    """Return the facts of an image, one a line."""
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def note(line: str) -> str:
    """Return a line for the status."""
    return f"<p>{html.escape(line)}</p>"


def progress(request: gr.Request, update: Preview) -> str:
    """Return the status on the way: a bar, and about how long it takes."""
    left = update.seconds / update.step * (update.total - update.step)
    line = note(answer(request, "step", step=update.step, steps=update.total, seconds=left))
    return f'{line}<progress value="{update.step}" max="{update.total}" style="width: 100%"></progress>'


@contextmanager
def in_words(request: gr.Request) -> Iterator[None]:
    """Turn what goes wrong into a message on the page; what is no user's mistake goes into the log, too."""
    try:
        yield
    except UserError as error:
        words = on_page(request, str(error))
    except GeneratorExit:
        raise
    except Exception:
        logger.exception("a request of the page failed")
        words = answer(request, "failed")
    else:
        return
    raise gr.Error(html.escape(words), title="dit", print_exception=False)


def launch(page: Page, host: str, port: int, open_browser: bool) -> None:
    """Serve the page until it is interrupted. It loads nothing from, and sends nothing to, anywhere else."""
    page.blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    page.blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        run_history=False,  # it would be kept in the browser, and could be sent to the Hub
        max_file_size=UPLOAD,
        theme=THEME,
        css=CSS,
        i18n=labels(),
        footer_links=[],
    )
