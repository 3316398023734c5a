"""The training loop. It reads from top to bottom as the recipe it is; what a step sees is decided in batches.py."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from dit import diffusion
from dit.config import Model, Runtime, Schedule, Train
from dit.diffusion import make_objective
from dit.errors import UserError
from dit.latents import Batch, LatentCache, sample_posterior
from dit.model import DiT, forward_flops
from dit.precision import has_bf16
from dit.throughput import matmul_peak
from dit.training.batches import draw_step, drop_captions, read_step
from dit.training.checkpoint import Checkpoint, Checkpoints
from dit.training.data import Steps, load_batches
from dit.training.journal import Journal
from dit.training.memory import advice, keep_freed_memory, largest_that_fits
from dit.training.preview import draw_preview
from dit.training.schedule import learning_rate_factor
from dit.training.state import Best, TrainingState
from dit.training.stop import Stopped, StopRequest
from dit.training.validation import validation_loss
from dit.training.window import Window

ADAM_BETAS = (0.9, 0.99)  # a shorter memory than 0.999 suits runs of some thousand steps
PREVIEW_IMAGES = 16
VALIDATION_IMAGES = 512  # at most, while training; the evaluate stage takes all
EXPLODED = 100.0  # mean loss of a batch; a network that predicts 0 has about 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def choose_precision(wanted: str, log: Callable[[str], None], begun_in: str | None = None) -> str:
    """`train.mixed_precision` if this machine can do it. A CPU that is not faster in bf16 trains in fp32, and says so once.

    Args:
        wanted: the setting.
        log: what says so.
        begun_in: what the training began in, if it goes on. Where bf16 is wanted this is kept, bf16 or the fp32 in its place,
            since another one leads to other weights; another setting counts.
    """
    if wanted == "bf16" and begun_in in ("bf16", "no"):
        return begun_in
    if torch.cuda.is_available():
        return wanted
    if wanted == "fp16":
        raise UserError("train.mixed_precision: fp16 needs a GPU; bf16 or no would be right on this machine")
    if wanted == "bf16" and not has_bf16(torch.device("cpu")):
        log("this processor is not faster in bf16: training in fp32")
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
    cache: LatentCache,
    model: Model,
    schedule: Schedule,
    train: Train,
    runtime: Runtime,
    journal: Journal,
    decode: Callable[[torch.Tensor], list[Image.Image]] | None,
    checkpoints: Checkpoints,
    resume: Checkpoint | None = None,
) -> tuple[DiT, dict[str, float]]:
    """Train, from scratch or from `resume`; returns the transformer with its EMA weights, on the CPU, and a summary.

    Args:
        journal: is told what happens; of every process but the first a `Silent` one.
        decode: latents (N, C, H, W) as the diffusion model sees them to RGB pictures, for the previews; None for no previews.
        checkpoints: where to save.

    Raises:
        UserError: the settings cannot work on this machine or with this cache, or the loss is no number any more.
        Stopped: SIGTERM or Ctrl-C; a checkpoint has been saved.
    """
    alike = DistributedDataParallelKwargs(broadcast_buffers=False)  # the text's statistics never change
    begun_in = resume.record.get("precision") if resume else None
    chosen = broadcast_object_list([choose_precision(train.mixed_precision, journal.log, begun_in)])  # by the first process
    accelerator = Accelerator(mixed_precision=chosen[0], kwargs_handlers=[alike])
    device, precision, main = accelerator.device, accelerator.mixed_precision, accelerator.is_main_process
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not asked for
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    batch_size = train.batch_size * train.gradient_accumulation_steps
    parts = own_rows(train, accelerator.num_processes, accelerator.process_index)
    total_steps = max(1, schedule.num_epochs * len(cache.train) // batch_size)
    objective = make_objective(train.objective, train.prediction_type, train.snr_gamma, schedule.logit_mean)
    judged = make_objective(train.objective, train.prediction_type, train.snr_gamma)

    transformer = build_model(cache, model, train.seed)
    if train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ema = EMAModel(transformer.parameters(), decay=train.ema_decay, foreach=True)
    groups = parameter_groups(transformer, train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=ADAM_BETAS, fused=True)
    network, optimizer = accelerator.prepare(transformer, optimizer)
    ema.to(device)
    network = compile_whole(network, schedule.compile_model, device, journal.log)
    state = TrainingState(accelerator, transformer, ema, optimizer.optimizer, Window(device), Best())
    if resume:
        if resume.step >= total_steps:
            raise UserError(f"{resume.path}: of step {resume.step}, but the settings ask for {total_steps} steps only")
        state.load(resume)
        journal.restore(resume.record["journal"], resume.step)
        journal.say(f"going on after step {resume.step} of {total_steps}")
    flops = 3 * forward_flops(transformer, cache.latent_shape[1:], cache.max_tokens)
    peak = accelerator.num_processes * matmul_peak(device, DTYPES[precision])
    if not resume:
        share = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        journal.log(f"{len(cache.train)} images, {total_steps} steps of {batch_size}, {precision} on {device.type}{share}")
        journal.log(f"{transformer.num_parameters() / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOP per image and step")
    empty = cache.read_empty(1).to(device)

    def backward(batch: Batch, step: int, rows: slice, last_part: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of `rows` of a step's global batch; returns their losses and timesteps (n,), on the device."""
        chance = draw_step(cache.latent_shape, train.seed, step, batch_size, train.caption_dropout, objective, device).part(rows)
        batch = drop_captions(batch, chance.dropped, empty)
        images = sample_posterior(batch.moments, chance.posterior_noise, cache.index["vae_scaling"], cache.index["vae_shift"])
        noisy = objective.add_noise(images, chance.noise, chance.timesteps)
        with nullcontext() if last_part else accelerator.no_sync(network):
            prediction = network(noisy, chance.timesteps, batch.tokens.float(), batch.mask, batch.pooled.float())
            losses = diffusion.loss(objective, prediction, images, chance.noise, chance.timesteps)
            # Processes' gradients are averaged, so that each counts for as many images as it has. A loss that has exploded
            # becomes no number, and then so do the gradients: the step is skipped.
            share = losses.sum() * (accelerator.num_processes / batch_size)
            exploded = losses.detach().mean() > EXPLODED
            accelerator.backward(share * torch.where(exploded, float("nan"), 1.0))
        return losses.detach(), chance.timesteps

    def save() -> None:
        tensors = state.tensors()
        if main:
            spent = before + time.perf_counter() - started
            about = {"seconds": spent, "journal": journal.state(), "precision": precision}
            checkpoints.save(state.step, tensors, state.record() | about)

    def validate(network: DiT) -> float:
        return validation_loss(network, cache, train.batch_size, judged, 1, VALIDATION_IMAGES, accelerator.autocast, accelerator)

    values: dict[str, float] = {}
    val_loss, before = float("nan"), resume.record["seconds"] if resume else 0.0
    window = state.window
    started, first = time.perf_counter(), state.step
    batches = load_batches(
        Steps(cache, train.seed, batch_size, train.horizontal_flip, parts), first, total_steps, device, runtime
    )
    progress = tqdm(range(first, total_steps), initial=first, total=total_steps, desc="train", unit="step", disable=not main)
    with StopRequest() as request:
        for step in progress:
            rate = schedule.learning_rate * learning_rate_factor(train.lr_scheduler, step, train.warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            out_of_memory = False
            try:
                seen = [backward(next(batches), step, rows, rows is parts[-1]) for rows in parts]
                norm = accelerator.clip_grad_norm_(transformer.parameters(), train.max_grad_norm)
                # A gradient that is no number leaves weights and optimiser as they are: the fused kernel looks at this flag.
                state.optimizer.found_inf = (~torch.isfinite(norm)).float()
                optimizer.step()
            except torch.OutOfMemoryError:
                out_of_memory = True  # what the step holds is free only when this clause is left
            optimizer.zero_grad()
            if out_of_memory:
                raise UserError(advice(train, find_fitting(state, cache, train, batch_size, step, backward)))
            ema.step(transformer.parameters())
            window.add(torch.cat([losses for losses, _ in seen]), torch.cat([times for _, times in seen]), norm)

            state.step = done = step + 1
            last = done == total_steps
            logs = done % runtime.log_every == 0 or last
            if logs:
                values = window.close(accelerator, batch_size, flops / peak) | {"learning_rate": rate}
                window.pause()
                report(done, total_steps, values, journal, progress)
                if window.in_a_row >= train.max_skipped:
                    bad = done - window.in_a_row
                    save()
                    checkpoints.wait()
                    batch = read_step(cache, train.seed, bad, batch_size, train.horizontal_flip, parts[0]).to(device)
                    backward(batch, bad, parts[0])
                    raise UserError(explain_bad(transformer, bad, done, checkpoints))
                window.go_on()
            if done % train.validate_every == 0 or last:
                window.pause()
                with state.averaged() as averaged:
                    val_loss = validate(averaged)
                if train.early_stopping_patience:
                    state.judge(val_loss)
                raw = validate(transformer.eval())
                transformer.train()
                journal.metrics(done, {"val_loss": val_loss, "val_loss_raw": raw})
                journal.log(f"step {done}/{total_steps} validation loss {val_loss:.4f} (EMA), {raw:.4f} (raw)", say=False)
                window.go_on()
                if train.early_stopping_patience and state.best.worse >= train.early_stopping_patience:
                    journal.log(f"stopped early at step {done}: the lowest validation loss was at step {state.best.step}")
                    last = True
            if main and decode and (done % runtime.sample_every == 0 or last):
                window.pause()
                with state.averaged() as averaged:
                    picture = draw_preview(averaged, cache, judged, PREVIEW_IMAGES, decode, accelerator.autocast)
                journal.preview(done, picture)
                window.go_on()
            if last:
                break
            if done % runtime.checkpoint_every == 0:
                save()
            if asked_to_stop(request, accelerator, logs):
                save()
                checkpoints.wait()
                accelerator.wait_for_everyone()
                by = request.name or "a signal"
                raise Stopped(f"stopped by {by} after step {done} of {total_steps}; the same command goes on from there")
    seconds = before + time.perf_counter() - started
    values = values or window.close(accelerator, batch_size, flops / peak)
    checkpoints.wait()
    accelerator.wait_for_everyone()
    result = build_model(cache, model, train.seed)
    weights = state.best.weights or ema.shadow_params
    for parameter, value in zip(result.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    summary = {
        "steps": state.step,
        "train_loss": values["train_loss"],
        "val_loss": state.best.loss if state.best.weights else val_loss,
        "images_per_second": state.step * batch_size / seconds,
        "mfu": values["mfu"],
        "seconds": seconds,
        "parameters": result.num_parameters(),
    }
    return result, summary


def own_rows(train: Train, processes: int, number: int) -> list[slice]:
    """Which rows of the global batch process `number` of `processes` works on, for each part of a step.

    Raises:
        UserError: there are more processes than images in a part.
    """
    if train.batch_size < processes:
        raise UserError(f"train.batch_size: {train.batch_size} cannot be split over {processes} processes")
    own = np.array_split(np.arange(train.batch_size), processes)[number]
    starts = range(0, train.batch_size * train.gradient_accumulation_steps, train.batch_size)
    return [slice(start + int(own[0]), start + int(own[-1]) + 1) for start in starts]


def compile_whole(network: torch.nn.Module, wanted: bool | str, device: torch.device, log: Callable[[str], None]):
    """The network through torch.compile as a whole, for the one shape that training has; "auto" on a GPU alone.

    On a CPU it takes minutes; compiled code needs a C++ compiler, without which training goes on as it is.
    """
    if not wanted or (wanted == "auto" and device.type == "cpu"):
        return network
    if not shutil.which(os.environ.get("CXX", "g++")):
        log("no C++ compiler was found, so the transformer is not compiled")
        return network
    return torch.compile(network, dynamic=False)


def parameter_groups(model: DiT, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norms do not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def asked_to_stop(request: StopRequest, accelerator: Accelerator, agreed: bool) -> bool:
    """Whether a signal came; several processes look together, at the steps where `agreed`."""
    if accelerator.num_processes == 1:
        return request.name is not None
    if not agreed:
        return False
    asked = torch.tensor(float(request.name is not None), device=accelerator.device)
    return accelerator.reduce(asked).item() > 0


def find_fitting(state: TrainingState, cache: LatentCache, train: Train, batch_size: int, step: int, backward) -> int:
    """How many images fit, found by trying, with the optimiser's moments in memory as well."""
    moments = [torch.empty_like(p) for p in state.transformer.parameters() for _ in range(2)] if not state.step else []

    def attempt(count: int) -> None:
        rows = slice(0, count)
        backward(read_step(cache, train.seed, step, batch_size, train.horizontal_flip, rows).to(state.window.device), step, rows)

    fits = largest_that_fits(attempt, train.batch_size)
    del moments
    return fits


def report(done: int, total_steps: int, values: dict[str, float], journal: Journal, progress: tqdm) -> None:
    """A log's figures, where people look for them."""
    rate = values["images_per_second"]
    speed = f"{rate:.{0 if rate >= 10 else 2}f} images/s"
    progress.set_postfix_str(f"loss {values['train_loss']:.3f}, {speed}, MFU {values['mfu']:.0%}")
    journal.metrics(done, values)
    memory = f" {values['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in values else ""
    journal.log(
        f"step {done}/{total_steps} loss {values['train_loss']:.4f} grad {values['grad_norm']:.2f} "
        f"lr {values['learning_rate']:.2e} {speed} MFU {values['mfu']:.1%}{memory}",
        say=False,
    )
    if values["skipped_steps"]:
        journal.log(
            f"{values['skipped_steps']:.0f} steps up to step {done} were skipped: loss or gradients exploded or were no numbers"
        )


def explain_bad(transformer: DiT, bad: int, done: int, checkpoints: Checkpoints) -> str:
    """One line on a training whose steps are all skipped, from the gradients of the first of them."""
    names = [n for n, p in transformer.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    where = f"the first parameter with such a gradient is {names[0]}" if names else "its gradients are numbers by now"
    return (
        f"the {done - bad} steps after step {bad} were skipped (train.max_skipped): loss or gradients exploded or were no "
        f"numbers; {where}. The last good state is in {checkpoints.folder}; a lower learning_rate or max_grad_norm may help"
    )
