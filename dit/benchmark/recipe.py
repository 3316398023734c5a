"""What each setting of the default recipe buys: the share of right pictures after about the same time of training.

    python -m dit.benchmark.recipe                   all variants, a minute and a half each on 2 cores
    python -m dit.benchmark.recipe default batch-48  these two

Needs data/latents (`dvc repro encode`). Each variant is trained by itself with a short schedule and judged as `dit benchmark
--speedrun` does; a variant whose steps take longer gets fewer epochs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dit.benchmark.speedrun import speedrun
from dit.config import Params, load_config

EPOCHS = 12.0
PROMPTS = 500  # of which half are captions of the validation set
# Name: changes by block, and what a step of as many images costs beside the default's, measured on 2 cores in bf16.
VARIANTS: dict[str, tuple[dict[str, dict], float]] = {
    "default": ({}, 1.0),
    "batch-48": ({"train": {"batch_size": 48}}, 1.15),
    "batch-192": ({"train": {"batch_size": 192}}, 0.95),
    "learning-rate-1.5e-3": ({"optim": {"learning_rate": 1.5e-3}}, 1.0),
    "learning-rate-6e-3": ({"optim": {"learning_rate": 6e-3}}, 1.0),
    "constant-rate": ({"train": {"lr_scheduler": "constant"}}, 1.0),
    "ema-0.99": ({"train": {"ema_decay": 0.99}}, 1.0),
    "no-caption-dropout": ({"train": {"caption_dropout": 0.0}, "sample": {"guidance_scale": 1.0}}, 1.0),
    "caption-dropout-0.2": ({"train": {"caption_dropout": 0.2}}, 1.0),
    "timesteps-logit-mean-0": ({"optim": {"logit_mean": 0.0}}, 1.0),
    "width-192": ({"model": {"hidden_size": 192, "num_heads": 6}}, 1.5),
    "width-96": ({"model": {"hidden_size": 96, "num_heads": 3}}, 0.8),
    "patch-2": ({"model": {"patch_size": 2}}, 3.0),
}


def variant(params: Params, changes: dict[str, dict], cost: float) -> Params:
    """The settings with `changes`, and as many epochs as cost what `EPOCHS` of the default cost."""
    recipe = replace(params.shapes, optim=replace(params.shapes.optim, num_epochs=round(EPOCHS / cost)))
    for block in ("model", "optim"):
        recipe = replace(recipe, **{block: replace(getattr(recipe, block), **changes.get(block, {}))})
    train = replace(params.train, **changes.get("train", {}))
    sample = replace(params.sample, num_samples=PROMPTS, **changes.get("sample", {}))
    return replace(params, recipe="shapes", shapes=recipe, train=train, sample=sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    names = parser.parse_args().names or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such variant")
    params = load_config()
    print("| variant | steps | seconds of training | prompt_accuracy |\n|---|---|---|---|", flush=True)
    for name in names:
        point = speedrun(variant(params, *VARIANTS[name]), Path("data/latents"), Path("data/raw"), first_share=1.0)[-1]
        print(f"| {name} | {point.step} | {point.seconds:.0f} | {point.accuracy:.3f} |", flush=True)


if __name__ == "__main__":
    main()
