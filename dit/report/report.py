"""metrics/report.md: what a model draws, how good that is and what it took, with images, for GitHub to show."""

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
from dit.report.tables import figures_table

WIDEST = 1200  # pixels of an image: as much as GitHub shows
QUALITY = 85  # of WebP: a grid of 24 images takes 60 KB instead of 230 as PNG; these go into git
CELLS = 4  # prompts in a cell of samples/grids/settings.png
WORST = 18  # images in samples/worst.png
SURE = 0.005  # an interval of copies that begins below it begins at 0 %, as people read it
FEW = 0.1  # an interval of copies from 0 to no more than this says that there are hardly any


@dataclass(frozen=True)
class Results:
    """What the stages have left: figures by stage, and tables."""

    metrics: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    by_attribute: pd.DataFrame
    by_number: pd.DataFrame
    by_timestep: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Of the folder `metrics/`."""
        stages = ("download", "encode", "train", "sample", "evaluate")
        metrics = {stage: json.loads((folder / f"{stage}.json").read_text(encoding="utf-8")) for stage in stages}
        tables = ("curves", "accuracy_by_attribute", "accuracy_by_number", "loss_by_timestep")
        return cls(metrics, *(pd.read_csv(folder / f"{name}.csv") for name in tables))


def write_report(results: Results, params: Params, samples: Path, report: Path, pictures: Path) -> None:
    """Write `report` (Markdown) and the `images` that it shows. The same results give the same bytes.

    Args:
        results: all figures.
        params: the settings of the run.
        samples: the folder of the grids and of the worst and the nearest images.
        report: the Markdown file.
        images: a folder beside it.
    """
    pictures.mkdir(parents=True, exist_ok=True)
    shown = [*sorted((samples / "grids").glob("*.png")), samples / "worst.png"]
    shown += [samples / "nearest.png"] if "memorised" in results.metrics["evaluate"] else []
    found = {path.stem: _show(Image.open(path), path.stem, report, pictures) for path in shown}
    found["curves"] = _show(_draw(plot_curves(results)), "curves", report, pictures)
    accuracy, copies, training = _accuracy(results), _copies(results, found), _training(results, found)
    sections = [headline(results, params), *_grids(results, params, found), *accuracy, *copies, *training]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8", newline="\n")


def headline(results: Results, params: Params) -> str:
    """Return the title, the run in a sentence, and the table of figures."""
    train, sample = results.metrics["train"], results.metrics["sample"]
    how, images = params.sample, results.metrics["download"]["train_images"]
    fresh = "; `stochastic` adds fresh noise at each step" if how.scheduler == "stochastic" else ""
    return f"""\
# What this model draws

Recipe `{params.recipe}`: {train["parameters"] / 1e6:.1f} M parameters, trained on {images:,} images for {train["steps"]:,} \
steps in {_duration(train["seconds"])}. Pictures are drawn with `{how.scheduler}` in {how.num_inference_steps} steps at a \
guidance scale of {how.guidance_scale:g}, {sample["sampling_images_per_second"]:.3g} a second{fresh}.

{figures_table(results.metrics["evaluate"], params.evaluate.confidence)}

How each figure is measured, and what it cannot tell: [docs/evaluation.md](../docs/evaluation.md)."""


def _grids(results: Results, params: Params, found: dict[str, str]) -> list[str]:
    titles = {
        "val": "## Captions of the validation set",
        "unseen": "## Captions with a colour and shape that were never seen together",
        "own": "## `sample.prompts` of params.yaml",
        "diversity": "## Five pictures of the same caption",
        "settings": f"## Guidance scale and number of steps\n\n{_say_settings(params)}",
        "denoising": "## From noise to picture\n\nThe latents after some of the steps, as the VAE decodes them.",
        "worst": f"## The worst\n\n{_say_worst(results.metrics['evaluate'])}",
    }
    return [f"{title}\n\n![{name}]({found[name]})" for name, title in titles.items() if name in found]


def _say_settings(params: Params) -> str:
    own = len(params.sample.prompts)
    if own >= CELLS:
        which = "the first four of `sample.prompts`"
    else:
        which = "those of `sample.prompts`, and captions of the validation set" if own else "captions of the validation set"
    text = f"The same prompts from the same seeds in each cell: {which}."
    if params.sample.scheduler == "stochastic":
        text += " Its noise at each step is another one for each number of steps, so that layouts differ, too."
    return text


def _say_worst(figures: dict[str, Any]) -> str:
    judged = [name for name in ("prompt_accuracy", "prompt_accuracy_unseen") if name in figures]
    if not judged:
        return "Those of the lowest CLIP score."
    wrong = sum(round((1 - figures[name]) * figures[f"{name}_prompts"]) for name in judged)
    if wrong > WORST:
        return f"{WORST} of the {wrong} pictures with something wrong, those of the lowest CLIP score."
    return f"Pictures with something wrong, of which there are {wrong}, and then those of the lowest CLIP score."


def _accuracy(results: Results) -> list[str]:
    sections = []
    for title, table, names in (
        ("by attribute", results.by_attribute, ["attribute"]),
        ("by number of things", results.by_number, ["group", "things"]),
    ):
        columns = [*names, "right", "interval", "of how many"]
        lines = [f"## What is right, {title}\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for _, row in table.iterrows():
            what = " | ".join(str(row[name]) for name in names)
            lines.append(f"| {what} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['count']} |")
        sections += [] if table.empty else ["\n".join(lines)]
    return sections


def _copies(results: Results, found: dict[str, str]) -> list[str]:
    figures = results.metrics["evaluate"]
    if "memorised" not in figures:
        return []
    low, high, count = figures["memorised_low"], figures["memorised_high"], figures["memorised_prompts"]
    if low >= SURE:
        verdict = (
            f"**{_percent(figures['memorised'])} ({_percent(low)} to {_percent(high)}) of the samples lie nearer to a training "
            "image than new pictures do, beyond what chance brings.** They may be copies, or between a copy and a new picture: "
            "the pairs below show which. Against copies, more images, more captions of each, `encode.crops` or fewer epochs help."
        )
    elif high <= FEW:
        verdict = "There is no sign that the model copies its training images."
    else:
        images = "One held-out image is" if count == 1 else f"{count} held-out images are"
        verdict = (
            f"**{images} too few to tell:** between 0 % and {_percent(high)} of the samples may be copies. Look at the pairs."
        )
    samples, held_out = figures["samples_same"], figures["held_out_same"]
    rows = [
        "| the nearest training image | samples | held-out images, which training has not seen |",
        "|---|---|---|",
        f"| is the same picture | {_percent(samples, 1)} | {_percent(held_out, 1)} |",
        f"| is nearer than new pictures come (distance below {figures['near_distance']:.3f}) | "
        f"{_percent(figures['nearer_than_held_out'] - samples, 1)} | {_percent(figures['held_out_repeats'] - held_out, 1)} |",
    ]
    text = "## Does it copy?\n\n" + verdict
    if held_out >= 0.01:
        text += " The data repeat themselves, so some new pictures are the same as a training image by chance."
    pairs = (
        "A sample on the left and its nearest training image on the right: the nearest pairs, and then those that only just "
        "count. Pairs of captions whose held-out image is as near to a training image, too, are left out, as chance brings them."
    )
    return [text, "\n".join(rows), f"{pairs}\n\n![nearest]({found['nearest']})"]


def _training(results: Results, found: dict[str, str]) -> list[str]:
    train = results.metrics["train"]
    losses = (
        "The training loss is that of the weights as they are, at noise levels that `logit_mean` spreads; the validation loss is "
        "that of their average, at other levels. By noise level it is high at both ends, since little noise is hard to see, and "
        "so is an image under much of it. The last point of the curve is not quite the `val_loss` of the table: training looks "
        "at some hundred held-out images once, the evaluation at all of them and several times."
    )
    return [
        f"## Training\n\n{train['images_per_second']:,.0f} images/s, {_percent(train['mfu'])} of the machine's matrix-product "
        f"peak; sampling uses {_percent(results.metrics['sample']['sampling_mfu'])} of it. Pictures that go through the VAE and "
        f"back keep a PSNR of {results.metrics['encode']['reconstruction_psnr']} dB. {losses}\n\n![curves]({found['curves']})"
    ]


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


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
    """Store `image` small enough for git; its address, as seen from `report`."""
    picture = picture.convert("RGB")
    if picture.width > WIDEST:
        picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
    path = pictures / f"{name}.webp"
    picture.save(path, quality=QUALITY)
    return path.relative_to(report.parent).as_posix()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
