"""The race: seconds and steps of training until the images are right, of this project's transformer and of its peers.

All have the same width, depth, heads and patches, and learn the same cache in the same loop: the pieces of `Trainer` (batches,
noise, loss, AdamW, clipping, EMA), without validations, logs and checkpoints. At every twentieth of the training their EMA
weights sample images for the first validation captions; only training counts as time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from dit.benchmark.peers import PEERS
from dit.benchmark.speedrun import STOPS, Point
from dit.config import Params, Sample
from dit.encoders.loading import EncoderSource, load_vae
from dit.errors import UserError
from dit.latents.cache import Batch, LatentCache, sample_posterior
from dit.model.loss import diffusion_loss
from dit.model.objectives import apply_cfg, make_objective
from dit.pipeline.schedulers import make_scheduler, set_timesteps
from dit.shapes.scoring import score_image
from dit.training.data import drop_captions, read_batch, sample_step_noise
from dit.training.setup import (
    DTYPES,
    choose_precision,
    keep_freed_memory,
    learning_rate_factor,
    parameter_groups,
    warmup_steps,
)
from dit.training.trainer import ADAM_BETAS
from dit.training.validation import read_first
from dit.utils.autoencoder import decode_latents
from dit.utils.images import to_images
from dit.utils.random import seeded_generator

if TYPE_CHECKING:
    from dit.utils.autoencoder import Autoencoder

GOALS = (0.5, 0.8, 0.9, 0.95)  # of prompt_accuracy
HEADER = ("network", "parameters", *(f"until {goal}" for goal in GOALS), "at the end")
SEED = 40_000  # of the noise that images are sampled from


def race(params: Params, latents: Path, name: str, prompts: int) -> tuple[int, list[Point]]:
    """Train the network `name` (of `PEERS`) and score it on its way.

    Args:
        params: all settings of the pipeline; `train.method`, accumulation and `compile_model` are not looked at.
        latents: the cache to train on, of images of one size.
        name: of a network.
        prompts: how many validation captions to score at each stop.

    Returns:
        its number of parameters, and the points, of which the last is the end, or the first that reached the last goal.

    Raises:
        UserError: the captions are not about coloured shapes, so that nothing can be scored.
    """
    cache = LatentCache(latents)
    images = cache.val[:prompts]
    captions = [rows[0]["text"] for rows in cache.captions(images)]
    vae, _ = load_vae(EncoderSource(**cache.index["vae"], recorded_in=cache.folder))
    torch.manual_seed(params.train.seed)
    entrant, points = PEERS[name](cache, params), []
    for step, seconds, network in train_in_stops(entrant, cache, params):
        right = 0
        for caption, image in zip(captions, sample_images(network, cache, images, params, vae), strict=True):
            score = score_image(image, caption)
            if score is None:
                raise UserError("race: only images of the recipe shapes can be scored; set recipe to shapes")
            right += not score.problem
        points.append(Point(step, seconds, right / len(images), len(images)))
        if points[-1].accuracy >= GOALS[-1]:
            break
    return sum(parameter.numel() for parameter in entrant.parameters()), points


def train_in_stops(network: nn.Module, cache: LatentCache, params: Params) -> Iterator[tuple[int, float, nn.Module]]:
    """Train `network`; yield a copy with its EMA weights at each of `STOPS` stops, with the step and the seconds up to it."""
    train, optim = params.train, params.active.optim
    objective = make_objective(train.objective, train.prediction_type, train.snr_gamma, optim.logit_mean)
    steps = max(STOPS, optim.num_epochs * len(cache.train) // train.batch_size)
    warm_up, device = warmup_steps(train, steps), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    network = network.to(device).train()
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(network, train.weight_decay), betas=ADAM_BETAS, fused=True)
    ema, empty = EMAModel(weights, decay=train.ema_decay, foreach=True), cache.read_empty(1).to(device)
    seconds, began = 0.0, time.perf_counter()
    for step in tqdm(range(steps), desc=type(network).__name__, unit="step"):
        batch = read_batch(cache, train.seed, step, train.batch_size, train.horizontal_flip, slice(0, train.batch_size))
        noise = sample_step_noise(
            cache.latent_shape, train.seed, step, train.batch_size, train.caption_dropout, objective, device
        )
        batch = drop_captions(batch.to(device), noise.dropped, empty)
        x = sample_posterior(batch.moments, noise.posterior_noise, *cache.scaling_and_shift(device))
        with autocast(params, device):
            text = batch.tokens, batch.mask, batch.pooled
            diffusion_loss(network, objective, x, noise.noise, noise.timesteps, *text).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * learning_rate_factor(train.lr_scheduler, step, warm_up, steps)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(weights)
        if (step + 1) % (steps // STOPS) == 0:
            seconds += time.perf_counter() - began
            shown = deepcopy(network).eval()
            ema.copy_to(shown.parameters())
            yield step + 1, seconds, shown
            began = time.perf_counter()


@torch.no_grad()
def sample_images(
    network: nn.Module, cache: LatentCache, images: np.ndarray, params: Params, vae: Autoencoder
) -> Iterator[np.ndarray]:
    """Sample an image (H, W, 3) uint8 for the first caption of each of `images` (numbers), as `sample` in params.yaml says."""
    device, settings = next(network.parameters()).device, params.sample
    for rows in np.split(images, range(settings.batch_size, len(images), settings.batch_size)):
        batch, empty = read_first(cache, rows).to(device), cache.read_empty(len(rows)).to(device)
        both = Batch(*(torch.cat([a, b]) for a, b in zip(vars(batch).values(), vars(empty).values(), strict=True)))
        source = seeded_generator(torch.device("cpu"), SEED, int(rows[0]))
        x = torch.randn(len(rows), *cache.latent_shape, generator=source).to(device)
        with autocast(params, device):
            x = denoise(network, both, x, settings, params, source)
        for image in to_images(decode_latents(vae, x.cpu())):
            yield np.asarray(image)


def denoise(
    network: nn.Module, both: Batch, x: torch.Tensor, settings: Sample, params: Params, source: torch.Generator
) -> torch.Tensor:
    """Follow the path from noise `x` (N, C, H, W) to latents, with and without caption in one batch `both` of 2N rows."""
    objective = make_objective(params.train.objective, params.train.prediction_type)
    scheduler = make_scheduler(settings.scheduler, objective.prediction_type)
    set_timesteps(scheduler, settings.num_inference_steps, x.device)
    random = {"generator": source} if settings.scheduler == "stochastic" else {}
    for t in scheduler.timesteps:
        timesteps = (t / scheduler.config.num_train_timesteps).expand(2 * len(x))
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        predicted = network(inputs.repeat(2, 1, 1, 1), timesteps, both.tokens.float(), both.mask, both.pooled.float())
        with_caption, without = predicted.float().chunk(2)
        x = scheduler.step(apply_cfg(with_caption, without, settings.guidance_scale), t, x, **random).prev_sample
    return x


def autocast(params: Params, device: torch.device) -> torch.autocast:
    """Make the context in which networks compute in the precision that `Trainer` would take on this machine."""
    dtype = DTYPES[choose_precision(params.train.mixed_precision, lambda line: None)]
    return torch.autocast(device.type, torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32)


def race_row(name: str, parameters: int, points: list[Point]) -> tuple[str, ...]:
    """Return the row of `HEADER`: seconds and steps until each goal, then the last accuracy."""
    cells = []
    for goal in GOALS:
        reached = next((point for point in points if point.accuracy >= goal), None)
        cells.append(f"{reached.seconds:.0f} s, {reached.step} steps" if reached else "not reached")
    last = points[-1]
    return name, f"{parameters / 1e6:.2f} M", *cells, f"{last.accuracy:.3f} after {last.seconds:.0f} s, {last.step} steps"
