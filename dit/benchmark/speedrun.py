"""The speedrun: seconds of training until the images are right.

One training with the settings of params.yaml leaves checkpoints; then their EMA weights sample images for the validation
prompts, from the first checkpoint on, until the share of right images reaches the goal. Only training counts, as
`metrics/train.json` counts it, with validations but without previews; sampling for the score does not count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from dit.config import Params
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.model.transformer import DiT
from dit.pipeline.generate import load_pipeline
from dit.pipeline.sampling import choose_prompts, sample_prompts
from dit.shapes.scoring import score_image
from dit.training.checkpoint import Checkpoints, open_checkpoint
from dit.training.export import save_model
from dit.training.logging import NullLogger
from dit.training.setup import build_model
from dit.training.trainer import Trainer

GOAL = 0.95  # of prompt_accuracy
STOPS = 20  # checkpoints in a training


@dataclass
class Point:
    """Progress after `seconds` of training: `accuracy` is the share of `prompts` whose images are right, in [0, 1]."""

    step: int
    seconds: float
    accuracy: float
    prompts: int


def speedrun(params: Params, latents: Path, raw: Path, first_share: float = 0.0) -> list[Point]:
    """Train and score; the last point is the first that reached the goal, or the end of the training.

    Args:
        params: all settings of the pipeline.
        latents: the cache to train on.
        raw: where the captions of the validation set are.
        first_share: the share of the training before which nothing is scored.

    Raises:
        UserError: the captions are not about coloured shapes, so that nothing can be scored.
    """
    cache, points = LatentCache(latents), []
    params = replace(params, train=replace(params.train, method="scratch", init_from=None))
    prompts = [prompt for prompt in choose_prompts(raw, params.recipe, params.sample) if prompt.group == "val"]
    if score_image(Image.new("RGB", (64, 64)), prompts[0].text) is None:
        raise UserError("speedrun: only images of the recipe shapes can be scored; set recipe to shapes")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        for step, seconds, transformer in train_in_stops(params, cache, Path(folder) / "state", first_share):
            save_model(model, transformer, cache, params.active.model, params.active.optim, params.train)
            pipeline = load_pipeline(model, params.sample.scheduler)
            sampled = sample_prompts(pipeline, prompts, params.sample)
            scores = [score_image(image, prompt.text) for prompt, image in sampled]
            right = sum(score is not None and not score.problem for score in scores)
            points.append(Point(step, seconds, right / len(scores), len(scores)))
            if points[-1].accuracy >= GOAL:
                break
    return points


def train_in_stops(params: Params, cache: LatentCache, folder: Path, first_share: float) -> Iterator[tuple[int, float, DiT]]:
    """Train once as a whole; yield the EMA weights at each of `STOPS` stops, with the step and the seconds up to it."""
    train, model, optim = params.train, params.active.model, params.active.optim
    steps = max(1, optim.num_epochs * len(cache.train) // (train.batch_size * train.gradient_accumulation_steps))
    runtime = replace(params.runtime, checkpoint_every=max(1, steps // STOPS))
    checkpoints = Checkpoints(folder, keep=2 * STOPS)
    result, summary = Trainer(cache, model, optim, train, runtime, NullLogger(), None, checkpoints).train()
    for path in sorted(folder.glob("step-*.json")):
        checkpoint = open_checkpoint(path)
        if checkpoint.step >= first_share * steps:
            transformer, tensors = build_model(cache, model, train.seed), checkpoint.tensors()
            for name, parameter in transformer.named_parameters():
                parameter.data.copy_(tensors[f"ema.{name}"])
            yield checkpoint.step, checkpoint.record["seconds"], transformer
    yield int(summary["steps"]), summary["seconds"], result


def speedrun_line(points: list[Point]) -> str:
    """Return the result as a sentence."""
    last = points[-1]
    reached = f"speedrun: {last.seconds:.0f} s of training ({last.step} steps) until"
    if last.accuracy < GOAL:
        reached = f"speedrun: {GOAL} was not reached; after {last.seconds:.0f} s ({last.step} steps)"
    return f"{reached} prompt_accuracy was {last.accuracy:.3f} of {last.prompts} prompts"
