"""How the page looks, and what stands on it more than once."""

from __future__ import annotations

import gradio as gr

from dit.commands.demo.words import text

CSS = """
.pixels img { image-rendering: pixelated; }
.large img { height: 384px; width: 100%; object-fit: contain; }
.small .grid-container { grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)) !important; }
.small .grid-wrap { padding-top: 32px; } /* below the label */
.gradio-container { max-width: 1400px !important; margin: auto; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none is downloaded


def buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """Make a row with a button that starts, called `name`, and one that cancels."""
    with gr.Row():
        start = gr.Button(text(name), variant="primary", elem_id=name)
        cancel = gr.Button(text("cancel"), variant="stop", elem_id=f"{name}-cancel")
    return start, cancel


def shown_image(name: str) -> gr.Image:
    """Make a place for an image, pixel by pixel as it is, enlarged."""
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
    """Make a place for many small images."""
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
