"""The main metrics of an evaluation as a table for people, with the meaning of each."""

from __future__ import annotations

# Name of the metric, without the number of samples: its meaning, and whether higher or lower is better.
MEANINGS = {
    "prompt_accuracy": ("share of images with everything right, captions of the validation set", "higher"),
    "prompt_accuracy_unseen": ("the same, captions with a colour and shape never seen together", "higher"),
    "clip_score": ("agreement of image and caption as CLIP sees it, 0 to 100", "higher"),
    "frechet_distance_clip": ("distance between samples and held-out images, as two Gaussians of CLIP features", "lower"),
    "kid_clip": ("the same by a kernel: 0 for new images of the same kind; good ones of the same captions are below", "lower"),
    "precision_clip": ("samples within reach of held-out images; poor images may be high as well, so see recall", "higher"),
    "recall_clip": ("held-out images within reach of samples", "higher"),
    "diversity_clip": ("how different the images of one caption are", "higher"),
    "memorised": (
        "samples nearer to a training image than new images are, beyond the rate of held-out images: perhaps copies",
        "lower",
    ),
    "val_loss": ("the objective on held-out images", "lower"),
}


def headlines(metrics: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Return the meaning, and which way is better, of those of `metrics` that are in `MEANINGS`, in the order of `metrics`."""
    found = {}
    for name in metrics:
        stem, _, samples = name.rpartition("_n")
        meaning = _meaning(stem if samples.isdigit() else name)
        if meaning:
            found[name] = meaning
    return found


def _meaning(stem: str) -> tuple[str, str] | None:
    """Return what `MEANINGS` says of a metric, also of one on the features of another model than CLIP (`evaluate.features`)."""
    if stem in MEANINGS:
        return MEANINGS[stem]
    for kind in ("frechet_distance", "kid", "precision", "recall"):
        if stem.startswith(f"{kind}_"):
            what, better = MEANINGS[f"{kind}_clip"]
            return f"{what} ({stem.removeprefix(f'{kind}_')} in place of CLIP)", better
    return None


def metrics_table(metrics: dict[str, float], confidence: float) -> str:
    """Return a Markdown table with a row for each of the `headlines`: value, interval, meaning."""
    lines = [f"| metric | value | {100 * confidence:g} % interval | meaning | better |", "|---|---|---|---|---|"]
    for name, (meaning, better) in headlines(metrics).items():
        ends = [f"{metrics[f'{name}_{end}']:.3g}" for end in ("low", "high") if f"{name}_{end}" in metrics]
        lines.append(f"| `{name}` | **{metrics[name]:.3g}** | {' to '.join(ends)} | {meaning} | {better} |")
    return "\n".join(lines)
