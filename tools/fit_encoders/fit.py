"""Fit the bundled encoders on rendered scenes: `python -m tools.fit_encoders.fit`, half an hour on 2 cores with bf16.

Writes `dit/encoders/builtin/`: a VAE, a CLIP, and a README with their quality, measured on scenes that neither has
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
from tools.fit_encoders.vae import IMAGE_SIZE, fit_vae, reconstruction_psnr

KINDS = (Kind("free", 1), Kind("free", 2), Kind("free", 3), Kind("quarters", 2))  # of scene 0, 1 …, in turns
CLIP_STREAM, MEASURE_STREAM, VAE_STREAM = 101, 102, 7001  # scenes of their own, see shapes/prompts.py
VAE_STEPS, CLIP_STEPS = 3500, 2000
README = """\
# The bundled encoders

Fitted by `python -m tools.fit_encoders.fit` on {scenes:,} rendered scenes of the source `shapes`, none of which shows or
names one of the colour and shape pairs that are kept unseen. They know such scenes, not photographs.

| | `vae`: AutoencoderKL, 8x down, 4 channels | `clip`: CLIPModel and CLIPTokenizer |
|---|---|---|
| parameters | {vae_parameters:.2f} M | {clip_parameters:.2f} M |
| fitted in | {vae_steps} + {detail_steps} steps, {vae_minutes:.0f} minutes on {cores} cores in bf16 | \
{clip_steps} steps, {clip_minutes:.0f} minutes |
| quality, on unseen scenes | reconstruction PSNR {psnr:.1f} dB ({measured} scenes) | picks the right caption among 32 that \
differ in one attribute {choice:.1%} of the time ({choices} scenes) |

The weights are stored in fp16.
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


def fit(folder: Path, count: int, measured: int, vae_steps: int, clip_steps: int) -> dict[str, float]:
    """Fit both encoders, write them to `folder` with a README, and return their quality."""
    images, descriptions, scenes = render_scenes(count, CLIP_STREAM)
    fresh, described, _ = render_scenes(measured, MEASURE_STREAM)
    start = time.perf_counter()
    clip, tokenizer = fit_clip(images, descriptions, scenes, clip_steps)
    clip_minutes = (time.perf_counter() - start) / 60
    clip.half().save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder / "clip")
    choice, choices = choice_accuracy(clip.float(), tokenizer, fresh, described)
    print(f"CLIP: right caption among 32 {choice:.1%} of {choices} in {clip_minutes:.1f} minutes", flush=True)
    images, _, _ = render_scenes(count, VAE_STREAM)
    start = time.perf_counter()
    vae = fit_vae(images, vae_steps).half()
    vae_minutes = (time.perf_counter() - start) / 60
    vae.save_pretrained(folder / "vae")
    psnr = reconstruction_psnr(vae.float(), fresh)
    print(f"VAE: {psnr:.2f} dB in {vae_minutes:.1f} minutes", flush=True)
    (folder / "README.md").write_text(
        README.format(
            scenes=count,
            measured=measured,
            vae_parameters=vae.num_parameters() / 1e6,
            clip_parameters=clip.num_parameters() / 1e6,
            vae_steps=vae_steps,
            detail_steps=vae_steps // 3,
            cores=torch.get_num_threads(),
            clip_steps=clip_steps,
            vae_minutes=vae_minutes,
            clip_minutes=clip_minutes,
            psnr=psnr,
            choice=choice,
            choices=choices,
        ),
        encoding="utf-8",
        newline="\n",
    )
    return {"psnr": psnr, "choice_accuracy": choice}


def main() -> None:
    """Fit with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUILTIN, help="default: %(default)s")
    parser.add_argument("--scenes", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--measured", type=int, default=1_000, help="default: %(default)s")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="default: %(default)s")
    parser.add_argument("--clip-steps", type=int, default=CLIP_STEPS, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fit(arguments.folder, arguments.scenes, arguments.measured, arguments.vae_steps, arguments.clip_steps)


if __name__ == "__main__":
    main()
