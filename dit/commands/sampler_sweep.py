"""`dit sweep`: what each guidance scale and number of steps of a trained model gives, and what it costs. Nothing is trained."""

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
from dit.pipeline.sampling import Prompt, choose_prompts, draw_batch
from dit.pipeline.schedulers import make_scheduler
from dit.shapes.scoring import score_image

NAMES = {"prompt_accuracy": "share of pictures that are right", "clip_score": "CLIP score"}


@dataclass(frozen=True)
class Setting:
    """One way to draw; the fields are called as in params.yaml."""

    scheduler: str
    num_inference_steps: int
    guidance_scale: float


def sweep(params: Params, model: Path, latents: Path, raw: Path, settings: Sequence[Setting], count: int) -> pd.DataFrame:
    """Draw the same `count` prompts from the same seeds with each of `settings`, and judge them.

    Args:
        params: for the recipe, the seed and the batch size of the sample stage, and the confidence of the intervals.
        model: the trained model's folder.
        latents: its latent cache, which names the CLIP that gives the score where images cannot be judged.
        raw: the data set that the prompts are from.
        settings: what is tried.
        count: number of prompts; half of them with unseen pairs where the recipe is `shapes`.

    Returns:
        A row for each setting: its fields; `prompt_accuracy` in [0, 1], or `clip_score` in [0, 100] where the prompts are not
        about our shapes, with `_low` and `_high`; `prompts`, their number; `evaluations` of the transformer for an image,
        those with and without its caption; `seconds` for a hundred images at the rate of the fastest batch, without loading
        and judging; `difference` to the best setting, at most 0, prompt by prompt, with `_low` and `_high`.

    Raises:
        UserError: the model or the data is not there, there are captions for fewer than two prompts, or a scheduler does not fit
            the model.
    """
    prompts = choose_prompts(raw, params.recipe, replace(params.sample, num_samples=count))
    prompts = [prompt for prompt in prompts if prompt.group in SCORED_GROUPS]
    if len(prompts) < 2:
        raise UserError(f"{raw}: one validation caption, where two are needed; a larger {params.recipe}.data.val_fraction helps")
    judged = all(score_image(Image.new("RGB", (64, 64)), prompt.text) for prompt in prompts)
    clip = None if judged else ClipFeatures(EncoderSource(**LatentCache(latents).index["clip"]), fastest_device())
    pipeline = load_pipeline(model, settings[0].scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if len(prompts) < count:
        print(f"the validation set has captions for {len(prompts)} of {count} prompts", flush=True)
    print(f"{len(prompts)} prompts from the same seeds with each of {len(settings)} settings", flush=True)
    schedulers = {setting.scheduler: None for setting in settings}
    for scheduler in schedulers:  # all of them first, since one that does not fit is better refused now than in an hour
        schedulers[scheduler] = make_scheduler(scheduler, pipeline.config.prediction_type)
    scores, seconds = _draw_and_score(pipeline, prompts, settings, schedulers, params.sample.batch_size, clip)
    name, confidence = "prompt_accuracy" if judged else "clip_score", params.evaluate.confidence
    best = scores[scores.mean(axis=1).argmax()]
    rows = []
    for setting, one, took in zip(settings, scores, seconds, strict=True):
        low, high = interval(one, judged, confidence)
        figures = {name: float(one.mean()), f"{name}_low": low, f"{name}_high": high, "prompts": len(prompts)}
        evaluations = setting.num_inference_steps * (2 if setting.guidance_scale > 1 else 1)
        low, high = interval(one - best, False, confidence)
        behind = {"difference": float((one - best).mean()), "difference_low": low, "difference_high": high}
        rows.append(asdict(setting) | figures | {"evaluations": evaluations, "seconds": took} | behind)
    return pd.DataFrame(rows)


def _draw_and_score(
    pipeline: DiTTextToImagePipeline,
    prompts: list[Prompt],
    settings: Sequence[Setting],
    schedulers: dict[str, SchedulerMixin],
    batch_size: int,
    clip: ClipFeatures | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (S, N) of the N prompts with each of the S settings, and the seconds (S,) that each takes for a hundred images.

    Each batch is drawn with all settings before the next one: where the machine becomes slower, it does so for all of them.
    Batches are of one size, but for the last one, whose rate does not count where it is smaller.
    """
    full = ceil(len(prompts) / ceil(len(prompts) / batch_size))
    scores, seconds = np.empty((len(settings), len(prompts))), np.full(len(settings), np.inf)
    # What happens only once, happens here.
    draw_batch(pipeline, prompts[:full], 1, max(setting.guidance_scale for setting in settings))
    with tqdm(total=scores.size, desc="sweep", unit="image") as progress:
        for start in range(0, len(prompts), full):
            chunk = prompts[start : start + full]
            for k, setting in enumerate(settings):
                progress.set_postfix_str(describe(setting))
                pipeline.scheduler = schedulers[setting.scheduler]
                began = time.perf_counter()
                pictures = draw_batch(pipeline, chunk, setting.num_inference_steps, setting.guidance_scale)
                took = 100 * (time.perf_counter() - began) / len(chunk)
                seconds[k] = min(seconds[k], took) if len(chunk) == full else seconds[k]
                scores[k, start : start + len(chunk)] = score(chunk, pictures, clip)
                progress.update(len(chunk))
    return scores, seconds


def describe(setting: Setting | pd.Series) -> str:
    """In words."""
    steps = "1 step" if setting.num_inference_steps == 1 else f"{setting.num_inference_steps} steps"
    return f"{setting.scheduler}, {steps}, guidance {setting.guidance_scale:g}"


def score(prompts: Sequence[Prompt], pictures: list[Image.Image], clip: ClipFeatures | None) -> np.ndarray:
    """How well each image shows its prompt, (N,) float64: 1 or 0 as judged, or its CLIP score where there is a `clip`."""
    texts = [prompt.text for prompt in prompts]
    if clip is None:
        scores = [score_image(picture, text) for picture, text in zip(pictures, texts, strict=True)]
        return np.array([float(found is not None and not found.problem) for found in scores])
    return clip_scores(clip.of_images(pictures, len(pictures), "CLIP"), clip.of_texts(texts)).double().numpy()


def interval(values: np.ndarray, share: bool, confidence: float) -> tuple[float, float]:
    """Of the mean of `values` (N,): Wilson's where it is a share, else by the standard error."""
    mean = float(values.mean())
    if share:
        return wilson(mean, len(values), confidence)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(values.std(ddof=1)) / len(values) ** 0.5
    return mean - half, mean + half


def cheapest(table: pd.DataFrame, tolerance: float) -> pd.Series:
    """Return the row of the fewest evaluations at most `tolerance` below the best; of equals, the fastest."""
    return table[table["difference"] >= -tolerance].sort_values(["evaluations", "seconds"]).iloc[0]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with intervals in brackets, for a terminal."""
    name = next(column for column in NAMES if column in table)

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


def chance(table: pd.DataFrame) -> float:
    """How far the figures of a setting may be off at random: half of the widest interval."""
    name = next(column for column in NAMES if column in table)
    return float((table[f"{name}_high"] - table[f"{name}_low"]).max() / 2)


def plot(table: pd.DataFrame) -> Figure:
    """Quality against seconds: a line for each scheduler and guidance scale, a point for each number of steps."""
    name = next(column for column in NAMES if column in table)
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
    axes.set_xlabel("seconds for 100 pictures; the number at a point is that of its steps")
    axes.set_ylabel(NAMES[name])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
