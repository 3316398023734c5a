"""The training loop. It reads from top to bottom as the recipe it is; what a step sees is decided in batches.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from dit import diffusion
from dit.config import Model, Runtime, Schedule, Train
from dit.errors import UserError
from dit.latents import LatentCache, sample_posterior
from dit.model import DiT, forward_flops
from dit.precision import has_bf16
from dit.training.batches import draw_step, drop_captions, read_step
from dit.training.preview import draw_preview
from dit.training.schedule import learning_rate_factor
from dit.training.throughput import matmul_peak
from dit.training.validation import validation_loss

ADAM_BETAS = (0.9, 0.99)  # a shorter memory than 0.999 suits runs of some thousand steps
PREVIEW_IMAGES = 16
VALIDATION_IMAGES = 512  # at most, while training; the evaluate stage takes all


@dataclass(frozen=True)
class Watchers:
    """Who is told what during training; the loop itself knows no tracker.

    Attributes:
        metrics: called with (step, {name: value}) at every log and validation.
        preview: called with (step, picture) for every preview grid.
        log: called with a line of text for train.log.
        decode: latents (N, C, H, W) as the diffusion model sees them to RGB pictures.
    """

    metrics: Callable[[int, dict[str, float]], None]
    preview: Callable[[int, Image.Image], None]
    log: Callable[[str], None]
    decode: Callable[[torch.Tensor], list[Image.Image]]


def choose_precision(wanted: str, log: Callable[[str], None]) -> str:
    """`train.mixed_precision` if this machine can do it. A CPU without bf16 instructions trains in fp32, and says so once."""
    if torch.cuda.is_available():
        return wanted
    if wanted == "fp16":
        raise UserError("train.mixed_precision: fp16 needs a GPU; bf16 or no would be right on this machine")
    if wanted == "bf16" and not has_bf16(torch.device("cpu")):
        log("this processor has no bf16 instructions: training in fp32, where a step takes about 1.4 times as long")
        return "no"
    return wanted


def build_model(cache: LatentCache, model: Model, seed: int) -> DiT:
    """A freshly initialised transformer that fits the cache; the same seed gives the same weights."""
    torch.manual_seed(seed)
    transformer = DiT(
        in_channels=cache.latent_shape[0],
        patch_size=model.patch_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        text_size=cache.text_size,
        pooled_size=cache.pooled_size,
    )
    transformer.set_text_statistics(**cache.text_statistics)
    return transformer


def train_transformer(
    cache: LatentCache, model: Model, schedule: Schedule, train: Train, runtime: Runtime, watchers: Watchers
) -> tuple[DiT, dict[str, float]]:
    """Train from scratch; returns the transformer with its EMA weights, on the CPU, and a summary of the run.

    Raises:
        UserError: the settings cannot work on this machine or with this cache.
    """
    precision = choose_precision(train.mixed_precision, watchers.log)
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    batch_size = train.batch_size * train.gradient_accumulation_steps
    if train.batch_size % accelerator.num_processes:
        raise UserError(f"train.batch_size: {train.batch_size} cannot be split over {accelerator.num_processes} processes")
    share = train.batch_size // accelerator.num_processes
    total_steps = max(1, schedule.num_epochs * len(cache.train) // batch_size)
    watchers.log(
        f"{len(cache.train)} images, {schedule.num_epochs} epochs = {total_steps} steps of {batch_size}, {precision} on {device}"
    )

    transformer = build_model(cache, model, train.seed)
    if train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ema = EMAModel(transformer.parameters(), decay=train.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        parameter_groups(transformer, train.weight_decay), lr=schedule.learning_rate, betas=ADAM_BETAS, fused=True
    )
    ema_transformer = build_model(cache, model, train.seed).to(device).eval().requires_grad_(False)
    network, optimizer = accelerator.prepare(transformer, optimizer)
    ema.to(device)
    if schedule.compile_model and device.type == "cuda":  # on a CPU it takes minutes and a C++ compiler
        network = torch.compile(network)
    empty = cache.read_empty(1).to(device)
    flops = 3 * forward_flops(transformer, cache.latent_shape[1:], cache.max_tokens)
    peak = accelerator.num_processes * matmul_peak(
        device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    )
    watchers.log(f"{transformer.num_parameters() / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOP per image and step")

    def backward(step: int, micro: int) -> torch.Tensor:
        """Add one micro-batch's gradients; returns its mean loss, still on the device."""
        first = micro * train.batch_size + accelerator.process_index * share
        rows = slice(first, first + share)
        batch = read_step(cache, train.seed, step, batch_size, train.horizontal_flip, rows).to(device)
        chance = draw_step(
            cache.latent_shape, train.seed, step, batch_size, train.caption_dropout, schedule.logit_mean, device
        ).part(rows)
        batch = drop_captions(batch, chance.dropped, empty)
        images = sample_posterior(batch.moments, chance.posterior_noise, cache.index["vae_scaling"], cache.index["vae_shift"])
        noisy = diffusion.add_noise(images, chance.noise, chance.timesteps)
        prediction = network(noisy, chance.timesteps, batch.tokens.float(), batch.mask, batch.pooled.float())
        loss = diffusion.loss(prediction, images, chance.noise).mean()
        accelerator.backward(loss / train.gradient_accumulation_steps)
        return loss.detach()

    def validate() -> float:
        ema.copy_to(ema_transformer.parameters())
        return validation_loss(ema_transformer, cache, train.batch_size, limit=VALIDATION_IMAGES, autocast=accelerator.autocast)

    window = Window(device)
    values: dict[str, float] = {}
    val_loss = float("nan")
    started = time.perf_counter()
    progress = tqdm(range(total_steps), desc="train", unit="step", disable=not accelerator.is_main_process)
    for step in progress:
        rate = schedule.learning_rate * learning_rate_factor(train.lr_scheduler, step, train.warmup_steps, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = [backward(step, micro) for micro in range(train.gradient_accumulation_steps)]
        norm = accelerator.clip_grad_norm_(transformer.parameters(), train.max_grad_norm)
        # A non-finite gradient leaves weights and optimiser as they are: the fused kernel looks at this flag on the device.
        optimizer.optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(transformer.parameters())
        window.add(torch.stack(losses).mean(), norm)

        done = step + 1
        last = done == total_steps
        if done % runtime.log_every == 0 or last:
            values = window.close(batch_size, flops / peak) | {"learning_rate": rate}
            progress.set_postfix_str(
                f"loss {values['train_loss']:.3f}, {values['images_per_second']:.0f} images/s, MFU {values['mfu']:.0%}"
            )
            watchers.metrics(done, values)
            watchers.log(
                f"step {done}/{total_steps} loss {values['train_loss']:.4f} grad {values['grad_norm']:.2f} "
                f"lr {rate:.2e} {values['images_per_second']:.0f} images/s MFU {values['mfu']:.1%}"
            )
            if values["skipped_steps"]:
                watchers.log(
                    f"{values['skipped_steps']:.0f} steps up to step {done} were skipped: their gradients were not finite"
                )
        if accelerator.is_main_process and (done % runtime.validate_every == 0 or last):
            val_loss = validate()
            watchers.metrics(done, {"val_loss": val_loss})
            watchers.log(f"step {done}/{total_steps} validation loss {val_loss:.4f} (EMA weights)")
            window.restart()
        if accelerator.is_main_process and (done % runtime.sample_every == 0 or last):
            ema.copy_to(ema_transformer.parameters())
            picture = draw_preview(ema_transformer, cache, PREVIEW_IMAGES, watchers.decode, accelerator.autocast)
            watchers.preview(done, picture)
            window.restart()
    seconds = time.perf_counter() - started
    ema.copy_to(ema_transformer.parameters())
    summary = {
        "steps": total_steps,
        "train_loss": values["train_loss"],
        "val_loss": val_loss,
        "images_per_second": total_steps * batch_size / seconds,
        "mfu": values["mfu"],
        "seconds": seconds,
        "parameters": transformer.num_parameters(),
    }
    return ema_transformer.cpu(), summary


def parameter_groups(model: DiT, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norms do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class Window:
    """Losses and gradient norms since the last log, kept on the device so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget the time that went into something else than steps; losses go with it."""
        self.losses: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.started = time.perf_counter()

    def add(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def close(self, batch_size: int, seconds_per_image_at_peak: float) -> dict[str, float]:
        losses, norms = torch.stack(self.losses).float().cpu(), torch.stack(self.norms).float().cpu()
        rate = len(losses) * batch_size / (time.perf_counter() - self.started)
        finite = torch.isfinite(norms)
        self.restart()
        return {
            "train_loss": losses[finite].mean().item(),
            "grad_norm": norms[finite].mean().item(),
            "skipped_steps": float((~finite).sum()),
            "images_per_second": rate,
            "mfu": rate * seconds_per_image_at_peak,
        }
