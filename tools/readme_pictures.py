"""Make the pictures of README and docs that show what the model in models/dit draws.

    python tools/readme_pictures.py     docs/images/denoising.webp, generate.png, sweep.png and demo.png; needs the extras demo
                                        and test, and Chromium

The moving picture shows the latents after each step, as the VAE decodes them; generate.png what the commands of
docs/generation.md give; sweep.png what `dit sweep` draws; the screenshot a `dit demo` that has drawn.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from dit.pipeline.generate import load_pipeline
from dit.utils.autoencoder import decode_latents
from dit.utils.images import grid, labelled_grid, to_images

ROOT = Path(__file__).parent.parent
IMAGES, MODEL = ROOT / "docs" / "images", ROOT / "models" / "dit"
PROMPTS = (
    "a large yellow star on a dark blue background",
    "a red circle above a blue square",
    "a small green cross to the left of a large pink heart",
    "a purple square and an orange circle on a black background",
    "a teal triangle",
    "an orange heart below a green square",
)
STEPS, GUIDANCE = 24, 1.5
FRAME, LAST_FRAME = 90, 2500  # milliseconds
WINDOW = {"width": 1280, "height": 720}


def denoising(path: Path) -> None:
    """Write the way from noise to the images of `PROMPTS`, side by side, as an animation that repeats."""
    pipeline = load_pipeline(MODEL, "stochastic")
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []

    def watch(pipeline: object, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        seen.append(tensors["latents"].clone())
        return {}

    generator = [torch.Generator().manual_seed(42 + k) for k in range(len(PROMPTS))]
    pipeline(
        list(PROMPTS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=generator,
        output_type="latent",
        callback_on_step_end=watch,
    )
    frames = [grid(to_images(decode_latents(pipeline.vae, latents)), columns=len(PROMPTS), scale=2) for latents in seen]
    durations = [FRAME] * (len(frames) - 1) + [LAST_FRAME]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=50, method=6)


def editing(path: Path) -> None:
    """Write an image, the same with other colours, a mask, and the image with the masked part generated again, side by side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [folder / f"{part}.png" for part in ("generated", "changed", "mask", "mended")]
        generated, changed, mask, mended = map(str, files)
        Image.linear_gradient("L").resize((64, 64)).save(mask)
        for arguments in (
            ["a large red circle above a small blue cross", "--output", generated],
            ["a large green circle above a small yellow cross", "--image", generated, "--strength", "0.6", "--output", changed],
            ["a large red circle above a small green square", "--image", generated, "--mask", mask, "--output", mended],
        ):
            dit(["generate", "--checkpoint", str(MODEL), "--prompt", *arguments])
        labels = ["generated.png", "changed.png: another prompt, strength 0.6", "mask.png", "mended.png: a green square"]
        images = [Image.open(file).convert("RGB").resize((192, 192), Image.Resampling.NEAREST) for file in files]
        path.write_bytes(_small(labelled_grid(images, labels, columns=4, cell=192)))


def sweep(path: Path) -> None:
    """Write which guidance scales and numbers of steps are worth their time."""
    with tempfile.TemporaryDirectory() as folder:
        dit(["sweep", "--checkpoint", str(MODEL), "--output", f"{folder}/sweep"])
        path.write_bytes(_small(Image.open(f"{folder}/sweep.png")))


def dit(arguments: list[str]) -> None:
    """Run `dit` with these arguments."""
    subprocess.run([sys.executable, "-m", "dit.cli", *arguments], cwd=ROOT, check=True)


def screenshot(path: Path) -> None:
    """Write what `dit demo` shows after it has drawn four images."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dit.cli", "demo", "--port", str(port), "--no-browser"]
        process = subprocess.Popen([*command, "--checkpoint", str(MODEL), "--output", f"{folder}/drawings"], cwd=folder)
        try:
            _wait_for(f"http://127.0.0.1:{port}")
            path.write_bytes(_small(Image.open(io.BytesIO(_drawn_page(f"http://127.0.0.1:{port}")))))
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


def _drawn_page(address: str) -> bytes:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    as_root = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--disable-gpu", *as_root])
        page = browser.new_context(locale="en-US", viewport=WINDOW).new_page()
        page.goto(address)
        page.wait_for_selector("#draw", timeout=60_000)
        page.locator("#draw-prompt textarea").first.fill(PROMPTS[2])
        page.locator("#draw-count input[type=number]").first.fill("4")
        page.keyboard.press("Tab")
        page.click("#draw")
        page.wait_for_function("document.querySelector('#status')?.textContent.includes('Done in')", timeout=60_000)
        page.wait_for_timeout(1500)
        shot = page.screenshot()
        browser.close()
    return shot


def _small(image: Image.Image) -> bytes:
    """Return `image` as a PNG of 256 colours: half the bytes."""
    small = io.BytesIO()
    image.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    """Make all of them."""
    denoising(IMAGES / "denoising.webp")
    editing(IMAGES / "generate.png")
    sweep(IMAGES / "sweep.png")
    screenshot(IMAGES / "demo.png")


if __name__ == "__main__":
    main()
