"""Quality and cost of a trained model with several schedulers, guidance scales and numbers of steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from diffusers import SchedulerMixin
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from dit.config import Params
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.evaluation.clip import ClipFeatures, clip_scores, fastest_device
from dit.evaluation.intervals import wilson
from dit.evaluation.metrics import SCORED_GROUPS
from dit.latents.cache import LatentCache
from dit.pipeline.generate import load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.sampling import Prompt, choose_prompts, generate_prompts
from dit.pipeline.schedulers import make_scheduler
from dit.shapes.scoring import score_image

METRICS = {"prompt_accuracy": "share of images that are right", "clip_score": "CLIP score"}


@dataclass(frozen=True)
class Setting:
    """One way to sample; the fields are named as in params.yaml."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float


def sweep(params: Params, model: Path, latents: Path, raw: Path, settings: Sequence[Setting], count: int) -> pd.DataFrame:
    """Sample the same `count` prompts from the same seeds with each of `settings`, and score the images.

    Args:
        params: for the recipe, the seed and the batch size of the sample stage, and the confidence of the intervals.
        model: the trained model's folder.
        latents: its latent cache, which names the CLIP that scores images that are not of coloured shapes.
        raw: the data set that the prompts are from.
        settings: what is tried.
        count: number of prompts; half of them with unseen pairs where the recipe is `shapes`.

    Returns:
        A row for each setting: its fields; `prompt_accuracy` in [0, 1], or `clip_score` in [0, 100] where the prompts are not
        about our shapes, with `_low` and `_high`; `prompts`, their number; `evaluations` of the transformer for an image,
        those with and without its caption; `seconds` for a hundred images at the rate of the fastest batch, without loading
        and scoring; `difference` to the best setting, at most 0, prompt by prompt, with `_low` and `_high`.

    Raises:
        UserError: the model or the data is not there, there are captions for fewer than two prompts, or a scheduler does not fit
            the model.
    """
    prompts = choose_prompts(raw, params.recipe, replace(params.sample, num_samples=count))
    prompts = [prompt for prompt in prompts if prompt.group in SCORED_GROUPS]
    if len(prompts) < 2:
        raise UserError(f"{raw}: one validation caption, where two are needed; a larger {params.recipe}.data.val_fraction helps")
    shapes = all(score_image(Image.new("RGB", (64, 64)), prompt.text) for prompt in prompts)
    clip = None if shapes else ClipFeatures(EncoderSource(**LatentCache(latents).index["clip"]), fastest_device())
    pipeline = load_pipeline(model, settings[0].scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if len(prompts) < count:
        print(f"the validation set has captions for {len(prompts)} of {count} prompts", flush=True)
    print(f"{len(prompts)} prompts from the same seeds with each of {len(settings)} settings", flush=True)
    # All of them first, since one that does not fit is better refused now than in an hour.
    names = dict.fromkeys(setting.scheduler for setting in settings)
    schedulers = {name: make_scheduler(name, pipeline.config.prediction_type) for name in names}
    scores, seconds = _sample_and_score(pipeline, prompts, settings, schedulers, params.sample.batch_size, clip)
    metric, confidence = "prompt_accuracy" if shapes else "clip_score", params.evaluate.confidence
    best = scores[scores.mean(axis=1).argmax()]
    rows = []
    for setting, one, took in zip(settings, scores, seconds, strict=True):
        rows.append(
            asdict(setting)
            | _mean_with_interval(metric, one, shapes, confidence)
            | {"prompts": len(prompts)}
            | {"evaluations": setting.num_inference_steps * (2 if setting.guidance_scale > 1 else 1), "seconds": took}
            | _mean_with_interval("difference", one - best, False, confidence)
        )
    return pd.DataFrame(rows)


def _mean_with_interval(name: str, values: np.ndarray, share: bool, confidence: float) -> dict[str, float]:
    low, high = interval(values, share, confidence)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def _sample_and_score(
    pipeline: DiTTextToImagePipeline,
    prompts: list[Prompt],
    settings: Sequence[Setting],
    schedulers: dict[str, SchedulerMixin],
    batch_size: int,
    clip: ClipFeatures | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores (S, N) of N prompts with S settings, and the seconds (S,) of each for a hundred images.

    Each batch is sampled with all settings before the next one: where the machine becomes slower, it does so for all of them.
    Batches are of one size, but for the last one, whose rate does not count where it is smaller.
    """
    full = ceil(len(prompts) / ceil(len(prompts) / batch_size))
    scores, seconds = np.empty((len(settings), len(prompts))), np.full(len(settings), np.inf)
    # To warm up.
    list(generate_prompts(pipeline, prompts[:full], 1, max(setting.guidance_scale for setting in settings)))
    with tqdm(total=scores.size, desc="sweep", unit="image") as progress:
        for start in range(0, len(prompts), full):
            chunk = prompts[start : start + full]
            for k, setting in enumerate(settings):
                progress.set_postfix_str(describe(setting))
                pipeline.scheduler = schedulers[setting.scheduler]
                began = time.perf_counter()
                images = list(generate_prompts(pipeline, chunk, setting.num_inference_steps, setting.guidance_scale))
                took = 100 * (time.perf_counter() - began) / len(chunk)
                seconds[k] = min(seconds[k], took) if len(chunk) == full else seconds[k]
                scores[k, start : start + len(chunk)] = score(chunk, images, clip)
                progress.update(len(chunk))
    return scores, seconds


def describe(setting: Setting | pd.Series) -> str:
    """Word a setting, such as "euler, 10 steps, guidance 1.5"."""
    steps = "1 step" if setting.num_inference_steps == 1 else f"{setting.num_inference_steps} steps"
    return f"{setting.scheduler}, {steps}, guidance {setting.guidance_scale:g}"


def score(prompts: Sequence[Prompt], images: list[Image.Image], clip: ClipFeatures | None) -> np.ndarray:
    """Score how well images show their prompts, (N,) float64: 1 for right and 0, or the CLIP score where there is a `clip`."""
    texts = [prompt.text for prompt in prompts]
    if clip is None:
        scores = [score_image(image, text) for image, text in zip(images, texts, strict=True)]
        return np.array([float(found is not None and not found.problem) for found in scores])
    return clip_scores(clip.embed_images(images, len(images), "CLIP"), clip.embed_texts(texts)).double().numpy()


def interval(values: np.ndarray, share: bool, confidence: float) -> tuple[float, float]:
    """Return the confidence interval of the mean of `values` (N,): Wilson's if it is a share, else by the standard error."""
    mean = float(values.mean())
    if share:
        return wilson(mean, len(values), confidence)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean - half, mean + half


def cheapest(table: pd.DataFrame, tolerance: float) -> pd.Series:
    """Return the row of the fewest evaluations at most `tolerance` below the best; of equals, the fastest."""
    return table[table["difference"] >= -tolerance].sort_values(["evaluations", "seconds"]).iloc[0]


def _metric(table: pd.DataFrame) -> str:
    return next(name for name in METRICS if name in table)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with intervals in brackets, for a terminal."""
    name = _metric(table)

    def with_ends(column: str) -> list[str]:
        return [f"{row[column]:.3f} ({row[f'{column}_low']:.3f} to {row[f'{column}_high']:.3f})" for _, row in table.iterrows()]

    return pd.DataFrame(
        {
            "scheduler": table["scheduler"],
            "steps": table["num_inference_steps"],
            "guidance": table["guidance_scale"],
            name: with_ends(name),
            "seconds for 100": table["seconds"].map("{:.2f}".format),
            "difference to the best": with_ends("difference"),
        }
    )


def margin_of_error(table: pd.DataFrame) -> float:
    """Return half of the widest interval of a setting's metric."""
    name = _metric(table)
    return float((table[f"{name}_high"] - table[f"{name}_low"]).max() / 2)


def plot(table: pd.DataFrame) -> Figure:
    """Plot quality against seconds: a line for each scheduler and guidance scale, a point for each number of steps."""
    name = _metric(table)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lines = table.sort_values("num_inference_steps").groupby(["scheduler", "guidance_scale"])
    for number, ((scheduler, scale), rows) in enumerate(lines):
        errors = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
        color, label = f"C{number}", f"{scheduler}, guidance {scale:g}"
        axes.errorbar(rows["seconds"], rows[name], errors, label=label, color=color, marker="o", markersize=4, capsize=2)
        # Beside the error bar: right and left in turn, since two lines may have points in the same place.
        offset, ha = ((5, 4), "left") if number % 2 == 0 else ((-5, -10), "right")
        for _, row in rows.iterrows():
            at = (row["seconds"], row[name])
            text = f"{row['num_inference_steps']:g}"
            axes.annotate(text, at, offset, textcoords="offset points", fontsize=7, color=color, ha=ha)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds for 100 images; the number at a point is that of its steps")
    axes.set_ylabel(METRICS[name])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
