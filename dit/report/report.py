"""metrics/report.md: what a model generates, how good that is and what it cost, with images, for GitHub to show."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dit.config import GRID_PROMPTS, WORST_SHOWN, Params
from dit.report.tables import metrics_table

WIDEST = 1200  # pixels of an image: as much as GitHub shows
QUALITY = 85  # of WebP: a grid of 24 images takes 60 KB instead of 230 as PNG; these go into git
SOME_COPIES = 0.005  # an interval of `memorised` that begins below this begins at 0 % when it is rounded
FEW_COPIES = 0.1  # an interval of `memorised` from 0 to at most this tells that there are hardly any


@dataclass(frozen=True)
class Results:
    """The metrics of all stages, by stage, and the tables of the training and the evaluation."""

    metrics: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    by_attribute: pd.DataFrame
    by_number: pd.DataFrame
    by_timestep: pd.DataFrame

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read the folder `metrics/`."""
        stages = ("download", "encode", "train", "sample", "evaluate")
        metrics = {stage: json.loads((folder / f"{stage}.json").read_text(encoding="utf-8")) for stage in stages}
        tables = ("curves", "accuracy_by_attribute", "accuracy_by_number", "loss_by_timestep")
        return cls(metrics, *(pd.read_csv(folder / f"{name}.csv") for name in tables))


def write_report(results: Results, params: Params, samples: Path, report: Path, images: Path) -> None:
    """Write `report` (Markdown) and the images that it shows. The same results give the same bytes.

    Args:
        results: metrics and tables.
        params: the settings of the run.
        samples: the folder of the grids and of the worst and the nearest samples.
        report: the Markdown file.
        images: a folder beside it, for its images.
    """
    images.mkdir(parents=True, exist_ok=True)
    shown = [*sorted((samples / "grids").glob("*.png")), samples / "worst.png"]
    shown += [samples / "nearest.png"] if "memorised" in results.metrics["evaluate"] else []
    found = {path.stem: _show(Image.open(path), path.stem, report, images) for path in shown}
    found["curves"] = _show(_to_image(plot_curves(results)), "curves", report, images)
    accuracy, copies, training = _accuracy(results), _copies(results, found), _training(results, found)
    sections = [headline(results, params), *_grids(results, params, found), *accuracy, *copies, *training]
    report.write_text("\n\n".join(sections) + "\n", encoding="utf-8", newline="\n")


def headline(results: Results, params: Params) -> str:
    """Return the title, the run in a sentence, and the table of metrics."""
    train, sample = results.metrics["train"], results.metrics["sample"]
    how, images = params.sample, results.metrics["download"]["train_images"]
    fresh = "; `stochastic` adds fresh noise at each step" if how.scheduler == "stochastic" else ""
    return f"""\
# What this model generates

Recipe `{params.recipe}`: {train["parameters"] / 1e6:.1f} M parameters, trained on {images:,} images for {train["steps"]:,} \
steps in {_duration(train["seconds"])}. Samples are generated with `{how.scheduler}` in {how.num_inference_steps} steps at a \
guidance scale of {how.guidance_scale:g}, {sample["sampling_images_per_second"]:.3g} a second{fresh}.

{metrics_table(results.metrics["evaluate"], params.evaluate.confidence)}

How each metric is measured, and what it cannot tell: [docs/evaluation.md](../docs/evaluation.md)."""


def _grids(results: Results, params: Params, found: dict[str, str]) -> list[str]:
    titles = {
        "val": "## Captions of the validation set",
        "unseen": "## Captions with a colour and shape that were never seen together",
        "own": "## `sample.prompts` of params.yaml",
        "diversity": "## Five images of the same caption",
        "settings": f"## Guidance scale and number of steps\n\n{_explain_settings(params)}",
        "denoising": "## From noise to image\n\nThe latents after some of the steps, as the VAE decodes them.",
        "worst": f"## The worst\n\n{_explain_worst(results.metrics['evaluate'])}",
    }
    return [f"{title}\n\n![{name}]({found[name]})" for name, title in titles.items() if name in found]


def _explain_settings(params: Params) -> str:
    own = len(params.sample.prompts)
    if own >= GRID_PROMPTS:
        which = "the first four of `sample.prompts`"
    else:
        which = "those of `sample.prompts`, and captions of the validation set" if own else "captions of the validation set"
    text = f"The same prompts from the same seeds in each cell: {which}."
    if params.sample.scheduler == "stochastic":
        text += " With another number of steps, the noise that is added at each step differs, and so do layouts."
    return text


def _explain_worst(metrics: dict[str, Any]) -> str:
    scored = [name for name in ("prompt_accuracy", "prompt_accuracy_unseen") if name in metrics]
    if not scored:
        return "The samples of the lowest CLIP score."
    wrong = sum(round((1 - metrics[name]) * metrics[f"{name}_prompts"]) for name in scored)
    if wrong > WORST_SHOWN:
        return f"{WORST_SHOWN} of the {wrong} samples with something wrong, those of the lowest CLIP score."
    return f"The samples with something wrong ({wrong}), and then those of the lowest CLIP score."


def _accuracy(results: Results) -> list[str]:
    sections = []
    for title, table, names in (
        ("by attribute", results.by_attribute, ["attribute"]),
        ("by number of objects", results.by_number, ["group", "things"]),
    ):
        columns = [*(name.replace("things", "objects") for name in names), "right", "interval", "of how many"]
        lines = [f"## What is right, {title}\n", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        for _, row in table.iterrows():
            what = " | ".join(str(row[name]) for name in names)
            lines.append(f"| {what} | {row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['count']} |")
        sections += [] if table.empty else ["\n".join(lines)]
    return sections


def _copies(results: Results, found: dict[str, str]) -> list[str]:
    metrics = results.metrics["evaluate"]
    if "memorised" not in metrics:
        return []
    low, high, count = metrics["memorised_low"], metrics["memorised_high"], metrics["memorised_prompts"]
    if low >= SOME_COPIES:
        verdict = (
            f"**{_percent(metrics['memorised'])} ({_percent(low)} to {_percent(high)}) of the samples lie nearer to a training "
            "image than new images do, beyond the rate of held-out images.** They may be copies, or between a copy and a new "
            "image: the pairs below show which. Against copies, more images, more captions of each, `encode.crops` or fewer "
            "epochs help."
        )
    elif high <= FEW_COPIES:
        verdict = "There is no sign that the model copies its training images."
    else:
        images = "One held-out image is" if count == 1 else f"{count} held-out images are"
        verdict = (
            f"**{images} too few to tell:** between 0 % and {_percent(high)} of the samples may be copies. Look at the pairs."
        )
    samples, held_out = metrics["samples_same"], metrics["held_out_same"]
    rows = [
        "| the nearest training image | samples | held-out images, which training has not seen |",
        "|---|---|---|",
        f"| is the same image | {_percent(samples, 1)} | {_percent(held_out, 1)} |",
        f"| is nearer than new images are (distance below {metrics['near_distance']:.3f}) | "
        f"{_percent(metrics['nearer_than_held_out'] - samples, 1)} | {_percent(metrics['held_out_repeats'] - held_out, 1)} |",
    ]
    text = "## Does it copy?\n\n" + verdict
    if held_out >= 0.01:
        text += " The data repeat themselves, so some new images equal a training image although they are no copies."
    pairs = (
        "A sample on the left and its nearest training image on the right: the nearest pairs, and then those that only just "
        "count. Pairs of captions whose held-out image is as near to a training image, too, are left out: new images of such a "
        "caption are as near."
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
        f"peak; sampling uses {_percent(results.metrics['sample']['sampling_mfu'])} of it. Images that the VAE encodes and "
        f"decodes have a PSNR of {results.metrics['encode']['reconstruction_psnr']} dB. {_left_out(results)}{losses}\n\n"
        f"![curves]({found['curves']})"
    ]


def _left_out(results: Results) -> str:
    """Word what the encoders did not see of the data as it is; nothing where they saw it all."""
    encode, texts = results.metrics["encode"], []
    for key, what in (
        ("truncated_captions", "captions were cut at CLIP's length"),
        ("captions_with_unknown_words", "captions have words that CLIP was not fitted on"),
        ("enlarged_images", "images were smaller than the encoder's size, and enlarged"),
    ):
        if encode.get(key):
            texts.append(f"{encode[key]:,} {what}")
    if encode.get("cut_area"):
        texts.append(f"{_percent(encode['cut_area'], 1)} of the area of the images was cut off")
    return f"Of the data, {'; '.join(texts)}. " if texts else ""


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def plot_curves(results: Results) -> Figure:
    """Plot the losses over the steps of the training, and the validation loss by timestep with its interval."""
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


def _to_image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)


def _show(image: Image.Image, name: str, report: Path, images: Path) -> str:
    """Save `image` as a small WebP in the folder `images`; return its path relative to that of `report`."""
    image = image.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    path = images / f"{name}.webp"
    image.save(path, quality=QUALITY)
    return path.relative_to(report.parent).as_posix()


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
