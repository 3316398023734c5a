"""Fit the bundled encoders on rendered scenes: `python -m tools.fit_encoders.fit`, some three hours on 2 cores with AMX.

Writes `clip` and `vae` in `dit/encoders/builtin/`, each with a README of its quality, measured on scenes that it has not
seen. The pipeline does not need this: the fitted weights are part of the repository.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from dit.encoders.loading import BUILTIN
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Description, Kind, Scene, sample_description
from tools.fit_encoders.clip import choice_accuracy, fit_clip
from tools.fit_encoders.scene_labels import scene_code
from tools.fit_encoders.vae import CELLS, IMAGE_SIZE, fit_vae, reconstruction_psnr

KINDS = (Kind("free", 1), Kind("free", 2), Kind("free", 3), Kind("quarters", 2))  # of scene 0, 1 …, in turns
CLIP_STREAM, MEASURE_STREAM, VAE_STREAM = 101, 102, 7001  # scenes of their own, see shapes/prompts.py
CLIP_SCENES, VAE_SCENES, MEASURED = 20_000, 30_000, 1_000
CLIP_STEPS = 2000
VAE_STEPS = {"encoder_steps": 6000, "decoder_steps": 3400, "steps": 27_000}
POINTED = ("star", "triangle")
CLIP_README = """\
# The bundled CLIP: CLIPModel and CLIPTokenizer

{parameters:.2f} M parameters in fp16, fitted by `python -m tools.fit_encoders.fit clip` on {scenes:,} rendered scenes in \
{steps} steps, {minutes:.0f} minutes in bf16 on {threads} threads. It picks the right caption among 32 that differ in one \
attribute {choice:.1%} of the time ({choices} scenes that it has not seen).
"""
VAE_README = """\
# The bundled VAE: AutoencoderKL, 8x down, 16 channels

{parameters:.2f} M parameters in fp16, fitted by `python -m tools.fit_encoders.fit vae` on {scenes:,} rendered scenes and what \
they show: {encoder_steps:,} steps of the encoder, {decoder_steps:,} of the decoder and {steps:,} of both together, \
{minutes:.0f} minutes in bf16 on {threads} threads. Its reconstructions of {measured} scenes that it has not seen have a PSNR \
of {psnr:.1f} dB.
"""


def render_scenes(count: int, stream: int) -> tuple[np.ndarray, list[Description], list[Scene]]:
    """Render `count` scenes without unseen pairs: images (N, H, W, 3) uint8, their descriptions, and the scenes."""
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    descriptions, scenes = [], []
    for k in tqdm(range(count), desc="render", unit="image"):
        rng, kind = np.random.default_rng([stream, k]), KINDS[k % len(KINDS)]
        descriptions.append(sample_description(rng, kind))
        scenes.append(sample_scene(descriptions[-1], rng, kind.layout))
        images[k] = render(scenes[-1], IMAGE_SIZE)
    return images, descriptions, scenes


def fit_and_save_clip(folder: Path) -> float:
    """Fit a CLIP, write it to `folder` with its README, and return how often it picks the right caption among 32."""
    images, descriptions, layouts = render_scenes(CLIP_SCENES, CLIP_STREAM)
    start = time.perf_counter()
    clip, tokenizer = fit_clip(images, descriptions, layouts, CLIP_STEPS)
    minutes = (time.perf_counter() - start) / 60
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    fresh, described, _ = render_scenes(MEASURED, MEASURE_STREAM)
    choice, choices = choice_accuracy(clip.float(), tokenizer, fresh, described)
    facts = {"parameters": clip.num_parameters() / 1e6, "scenes": CLIP_SCENES, "steps": CLIP_STEPS, "minutes": minutes}
    _write_readme(folder, CLIP_README, **facts, choice=choice, choices=choices)
    return choice


def fit_and_save_vae(folder: Path) -> float:
    """Fit a VAE, write it to `folder` with its README, and return its PSNR in dB."""
    images, _, scenes = render_scenes(VAE_SCENES, VAE_STREAM)
    codes = torch.from_numpy(np.stack([scene_code(scene, CELLS) for scene in scenes]))
    pointed = np.array([np.mean([shown.shape in POINTED for shown in scene.objects]) for scene in scenes])
    start = time.perf_counter()
    vae = fit_vae(images, codes, pointed, **VAE_STEPS).half()
    minutes = (time.perf_counter() - start) / 60
    vae.save_pretrained(folder)
    quality = reconstruction_psnr(vae.float(), render_scenes(MEASURED, MEASURE_STREAM)[0])
    facts = {"parameters": vae.num_parameters() / 1e6, "scenes": VAE_SCENES, "minutes": minutes, **VAE_STEPS}
    _write_readme(folder, VAE_README, **facts, measured=MEASURED, psnr=quality)
    return quality


def _write_readme(folder: Path, template: str, **facts: float) -> None:
    text = template.format(threads=torch.get_num_threads(), **facts)
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
    print(text, flush=True)


def main() -> None:
    """Fit with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", metavar="ENCODER", help="clip or vae; default: both")
    parser.add_argument("--folder", type=Path, default=BUILTIN, help="default: %(default)s")
    arguments = parser.parse_args()
    wanted = set(arguments.encoders or ("clip", "vae"))
    if wanted - {"clip", "vae"}:
        parser.error(f"no such encoder: {', '.join(sorted(wanted - {'clip', 'vae'}))}; clip and vae are there")
    torch.use_deterministic_algorithms(True, warn_only=True)
    if "clip" in wanted:
        fit_and_save_clip(arguments.folder / "clip")
    if "vae" in wanted:
        fit_and_save_vae(arguments.folder / "vae")


if __name__ == "__main__":
    main()
