"""The figures that experiments are compared by: docs/evaluation.md says what each of them means."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from dit.config import Evaluate, Runtime
from dit.dataset.reader import Entry
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.evaluation.accuracy import accuracy, accuracy_by_attribute, accuracy_by_number
from dit.evaluation.clip import ClipFeatures, clip_scores, fastest_device, images_of, open_images
from dit.evaluation.distribution import compare_sets, measure_diversity
from dit.evaluation.figures import plot_nearest, plot_worst
from dit.evaluation.intervals import mean_with_interval, with_interval
from dit.evaluation.losses import measure_losses
from dit.evaluation.memorization import find_nearest, memorization
from dit.latents.cache import LatentCache
from dit.shapes.scoring import score_image

SCORED_GROUPS = ("val", "unseen")  # groups of prompts; "diversity" is several images of each, "own" is for looking at


@dataclass(frozen=True)
class Evaluation:
    """`metrics` by name, and the rows of three tables; `by_attribute` and `by_number` need prompts that can be judged."""

    metrics: dict[str, float]
    by_attribute: list[dict[str, str | float]]
    by_number: list[dict[str, str | float]]
    by_timestep: list[dict[str, float]]


def evaluate_samples(
    samples: Path, model: Path, latents: Path, raw: Path, settings: Evaluate, runtime: Runtime, worst: Path, nearest: Path
) -> Evaluation:
    """Judge the images in `samples` and the model that drew them; the same files give the same figures.

    Args:
        samples: images and their `prompts.json`, as the sample stage wrote them.
        model: the trained model's folder.
        latents: the cache whose validation images give the loss.
        raw: the data set, whose images the images are compared with.
        settings: confidence of the intervals and how they are drawn, passes of the validation loss.
        runtime: how many processes decode images.
        worst, nearest: where the worst images are drawn, with what is wrong with them, and those most like a training image.

    Raises:
        UserError: there are no images, or an image of the data set cannot be read.
    """
    if not (samples / "prompts.json").exists():
        raise UserError(f"{samples}: no pictures to judge; `dvc repro` draws them first")
    prompts = json.loads((samples / "prompts.json").read_text(encoding="utf-8"))
    groups = {group: [prompt for prompt in prompts if prompt["group"] == group] for group in (*SCORED_GROUPS, "diversity")}
    judged = groups["val"] + groups["unseen"]
    pictures, texts = [_open(samples, prompt) for prompt in judged], [prompt["text"] for prompt in judged]
    count = len(groups["val"])
    metrics: dict[str, float] = {}

    judgements = [score_image(picture, text) for picture, text in zip(pictures, texts, strict=True)]
    val, unseen = ([judgement for judgement in half if judgement] for half in (judgements[:count], judgements[count:]))
    metrics |= accuracy("prompt_accuracy", val, settings.confidence)
    metrics |= accuracy("prompt_accuracy_unseen", unseen, settings.confidence)
    by_attribute = accuracy_by_attribute(val, settings.confidence)
    by_number = accuracy_by_number({"val": val, "unseen": unseen}, settings.confidence)
    for row in by_attribute:
        metrics |= with_interval(f"prompt_accuracy_{row['attribute']}", row["accuracy"], (row["low"], row["high"]))

    cache = LatentCache(latents)
    clip = ClipFeatures(EncoderSource(**cache.index["clip"]), fastest_device())
    features = clip.of_images(pictures, len(pictures), "CLIP: samples")
    scores = clip_scores(features, clip.of_texts(texts)).double().numpy()
    metrics |= mean_with_interval("clip_score", scores, settings, (0, 100), digits=3)
    plot_worst(pictures, texts, [found.problem if found else None for found in judgements], scores, worst)

    training, held_out = images_of(raw, "train"), images_of(raw, "val")

    def of_data(images: list[Entry], name: str, change: Callable[[Image.Image], Image.Image] = lambda image: image):
        opened = open_images(raw, images, cache.index["image_size"], runtime)
        return clip.of_images(map(change, opened), len(images), f"CLIP: {name}")

    real = of_data(held_out, "held-out images")
    metrics |= compare_sets(real, features[:count], settings)
    several = groups["diversity"]
    drawn = clip.of_images((_open(samples, prompt) for prompt in several), len(several), "CLIP: several of a prompt")
    metrics |= measure_diversity(drawn, [prompt["text"] for prompt in several], settings)

    known = of_data(training, "training images")
    of_held_out = find_nearest(real, of_data(held_out, "held-out images, mirrored", ImageOps.mirror), known)
    mirrored = clip.of_images(map(ImageOps.mirror, pictures[:count]), count, "CLIP: samples, mirrored")
    of_samples = find_nearest(features[:count], mirrored, known)
    metrics |= memorization(of_samples.distance, of_held_out.distance, settings.confidence)
    plot_nearest(pictures[:count], texts[:count], of_samples, of_held_out.distance, raw, training, nearest)

    losses, by_timestep = measure_losses(model, cache, settings, fastest_device())
    return Evaluation(metrics | losses, by_attribute, by_number, by_timestep)


def _open(samples: Path, prompt: dict) -> Image.Image:
    return Image.open(samples / prompt["file"]).convert("RGB")
