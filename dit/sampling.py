"""Which prompts a model is judged on, and the pictures it draws for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dit.config import Sample
from dit.files import write_json
from dit.images import labelled_grid
from dit.pipeline import load_pipeline
from dit.sources.dataset import read_metadata
from dit.sources.shapes import unseen_prompts

SHOWN = 24  # pictures in a grid


@dataclass(frozen=True)
class Prompt:
    """One picture to draw.

    Attributes:
        file: name of the picture.
        text: the caption.
        seed: of its noise.
        group: "val" for a caption of the validation set, "unseen" for one with a colour and shape never seen together.
    """

    file: str
    text: str
    seed: int
    group: str


def choose_prompts(raw: Path, recipe: str, count: int, seed: int) -> list[Prompt]:
    """The first caption of each validation image; of the drawn shapes, as many prompts again with unseen pairs."""
    captions: dict[str, str] = {}
    for entry in read_metadata(raw):
        if entry.split == "val":
            captions.setdefault(entry.image, entry.text)
    unseen = unseen_prompts(count // 2, seed) if recipe == "shapes" else []
    texts = [(text, "val") for text in list(captions.values())[: count - len(unseen)]]
    texts += [(text, "unseen") for text in unseen]
    return [Prompt(f"{k:05d}.png", text, seed + k, group) for k, (text, group) in enumerate(texts)]


def draw_prompts(model: Path, prompts: list[Prompt], settings: Sample, images: Path, grids: Path) -> None:
    """Draw every prompt into `images` (with `prompts.json` beside the pictures), and the first of each group into `grids`."""
    pipeline = load_pipeline(model, settings.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images.mkdir(parents=True, exist_ok=True)
    grids.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[tuple[Image.Image, str]]] = {}
    progress = tqdm(total=len(prompts), desc="sample", unit="image")
    for start in range(0, len(prompts), settings.batch_size):
        chunk = prompts[start : start + settings.batch_size]
        pictures = pipeline(
            [prompt.text for prompt in chunk],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in chunk],
        ).images
        for prompt, picture in zip(chunk, pictures, strict=True):
            picture.save(images / prompt.file)
            shown.setdefault(prompt.group, [])
            if len(shown[prompt.group]) < SHOWN:
                shown[prompt.group].append((picture, prompt.text))
        progress.update(len(chunk))
    progress.close()
    write_json(images / "prompts.json", [asdict(prompt) for prompt in prompts])
    for group, pairs in shown.items():
        labelled_grid(*zip(*pairs, strict=True), columns=6).save(grids / f"{group}.png")
