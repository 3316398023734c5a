"""All metrics of a trained model and its samples; docs/evaluation.md explains each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from dit.config import Evaluate, Runtime
from dit.dataset.decode import open_named
from dit.dataset.reader import Entry
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.evaluation.accuracy import accuracy, accuracy_by_attribute, accuracy_by_number
from dit.evaluation.clip import ClipFeatures, clip_scores, fastest_device, open_images, read_split
from dit.evaluation.distribution import compare_sets, measure_diversity
from dit.evaluation.figures import plot_nearest, plot_worst
from dit.evaluation.image_features import ImageFeatures
from dit.evaluation.intervals import mean_with_interval, with_interval
from dit.evaluation.losses import measure_losses
from dit.evaluation.memorization import find_nearest, measure_memorization
from dit.latents.cache import LatentCache
from dit.shapes.scoring import score_image

SCORED_GROUPS = ("val", "unseen")  # groups of prompts; "diversity" has several images of each prompt, "own" is only shown


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name, and the rows of three tables; `by_attribute` and `by_number` are empty where no prompt can be scored."""

    metrics: dict[str, float]
    by_attribute: list[dict[str, str | float]]
    by_number: list[dict[str, str | float]]
    by_timestep: list[dict[str, float]]


def evaluate_samples(
    samples: Path, model: Path, latents: Path, raw: Path, settings: Evaluate, runtime: Runtime, worst: Path, nearest: Path
) -> Evaluation:
    """Measure the images in `samples` and the model that generated them; the same files give the same metrics.

    Args:
        samples: images and their `prompts.json`, as the sample stage writes them.
        model: the trained model's folder.
        latents: the cache whose validation images give the loss.
        raw: the data set, whose images the samples are compared with.
        settings: confidence and resamples of the intervals, passes of the validation loss.
        runtime: how many processes decode images.
        worst, nearest: image files to write, of the worst samples and of those nearest to a training image.

    Raises:
        UserError: there are no samples, or an image of the data set cannot be read.
    """
    if not (samples / "prompts.json").exists():
        raise UserError(f"{samples}: no samples to evaluate; `dvc repro` generates them first")
    prompts = json.loads((samples / "prompts.json").read_text(encoding="utf-8"))
    groups = {group: [prompt for prompt in prompts if prompt["group"] == group] for group in (*SCORED_GROUPS, "diversity")}
    scored = groups["val"] + groups["unseen"]
    images, texts = [_open(samples, prompt) for prompt in scored], [prompt["text"] for prompt in scored]
    count = len(groups["val"])
    metrics: dict[str, float] = {}

    prompt_scores = [score_image(image, text) for image, text in zip(images, texts, strict=True)]
    val, unseen = ([score for score in half if score] for half in (prompt_scores[:count], prompt_scores[count:]))
    metrics |= accuracy("prompt_accuracy", val, settings.confidence)
    metrics |= accuracy("prompt_accuracy_unseen", unseen, settings.confidence)
    by_attribute = accuracy_by_attribute(val, settings.confidence)
    by_number = accuracy_by_number({"val": val, "unseen": unseen}, settings.confidence)
    for row in by_attribute:
        metrics |= with_interval(f"prompt_accuracy_{row['attribute']}", row["accuracy"], (row["low"], row["high"]))

    cache = LatentCache(latents)
    clip = ClipFeatures(EncoderSource(**cache.index["clip"]), fastest_device())
    features = clip.embed_images(images, len(images), "CLIP: samples")
    scores = clip_scores(features, clip.embed_texts(texts)).double().numpy()
    metrics |= mean_with_interval("clip_score", scores, settings, (0, 100), digits=3)
    plot_worst(images, texts, [score.problem if score else None for score in prompt_scores], scores, worst)

    training, held_out = read_split(raw, "train"), read_split(raw, "val")

    def embed(
        entries: list[Entry], label: str, change: Callable[[Image.Image], Image.Image] = lambda image: image
    ) -> torch.Tensor:
        opened = open_images(raw, entries, cache.sizes, runtime)
        return clip.embed_images(map(change, opened), len(entries), f"CLIP: {label}")

    real = embed(held_out, "held-out images")
    metrics |= compare_sets(real, features[:count], settings)
    if settings.features != "clip":
        compared = min(len(held_out), count)
        model_features = ImageFeatures(settings.features, fastest_device())
        sets = (open_images(raw, held_out[:compared], cache.sizes, runtime), iter(images[:compared]))
        labels = (f"{model_features.name}: {what}" for what in ("held-out images", "samples"))
        of_real, of_fake = (model_features.embed_images(each, compared, text) for each, text in zip(sets, labels, strict=True))
        metrics |= compare_sets(of_real, of_fake, settings, model_features.name)
    repeated = groups["diversity"]
    diverse = clip.embed_images((_open(samples, prompt) for prompt in repeated), len(repeated), "CLIP: several of a prompt")
    metrics |= measure_diversity(diverse, [prompt["text"] for prompt in repeated], settings)

    known = embed(training, "training images")
    of_held_out = find_nearest(real, embed(held_out, "held-out images, mirrored", ImageOps.mirror), known)
    mirrored = clip.embed_images(map(ImageOps.mirror, images[:count]), count, "CLIP: samples, mirrored")
    of_samples = find_nearest(features[:count], mirrored, known)
    metrics |= measure_memorization(of_samples.distance, of_held_out.distance, settings.confidence)
    plot_nearest(images[:count], texts[:count], of_samples, of_held_out.distance, raw, training, nearest)

    losses, by_timestep = measure_losses(model, cache, settings, fastest_device())
    return Evaluation(metrics | losses, by_attribute, by_number, by_timestep)


def _open(samples: Path, prompt: dict[str, Any]) -> Image.Image:
    path = samples / prompt["file"]
    return open_named(path.read_bytes(), path)
