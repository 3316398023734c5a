"""The figures of an evaluation as a table for people, with what each of them says."""

from __future__ import annotations

# Name of the metric, without the number of samples; what it says, and which way is better.
MEANINGS = {
    "prompt_accuracy": ("pictures with everything right, captions of the validation set", "higher"),
    "prompt_accuracy_unseen": ("the same, captions with a colour and shape never seen together", "higher"),
    "clip_score": ("how well CLIP finds picture and caption to agree, 0 to 100", "higher"),
    "frechet_distance_clip": ("distance between samples and held-out images, as two Gaussians of CLIP features", "lower"),
    "kid_clip": ("the same by a kernel: 0 for new pictures of the same kind; good ones of the same captions are below", "lower"),
    "precision_clip": ("samples within reach of held-out images; high for many a poor picture, too, so see recall", "higher"),
    "recall_clip": ("held-out images within reach of samples", "higher"),
    "diversity_clip": ("how different the pictures of one caption are", "higher"),
    "memorised": ("samples nearer to a training image than new pictures come, beyond chance: copies, perhaps", "lower"),
    "val_loss": ("the objective on held-out images", "lower"),
}


def headlines(figures: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Those of `figures` that `MEANINGS` knows, in their order: by name what each says, and which way is better."""
    found = {}
    for name in figures:
        stem, _, samples = name.rpartition("_n")
        meaning = MEANINGS.get(stem if samples.isdigit() else name)
        if meaning:
            found[name] = meaning
    return found


def figures_table(figures: dict[str, float], confidence: float) -> str:
    """Return a Markdown table with a row for each of the `headlines`: value, interval, meaning."""
    lines = [f"| metric | value | {100 * confidence:g} % interval | what it says | better |", "|---|---|---|---|---|"]
    for name, (meaning, better) in headlines(figures).items():
        ends = [f"{figures[f'{name}_{end}']:.3g}" for end in ("low", "high") if f"{name}_{end}" in figures]
        lines.append(f"| `{name}` | **{figures[name]:.3g}** | {' to '.join(ends)} | {meaning} | {better} |")
    return "\n".join(lines)
