"""The training loop: `Trainer.train` reads as the recipe, `Trainer.train_step` as the step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from dit.config import Model, Optim, Runtime, Train
from dit.errors import UserError, is_out_of_memory, memory_errors, one_line, out_of_memory
from dit.latents.cache import Batch, LatentCache, sample_posterior
from dit.model.loss import diffusion_loss
from dit.model.objectives import make_objective
from dit.model.transformer import DiT, forward_flops
from dit.training.checkpoint import Checkpoint, Checkpoints, TrainingState
from dit.training.data import (
    StepBatches,
    StepNoise,
    choose_bucket,
    drop_captions,
    load_batches,
    rank_slices,
    read_batch,
    sample_step_noise,
)
from dit.training.export import describe_model
from dit.training.init_model import InitModel
from dit.training.logging import MetricLogger, RunningMetrics, duration, log_step
from dit.training.lora import count_parameters, trainable_parameters
from dit.training.setup import (
    DTYPES,
    build_trainable,
    compile_network,
    largest_batch_that_fits,
    learning_rate_factor,
    make_accelerator,
    oom_message,
    parameter_groups,
    prepare_network,
    warmup_steps,
)
from dit.training.sharding import gather, is_sharded, whole
from dit.training.stop import Stopped, StopRequest
from dit.training.validation import sample_preview, validation_loss
from dit.utils.hardware import matmul_peak

ADAM_BETAS = (0.9, 0.99)  # a shorter memory than 0.999 suits runs of some thousand steps
PREVIEW_IMAGES = 16
VALIDATION_IMAGES = 512  # at most, while training; the evaluate stage takes all
MAX_LOSS = 100.0  # mean loss of a batch; a network that predicts 0 has about 2
SMALLER_BATCH = "a smaller train.batch_size may fit, with more train.gradient_accumulation_steps a step is of as many images"


class Trainer:
    """Trains a transformer on a latent cache: from scratch, from another model or from a checkpoint.

    Args:
        cache: latents and text embeddings.
        model, optim, train, runtime: blocks of params.yaml.
        logger: logs what happens; a `NullLogger` in every process but the first.
        decode: turns latents (N, C, H, W) as the diffusion model sees them into RGB images, for previews; None for none.
        checkpoints: where to save.
        resume: the checkpoint to resume from.
        init: the model that `train.init_from` names; also where a checkpoint is resumed, which has no weights that are frozen.
        keep: where the last state of the finished training goes; None to drop it.

    Raises:
        UserError: the settings cannot work on this machine or with this cache.
    """

    def __init__(
        self,
        cache: LatentCache,
        model: Model,
        optim: Optim,
        train: Train,
        runtime: Runtime,
        logger: MetricLogger,
        decode: Callable[[torch.Tensor], list[Image.Image]] | None,
        checkpoints: Checkpoints,
        resume: Checkpoint | None = None,
        init: InitModel | None = None,
        keep: Checkpoints | None = None,
    ):
        self.cache, self.model, self.optim, self.settings, self.runtime = cache, model, optim, train, runtime
        self.logger, self.decode, self.checkpoints, self.keep = logger, decode, checkpoints, keep
        self.accelerator = make_accelerator(train, runtime, logger, resume)
        self.device = self.accelerator.device
        self.batch_size = train.batch_size * train.gradient_accumulation_steps
        self.total_steps = max(1, optim.num_epochs * len(cache.train) // self.batch_size)
        self.warmup_steps = warmup_steps(train, self.total_steps)
        if train.batch_size < self.accelerator.num_processes:
            processes = self.accelerator.num_processes
            raise UserError(f"train.batch_size: {train.batch_size} cannot be split over {processes} processes")
        self.slices = rank_slices(
            train.batch_size,
            train.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        self.bucket_sizes = [len(images) for images in cache.train_buckets]
        self.objective = make_objective(train.objective, train.prediction_type, train.snr_gamma, optim.logit_mean)
        self.val_objective = make_objective(train.objective, train.prediction_type, train.snr_gamma)

        self.transformer = build_trainable(cache, model, train, init)
        if train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        network = prepare_network(self.transformer, self.accelerator, runtime.sharding)
        self.trainable = trainable_parameters(self.transformer)
        self.sharded = is_sharded(next(iter(self.trainable.values())))
        ema = EMAModel(self.trainable.values(), decay=train.ema_decay, foreach=True)
        groups = parameter_groups(self.transformer, train.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=ADAM_BETAS, fused=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        ema.to(self.device)
        self.uncompiled = network
        self.network = compile_network(network, optim.compile_model, self.device, logger.log_line)
        self.state = TrainingState(self.accelerator, self.transformer, ema, self.optimizer.optimizer, RunningMetrics(self.device))
        self.base = {"init": {"path": str(init.path.resolve()), "name": init.name}} if init else {}
        self.empty = cache.read_empty(1).to(self.device)
        self.scaling_and_shift = cache.scaling_and_shift(self.device)
        self.val_loss, self.seconds_before = float("nan"), 0.0
        self.measured_from: tuple[int, float] | None = None  # a step, and when it was done
        self.last_metrics: dict[str, float] = {}

        flops = 3 * forward_flops(self.transformer, cache.latent_shape[1:], cache.max_tokens)
        peak = self.accelerator.num_processes * matmul_peak(self.device, DTYPES[self.accelerator.mixed_precision])
        self.seconds_per_image_at_peak = flops / peak
        if resume:
            self._resume(resume)
        else:
            self._log_start(flops, init)

    def train(self) -> tuple[DiT, dict[str, float]]:
        """Train to the last step; return the transformer with its EMA weights, on the CPU, and a summary.

        Raises:
            UserError: memory does not suffice, or the loss is not finite any more.
            Stopped: SIGTERM or Ctrl-C; a checkpoint has been saved.
        """
        runtime, state, first = self.runtime, self.state, self.state.step
        self.started = time.perf_counter()
        batches = StepBatches(self.cache, self.settings.seed, self.batch_size, self.settings.horizontal_flip, self.slices)
        self.batches = load_batches(batches, first, self.total_steps, self.device, runtime)
        main = self.accelerator.is_main_process
        self.try_compiled()
        self.progress = tqdm(initial=first, total=self.total_steps, desc="train", unit="step", disable=not main)
        with StopRequest() as request:
            for step in range(first, self.total_steps):
                self.set_learning_rate(step)
                self.train_step_or_explain(step)
                state.step = done = step + 1
                self.progress.update()

                last = done == self.total_steps
                logs = done % runtime.log_every == 0 or last
                if logs:
                    self.log(done)
                self.print_time_left(done, logs)
                if done % self.settings.validate_every == 0 or last:
                    last |= self.validate(done)
                if done % runtime.sample_every == 0 or last:
                    self.preview(done)
                if last:
                    break
                if done % runtime.checkpoint_every == 0:
                    self.save_checkpoint()
                if self.stop_requested(request, logs):
                    self.save_checkpoint(wait=True)
                    by = request.name or "a signal"
                    raise Stopped(f"stopped by {by} after step {done} of {self.total_steps}; the same command resumes there")
        self.progress.close()
        return self.finish()

    def set_learning_rate(self, step: int) -> None:
        """Set the learning rate of `step`."""
        factor = learning_rate_factor(self.settings.lr_scheduler, step, self.warmup_steps, self.total_steps)
        self.learning_rate = self.optim.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def train_step(self, step: int) -> None:
        """Make one step: data, noise, prediction, loss, backward, clip, optimiser, EMA. Nothing waits for the device."""
        losses, timesteps = [], []
        for rows in self.slices:  # the micro-batches of gradient accumulation
            batch, noise = next(self.batches), self.sample_noise(step)[rows]
            losses.append(self.forward_backward(batch, noise, sync_grads=rows is self.slices[-1]))
            timesteps.append(noise.timesteps)
        norm = self.accelerator.clip_grad_norm_(self.trainable.values(), self.settings.max_grad_norm)
        # Fused AdamW skips the update if `found_inf` is set.
        vars(self.state.optimizer)["found_inf"] = (~torch.isfinite(norm)).float()
        norm = whole(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.ema.step(self.trainable.values())
        self.state.metrics.add(torch.cat(losses), torch.cat(timesteps), norm)

    def forward_backward(self, batch: Batch, noise: StepNoise, sync_grads: bool = True) -> torch.Tensor:
        """Add the gradients of some rows of a step's global batch; return their losses (n,), on the device."""
        batch = drop_captions(batch, noise.dropped, self.empty)
        latents = sample_posterior(batch.moments, noise.posterior_noise, *self.scaling_and_shift)
        with nullcontext() if sync_grads else self.accelerator.no_sync(self.network):
            text = (batch.tokens, batch.mask, batch.pooled)
            losses = diffusion_loss(self.network, self.objective, latents, noise.noise, noise.timesteps, *text)
            # Processes' gradients are averaged, so that each counts for as many images as it has.
            loss = losses.sum() * (self.accelerator.num_processes / self.batch_size)
            # A loss that has exploded becomes NaN, and so do the gradients: the step is skipped.
            exploded = losses.detach().mean() > MAX_LOSS
            self.accelerator.backward(loss * torch.where(exploded, float("nan"), 1.0))
        return losses.detach()

    def sample_noise(self, step: int) -> StepNoise:
        """Sample the randomness of the global batch of `step`."""
        seed, dropout = self.settings.seed, self.settings.caption_dropout
        bucket, _ = choose_bucket(self.bucket_sizes, seed, step, self.batch_size)
        shape = self.cache.latent_shapes[bucket]
        return sample_step_noise(shape, seed, step, self.batch_size, dropout, self.objective, self.device)

    def try_compiled(self) -> None:
        """Compute gradients once with the compiled network; if that fails in any process, train without compiling in all of them.

        No weight changes, and no randomness is used up: it comes from counters. Without a compiler that works, or without the
        headers of Python, torch.compile raises errors of many kinds, and only when the network is first used. A fault that is not
        the compiler's is raised again by the first step.
        """
        if self.network is self.uncompiled and not self.sharded:
            return
        problem = None
        try:
            self.redo(self.state.step, self.slices[0], sync_grads=False)
        except Exception as error:
            # Memory is the business of the first step, which names what fits.
            problem = None if is_out_of_memory(error) else _compiler_error(error)
        self.optimizer.zero_grad()
        problem = next(filter(None, gather_object([problem])), None)
        if problem:
            self.network = self.uncompiled
            for module in self.transformer.modules():  # where they were compiled in place
                module._compiled_call_impl = None
            self.logger.log_line(f"torch.compile failed, so the transformer is not compiled: {problem}")

    def train_step_or_explain(self, step: int) -> None:
        """Make one step; raise a `UserError` that names the batch size that would fit where this one does not."""
        try:
            return self.train_step(step)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise  # else: what the step holds is free only when this clause is left
            if self.sharded:  # to try a smaller batch takes all processes, and not all of them have run out of memory
                raise UserError(out_of_memory(error, SMALLER_BATCH)) from None
        self.optimizer.zero_grad()
        # The optimiser's moments need memory, too: before the first step they are not there yet.
        moments = [torch.empty_like(p) for p in self.trainable.values() for _ in range(2)] if not self.state.step else []
        fits = largest_batch_that_fits(lambda count: self.redo(step, slice(0, count)), self.settings.batch_size)
        del moments
        raise UserError(oom_message(self.settings, fits))

    def redo(self, step: int, rows: slice, sync_grads: bool = True) -> None:
        """Compute the gradients of some rows of `step` again, outside the order of the batches."""
        settings = self.settings
        batch = read_batch(self.cache, settings.seed, step, self.batch_size, settings.horizontal_flip, rows).to(self.device)
        self.forward_backward(batch, self.sample_noise(step)[rows], sync_grads)

    def log(self, done: int) -> None:
        """Log the means since the last log; raise a `UserError` after too many steps in a row without finite gradients."""
        metrics = self.state.metrics.compute_and_reset(self.accelerator, self.batch_size, self.seconds_per_image_at_peak)
        self.last_metrics = metrics | {"learning_rate": self.learning_rate}
        with self.state.metrics.paused():
            log_step(self.last_metrics, done, self.total_steps, self.logger, self.progress)
            skipped = self.state.metrics.nonfinite_in_a_row
            if skipped >= self.settings.max_nonfinite_steps:
                self.save_checkpoint(wait=True)
                self.redo(done - skipped, self.slices[0])
                raise UserError(_explain_nonfinite(self.transformer, done - skipped, done, self.checkpoints))

    def print_time_left(self, done: int, logs: bool) -> None:
        """Print, at the first log, about how long the rest takes; the first step, which fills caches, is no measure."""
        if self.measured_from is None:
            self.measured_from = done, time.perf_counter()
            return
        before, began = self.measured_from
        if logs and done - before <= self.runtime.log_every and done < self.total_steps:
            pace = (time.perf_counter() - began) / (done - before)
            self.logger.echo(f"step {done} of {self.total_steps}: about {duration(pace * (self.total_steps - done))} to go")

    def validate(self, done: int) -> bool:
        """Measure and log the validation losses of the EMA weights and of the raw ones; return whether to stop early."""
        settings, patience, best = self.settings, self.settings.early_stopping_patience, self.state.early_stopping
        arguments = (self.cache, self.val_objective, settings.batch_size, VALIDATION_IMAGES, self.accelerator, self.sharded)
        with self.state.metrics.paused(), memory_errors(SMALLER_BATCH):
            with self.state.ema_weights() as ema:
                self.val_loss = validation_loss(ema, *arguments)
            raw = validation_loss(self.transformer.eval(), *arguments)
            self.transformer.train()
            self.logger.log_metrics(done, {"val_loss": self.val_loss, "val_loss_raw": raw})
            line = f"step {done}/{self.total_steps} validation loss {self.val_loss:.4f} (EMA), {raw:.4f} (raw)"
            self.logger.log_line(line, echo=False)
            if not patience:
                return False
            best.update(self.val_loss, done, self.state.ema)
            if best.num_bad_evals < patience:
                return False
            self.logger.log_line(f"stopped early at step {done}: the lowest validation loss was at step {best.step}")
            return True

    def preview(self, done: int) -> None:
        """Sample and log a grid of images with the EMA weights; without the memory for it, training goes on, and logs why."""
        if not self.decode or not (self.accelerator.is_main_process or self.sharded):
            return
        try:
            with self.state.metrics.paused(), self.state.ema_weights() as ema:
                autocast = self.accelerator.autocast
                image = sample_preview(ema, self.cache, self.val_objective, PREVIEW_IMAGES, self.decode, autocast)
                self.logger.log_preview(done, image)  # a `NullLogger`'s does nothing
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.logger.log_line(f"no preview at step {done}: {out_of_memory(error, SMALLER_BATCH)}")

    def keep_last_state(self, keep: Checkpoints) -> None:
        """Save the state of the finished training in `keep`, from where a training of more epochs goes on.

        One that has stopped early keeps none: with more epochs it would have stopped as well.
        """
        patience = self.settings.early_stopping_patience
        if patience and self.state.early_stopping.num_bad_evals >= patience:
            self.logger.log_line("stopped early, so that no state is kept: more epochs would have ended at the same step")
            return
        self.save_checkpoint(wait=True, place=keep)
        self.logger.log_line(f"the last state is kept in {keep.folder}, from which a larger num_epochs goes on", echo=True)

    def save_checkpoint(self, wait: bool = False, place: Checkpoints | None = None) -> None:
        """Save all that is needed to resume; with `wait`, until it is on the disk. Every process has to call this."""
        checkpoints = place or self.checkpoints
        tensors = self.state.tensors()
        if self.accelerator.is_main_process:
            about = {
                "seconds": self.seconds_before + time.perf_counter() - self.started,
                "logger": self.logger.state(),
                "precision": self.accelerator.mixed_precision,
                "model": describe_model(self.transformer, self.cache, self.model, self.optim, self.settings) | self.base,
            }
            checkpoints.save(self.state.step, tensors, self.state.record() | about)
        if wait:
            checkpoints.wait()
            self.accelerator.wait_for_everyone()

    def stop_requested(self, request: StopRequest, logs: bool) -> bool:
        """Return whether a signal came; several processes look together, at the steps that log."""
        if self.accelerator.num_processes == 1:
            return request.name is not None
        if not logs:
            return False
        asked = torch.tensor(float(request.name is not None), device=self.device)
        return self.accelerator.reduce(asked).item() > 0

    def finish(self) -> tuple[DiT, dict[str, float]]:
        """Return the transformer with the EMA weights, or the best ones of early stopping, and the summary."""
        seconds = self.seconds_before + time.perf_counter() - self.started
        self.checkpoints.wait()
        self.accelerator.wait_for_everyone()
        if self.keep:
            self.keep_last_state(self.keep)
        best = self.state.early_stopping
        result = build_trainable(self.cache, self.model, self.settings, None)
        result.load_state_dict({name: gather(value) for name, value in self.transformer.state_dict().items()})
        weights = best.weights or self.state.ema.shadow_params
        for parameter, value in zip(trainable_parameters(result).values(), weights, strict=True):
            parameter.data.copy_(gather(value))
        return result, {
            "steps": self.state.step,
            "train_loss": self.last_metrics["train_loss"],
            "val_loss": best.loss if best.weights else self.val_loss,
            "images_per_second": self.state.step * self.batch_size / seconds,
            "mfu": self.last_metrics["mfu"],
            "seconds": seconds,
            "parameters": count_parameters(result),
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        if checkpoint.step >= self.total_steps:
            raise UserError(
                f"{checkpoint.path}: of step {checkpoint.step}, but the settings ask for {self.total_steps} steps only"
            )
        self.state.load(checkpoint)
        self.seconds_before = checkpoint.record["seconds"]
        self.logger.restore(checkpoint.record["logger"], checkpoint.step)
        self.logger.echo(f"resuming after step {checkpoint.step} of {self.total_steps}")

    def _log_start(self, flops: int, init: InitModel | None) -> None:
        processes, precision = self.accelerator.num_processes, self.accelerator.mixed_precision
        precision = "fp32" if precision == "no" else precision
        share = f", {processes} processes" if processes > 1 else ""
        self.logger.log_line(
            f"{len(self.cache.train)} images, {self.optim.num_epochs} epochs: {self.total_steps} steps of {self.batch_size}, "
            f"{precision} on {self.device.type}{share}"
        )
        if self.warmup_steps < self.settings.warmup_steps:
            self.logger.log_line(
                f"train.warmup_steps: {self.settings.warmup_steps} is more than a tenth of this run; "
                f"the learning rate rises for {self.warmup_steps} steps"
            )
        parameters = count_parameters(self.transformer) / 1e6
        self.logger.log_line(f"{parameters:.1f} M parameters, {flops / 1e9:.2f} GFLOP per image and step")
        if init:
            moments = init.load_moments(self.state.optimizer, self.trainable)
            init.describe(self.logger.log_line, self.objective.prediction_type, dict(self.cache.index["clip"]), moments)
        trained = sum(parameter.numel() for parameter in self.trainable.values())
        if self.settings.method == "lora":
            self.logger.log_line(f"adapters of rank {self.settings.lora.rank}: {trained / 1e6:.2f} M parameters are trained")


def _explain_nonfinite(transformer: DiT, first: int, done: int, checkpoints: Checkpoints) -> str:
    """Word why a training ends whose steps are all skipped, from the gradients of the first of them."""
    names = [n for n, p in transformer.named_parameters() if p.grad is not None and not torch.isfinite(whole(p.grad)).all()]
    where = f"the first parameter with such a gradient is {names[0]}" if names else "its gradients are finite by now"
    return (
        f"the {done - first} steps after step {first} were skipped (train.max_nonfinite_steps): loss or gradients not finite; "
        f"{where}. The last good state is in {checkpoints.folder}; a lower learning_rate or max_grad_norm may help"
    )


def _compiler_error(error: Exception) -> str:
    """Return the line that a compiler has printed, if `error` holds one, or else its beginning."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "error:" in line), one_line(error, with_type=True))
