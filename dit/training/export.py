"""Write a trained transformer as a diffusers model folder: weights, scheduler, which encoders it needs, a model card."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import diffusers

from dit.config import Model, Optim, Train
from dit.latents.cache import LatentCache
from dit.model.objectives import euler_scheduler, make_objective
from dit.model.transformer import DiT
from dit.utils.files import write_json

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
---
# A text-to-image Diffusion Transformer

{parameters:.1f} M parameters, trained from scratch with {objective} on {images} images of {size} x {size} pixels for
{epochs} epochs at batch size {batch}. These are the moving average (EMA) weights, in fp32.

    from dit.pipeline.pipeline import DiTTextToImagePipeline

    pipeline = DiTTextToImagePipeline.from_pretrained("models/dit")
    pipeline("{prompt}").images[0].save("picture.png")

It needs the VAE `{vae}` and the CLIP text encoder `{clip}`, which are loaded with it. What it can draw is what the
captions of its training set speak of; the data's own licence and biases apply.

Settings:

{settings}
"""


def save_model(folder: Path, transformer: DiT, cache: LatentCache, model: Model, optim: Optim, train: Train) -> None:
    """Write the model folder. The same training gives the same bytes: no run id, no time stamp, no machine."""
    transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    objective = make_objective(train.objective, train.prediction_type)
    scheduler = euler_scheduler(objective.prediction_type)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTTextToImagePipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["dit.model.transformer", "DiT"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "prediction_type": objective.prediction_type,
        "encoders": {"vae": cache.index["vae"], "clip": cache.index["clip"], "image_size": cache.index["image_size"]},
    }
    write_json(folder / "model_index.json", index)
    settings = {"model": asdict(model), "optim": asdict(optim), "train": asdict(train)}
    card = CARD.format(
        parameters=transformer.num_parameters() / 1e6,
        images=len(cache.train),
        size=cache.index["image_size"],
        objective="rectified flow" if train.objective == "flow" else f"DDPM ({train.prediction_type})",
        epochs=optim.num_epochs,
        batch=train.batch_size * train.gradient_accumulation_steps,
        prompt=cache.captions(cache.val[:1])[0][0]["text"].replace('"', "'"),
        vae=cache.index["vae"]["name"],
        clip=cache.index["clip"]["name"],
        settings="\n".join("    " + line for line in json.dumps(settings, indent=2).splitlines()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
