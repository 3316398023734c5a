"""metrics/report.md: what a model draws, how good that is and what it took, with pictures, for GitHub to show."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dit.config import Params
from dit.figures import figures_table

WIDEST = 1200  # pixels of a picture: as much as GitHub shows
QUALITY = 85  # of WebP: a grid of 24 pictures takes 60 KB instead of 230 as PNG; these go into git


@dataclass(frozen=True)
class Results:
    """What the stages have left: figures by stage, and tables."""

    metrics: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    by_attribute: pd.DataFrame
    by_timestep: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Of the folder `metrics/`."""
        stages = ("download", "encode", "train", "sample", "evaluate")
        metrics = {stage: json.loads((folder / f"{stage}.json").read_text(encoding="utf-8")) for stage in stages}
        tables = (pd.read_csv(folder / f"{name}.csv") for name in ("curves", "accuracy_by_attribute", "loss_by_timestep"))
        return cls(metrics, *tables)


def write_report(results: Results, params: Params, samples: Path, report: Path, pictures: Path) -> None:
    """Write `report` (Markdown) and the `pictures` that it shows. The same results give the same bytes.

    Args:
        results: all figures.
        params: the settings of the run.
        samples: the folder of the grids and of the worst and the nearest pictures.
        report: the Markdown file.
        pictures: a folder beside it.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = {}
    for path in sorted([*(samples / "grids").glob("*.png"), samples / "worst.png", samples / "nearest.png"]):
        found[path.stem] = _show(Image.open(path), path.stem, report, pictures)
    found["curves"] = _show(_draw(plot_curves(results)), "curves", report, pictures)
    attributes, copies, training = _attributes(results), _copies(results, found), _training(results, found)
    sections = [headline(results, params), *_grids(found), *attributes, *copies, *training]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8", newline="\n")


def headline(results: Results, params: Params) -> str:
    """The title, the run in a sentence, and the table of figures."""
    train, sample = results.metrics["train"], results.metrics["sample"]
    how, images = params.sample, results.metrics["download"]["train_images"]
    return f"""\
# What this model draws

Recipe `{params.recipe}`: {train["parameters"] / 1e6:.1f} M parameters, trained on {images:,} images for {train["steps"]:,} \
steps in {_duration(train["seconds"])}. Pictures are drawn with `{how.scheduler}` in {how.num_inference_steps} steps at a \
guidance scale of {how.guidance_scale:g}, {sample["sampling_images_per_second"]:.3g} a second.

{figures_table(results.metrics["evaluate"], params.evaluate.confidence)}

How each figure is measured, and what it cannot tell: [docs/evaluation.md](../docs/evaluation.md)."""


def _grids(found: dict[str, str]) -> list[str]:
    titles = {
        "val": "## Captions of the validation set",
        "unseen": "## Captions with a colour and shape that were never seen together",
        "own": "## `sample.prompts` of params.yaml",
        "diversity": "## Five pictures of the same caption",
        "settings": "## Guidance scale and number of steps\n\nThe same prompts from the same seeds in each cell: the first four "
        "of `sample.prompts`. A stochastic scheduler adds other noise at each step, so that layouts differ, too.",
        "denoising": "## From noise to picture\n\nThe latents after some of the steps, as the VAE decodes them.",
        "worst": "## The worst\n\nPictures with something wrong, and then those of the lowest CLIP score.",
    }
    return [f"{title}\n\n![{name}]({found[name]})" for name, title in titles.items() if name in found]


def _attributes(results: Results) -> list[str]:
    if results.by_attribute.empty:
        return []
    lines = ["## What is right, by attribute\n", "| attribute | right | interval | of |", "|---|---|---|---|"]
    for _, row in results.by_attribute.iterrows():
        lines.append(f"| {row['attribute']} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['count']} |")
    return ["\n".join(lines)]


def _copies(results: Results, found: dict[str, str]) -> list[str]:
    figures = results.metrics["evaluate"]
    if "memorised" not in figures:
        return []
    share, repeats = figures["nearer_than_held_out"], figures["held_out_repeats"]
    if figures["memorised_low"] > 0:
        ends = f"{figures['memorised_low']:.0%} to {figures['memorised_high']:.0%}"
        verdict = (
            f"**{figures['memorised']:.0%} ({ends}) of the samples are copies of training images, beyond those that come about "
            "by chance.** More images, more captions for each, `encode.crops`, or fewer epochs help."
        )
    else:
        verdict = "There is no sign that the model copies its training images."
    text = f"""\
## Does it copy?

{verdict} {share:.0%} of the samples are as near to a training image as the nearest held-out images are; of the held-out \
images themselves {repeats:.0%}."""
    if repeats > 0.05:
        text += " That is more than the 1 % of a set in which all images are different: here, many are the same."
    pairs = "The ten nearest pairs, a sample on the left and its training image on the right:"
    return [f"{text} {pairs}\n\n![nearest]({found['nearest']})"]


def _training(results: Results, found: dict[str, str]) -> list[str]:
    train = results.metrics["train"]
    losses = (
        "The training loss is that of the weights as they are, on the noise levels that training prefers; the validation loss is "
        "that of their average, on others."
    )
    return [
        f"## Training\n\n{train['images_per_second']:,.0f} images/s, {train['mfu']:.0%} of the machine's matrix-product peak; "
        f"sampling {results.metrics['sample']['sampling_mfu']:.0%} of it. The VAE keeps "
        f"{results.metrics['encode']['reconstruction_psnr']} dB of the pictures. {losses}\n\n![curves]({found['curves']})"
    ]


def plot_curves(results: Results) -> Figure:
    """Loss over the steps of the training, and the validation loss by timestep with its interval."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = results.curves
    left.plot(curves["step"], curves["train_loss"], linewidth=1, label="training")
    validated = curves.dropna(subset=["val_loss"])
    left.plot(validated["step"], validated["val_loss"], marker="o", markersize=3, label="validation, averaged weights (EMA)")
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend(fontsize=8)
    times = results.by_timestep
    right.fill_between(times["t"], times["low"], times["high"], alpha=0.25)
    right.plot(times["t"], times["val_loss"], marker="o", markersize=3)
    right.set(xlabel="noise level, 0 is the image and 1 noise", ylabel="validation loss", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _draw(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


def _show(picture: Image.Image, name: str, report: Path, pictures: Path) -> str:
    """Store `picture` small enough for git; its address, as seen from `report`."""
    picture = picture.convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    path = pictures / f"{name}.webp"
    picture.save(path, quality=QUALITY)
    return path.relative_to(report.parent).as_posix()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
