"""Training: what a step sees is a pure function of (seed, step), and the loop learns."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit.errors import UserError
from dit.model.objectives import Flow
from dit.training import setup, trainer
from dit.training.data import StepBatches, drop_captions, global_batch, load_batches, read_batch, sample_step_noise
from dit.training.logging import RunningMetrics, duration
from dit.training.setup import build_model, choose_precision, learning_rate_factor
from dit.training.validation import validation_losses
from helpers.cache import write_cache
from helpers.training import CPU, MODEL, TRAIN, MemoryLogger, run, same, settings


def test_read_batch_takes_all_crops_and_mirror_images(tmp_path):
    cache = write_cache(tmp_path, augmentations=6)
    augmentations = torch.cat([load_file(path)["moments"] for path in sorted(tmp_path.glob("shard-*"))])[cache.train]
    seen = set()
    for step in range(20):
        for moments in read_batch(cache, 0, step, 9, True, slice(0, 9)).moments:
            seen |= {int(augmentation) for augmentation in (augmentations == moments).flatten(2).all(2).nonzero()[:, 1]}
    assert seen == set(range(6))
    fixed = {step: read_batch(cache, 0, step, 9, False, slice(0, 9)).moments for step in range(5)}
    shown = [int((augmentations == m).flatten(2).all(2).nonzero()[0, 1]) for moments in fixed.values() for m in moments]
    assert set(shown) == {0, 2, 4}  # never mirrored


def test_global_batch_shows_every_image_once_per_epoch():
    images = np.arange(100, 112)
    seen = np.concatenate([global_batch(images, seed=1, step=step, batch_size=8) for step in range(6)])
    for epoch in range(4):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == images.tolist()
    assert seen[:12].tolist() != seen[12:24].tolist()
    assert seen[:12].tolist() != [global_batch(images, 2, 0, 12).tolist()][0]


def test_step_depends_on_seed_and_step_alone(cache):
    def everything(seed: int, step: int):
        noise = sample_step_noise(cache.latent_shape, seed, step, 8, 0.5, Flow(), CPU)
        return [*vars(read_batch(cache, seed, step, 8, True, slice(0, 8))).values(), *vars(noise).values()]

    torch.manual_seed(5)
    first = everything(3, 7)
    torch.manual_seed(6)
    everything(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(3, 7), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(first[:2] + first[4:7], (everything(3, 8)[:2] + everything(3, 8)[4:7]), strict=True)
    )


def test_read_batch_slices_make_up_global_batch(cache):
    whole = read_batch(cache, 0, 2, 8, True, slice(0, 8))
    halves = [read_batch(cache, 0, 2, 8, True, slice(a, a + 4)) for a in (0, 4)]
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(half, name) for half in halves]))


def test_drop_captions_puts_empty_caption(cache):
    batch, empty = read_batch(cache, 0, 0, 4, False, slice(0, 4)), cache.read_empty(1)
    result = drop_captions(batch, torch.tensor([True, False, True, False]), empty)
    assert torch.equal(result.tokens[0], empty.tokens[0]) and torch.equal(result.mask[2], empty.mask[0])
    assert torch.equal(result.pooled[1], batch.pooled[1]) and torch.equal(result.tokens[3], batch.tokens[3])


def test_learning_rate_warms_up_and_falls():
    rates = [learning_rate_factor("cosine", step, 10, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[10] and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert learning_rate_factor("linear", 55, 10, 100) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 99, 10, 100) == 1


def test_trainer_same_seed_same_weights(cache, tmp_path):
    first, again, other = (run(cache, tmp_path, {"seed": seed})[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first.final_layer.linear.weight, other.final_layer.linear.weight)


def test_trainer_logs_curves_previews_and_lines(cache, tmp_path):
    logger = MemoryLogger()
    _, summary = run(cache, tmp_path, logger=logger)
    curves = logger.curves
    assert summary["steps"] == 9 and summary["images_per_second"] > 0
    assert sorted(curves) == [2, 4, 6, 8, 9] and "val_loss" in curves[4] and "val_loss" not in curves[2]
    assert {"train_loss", "grad_norm", "learning_rate", "images_per_second", "mfu", "val_loss", "val_loss_raw"} <= set(curves[9])
    assert curves[4]["val_loss"] != curves[4]["val_loss_raw"]
    assert sorted(logger.previews) == [4, 8, 9] and logger.previews[9].width > 500
    assert any("step 9/9 loss" in line for line in logger.lines)


def test_trainer_logs_loss_by_timestep(cache, tmp_path):
    logger = MemoryLogger()
    run(cache, tmp_path, runtime={"log_every": 9}, logger=logger)
    bins = [logger.curves[9][f"loss_t_{k / 5:.1f}_{(k + 1) / 5:.1f}"] for k in range(5)]
    assert all(loss > 0 for loss in bins)
    assert min(bins) < logger.curves[9]["train_loss"] < max(bins)


class OneProcess:
    num_processes, is_main_process = 1, True


def test_running_metrics_average_finite_steps_by_bin():
    metrics = RunningMetrics(CPU)
    metrics.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.15, 0.99]), torch.tensor(3.0))
    metrics.add(torch.tensor([float("nan")]), torch.tensor([0.5]), torch.tensor(float("nan")))
    values = metrics.compute_and_reset(OneProcess(), 3, 0.0)
    assert values["train_loss"] == 3 and values["grad_norm"] == 3 and values["skipped_steps"] == 1
    assert values["loss_t_0.0_0.2"] == 1.5 and values["loss_t_0.8_1.0"] == 6 and np.isnan(values["loss_t_0.4_0.6"])


def test_running_metrics_count_nonfinite_steps_in_a_row_over_resets():
    metrics, found = RunningMetrics(CPU), []
    for norm in ("nan", "inf", "1"):
        metrics.add(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor(float(norm)))
        found.append(metrics.nonfinite_in_a_row)
        metrics.compute_and_reset(OneProcess(), 1, 0.0)
    assert found == [1, 2, 0]


def test_trainer_bf16_is_close_to_fp32(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "has_fast_bf16", lambda device: True)  # slow where it is emulated, and the same numbers
    fp32, bf16 = MemoryLogger(), MemoryLogger()
    for precision, logger in (("no", fp32), ("bf16", bf16)):
        run(cache, tmp_path, {"mixed_precision": precision}, logger=logger)
    assert bf16.curves[8]["val_loss"] == pytest.approx(fp32.curves[8]["val_loss"], rel=0.02)
    assert bf16.curves[9]["train_loss"] == pytest.approx(fp32.curves[9]["train_loss"], rel=0.05)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_trainer_learns_eight_images_by_heart(tmp_path, objective):
    """Random images of 256 numbers each: knowing nothing of them costs about 2 for the flow's target and 1 for v."""
    cache, logger = write_cache(tmp_path / "cache", images=10, val=2, shards=1, captions=1, size=4), MemoryLogger()
    train = {"caption_dropout": 0.0, "horizontal_flip": False, "batch_size": 8, "objective": objective, "validate_every": 1000}
    often = {"log_every": 50, "sample_every": 1000, "checkpoint_every": 1000}
    run(cache, tmp_path / "state", train, often, logger, num_epochs=800, learning_rate=3e-3)
    losses = [values["train_loss"] for values in logger.curves.values() if "train_loss" in values]
    assert losses[-1] < 0.1 * losses[0]


def test_trainer_accumulation_equals_larger_batch(cache, tmp_path):
    whole = run(cache, tmp_path, {"batch_size": 6})[0]
    split = run(cache, tmp_path, {"batch_size": 3, "gradient_accumulation_steps": 2})[0]
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def poison(monkeypatch, calls_to_spoil: set[int], factor: float) -> None:
    """Multiply the loss by `factor` in the given calls, counted from 1."""
    original, calls = trainer.diffusion_loss, itertools.count(1)

    def poisoned(*arguments):
        loss = original(*arguments)
        return loss * factor if torch.is_grad_enabled() and next(calls) in calls_to_spoil else loss

    monkeypatch.setattr(trainer, "diffusion_loss", poisoned)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_trainer_skips_nonfinite_step(cache, tmp_path, monkeypatch, factor):
    logger = MemoryLogger()
    poison(monkeypatch, {3}, factor)
    model, _ = run(cache, tmp_path, logger=logger)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any("1 steps up to step 4 were skipped" in line for line in logger.lines)
    assert [logger.curves[step]["skipped_steps"] for step in (2, 4, 6)] == [0, 1, 0]


def test_trainer_skipped_step_changes_no_weight(cache, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)), float("nan"))
    model = run(cache, tmp_path, {"max_nonfinite_steps": 100})[0]
    assert same(model, build_model(cache, MODEL, TRAIN.seed))


def test_trainer_ends_after_max_nonfinite_steps(cache, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(4, 100)), float("nan"))
    with pytest.raises(UserError, match=r"the 3 steps after step 3 were skipped .* parameter .* is x_embedder\.weight\."):
        run(cache, tmp_path, {"max_nonfinite_steps": 3})
    kept = load_file(tmp_path / "step-00000006.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_trainer_early_stopping_takes_best_weights(cache, tmp_path, monkeypatch):
    losses = iter([0.5, 9.0, 0.4, 9.0, 0.6, 9.0, 0.7, 9.0, 0.1, 9.0])  # of the EMA and the raw weights in turn
    seen = []

    def validate(model, *arguments):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return next(losses)

    monkeypatch.setattr(trainer, "validation_loss", validate)
    logger = MemoryLogger()
    model, summary = run(cache, tmp_path, {"validate_every": 1, "early_stopping_patience": 2}, logger=logger)
    assert summary["steps"] == 4 and summary["val_loss"] == 0.4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))
    assert "stopped early at step 4: the lowest validation loss was at step 2" in logger.lines


def test_trainer_validation_and_previews_change_no_weight(cache, tmp_path):
    often = run(cache, tmp_path, {"validate_every": 1}, {"sample_every": 1, "log_every": 1})[0]
    seldom = run(cache, tmp_path, {"validate_every": 100}, {"sample_every": 100, "log_every": 100})[0]
    assert same(often, seldom)


def test_trainer_out_of_memory_names_what_fits(cache, tmp_path, monkeypatch):
    original = trainer.diffusion_loss

    def small_memory(network, objective, latents, *arguments):
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(network, objective, latents, *arguments)

    monkeypatch.setattr(trainer, "diffusion_loss", small_memory)
    with pytest.raises(UserError, match="train.batch_size: 6 images need more memory than there is; 3 fit: .*steps 2"):
        run(cache, tmp_path)
    with pytest.raises(UserError, match="batch_size: 15 .*; 3 fit: .*steps 5"):
        run(cache, tmp_path, {"batch_size": 15, "gradient_checkpointing": True})


def equal(batch, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize("source", ["files", "device", "fork", "spawn"])
def test_batches_are_the_same_from_every_source(tmp_path, monkeypatch, source):
    monkeypatch.delattr(os, "preadv", raising=False)  # which Windows and macOS lack
    cache = write_cache(tmp_path, augmentations=6)
    batches = StepBatches(cache, 3, 8, True, [slice(0, 3), slice(3, 8)])
    expected = [read_batch(cache, 3, step, 8, True, rows) for step in (2, 3) for rows in batches.slices]
    if source in ("files", "device"):
        found = list(load_batches(batches, 2, 4, CPU, settings(runtime={"data_on_device": source == "device"})[2]))
    else:
        workers = {"num_workers": 2, "multiprocessing_context": source}
        found = list(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(4, 8), **workers))
    assert len(found) == 4 and all(map(equal, found, expected))


def test_validation_losses_are_the_same_for_every_batch_size(cache):
    model = build_model(cache, MODEL, 0).eval()
    losses = [validation_losses(model, cache, Flow(), batch_size, passes=2) for batch_size in (1, 4, 6)]
    assert all(np.allclose(losses[0], other, rtol=1e-5) for other in losses)


def test_validation_losses_of_some_rows_are_those_of_all(cache):
    model = build_model(cache, MODEL, 0).eval()
    every = validation_losses(model, cache, Flow(), 4)
    halves = [validation_losses(model, cache, Flow(), 4, rows=rows) for rows in np.array_split(np.arange(len(cache.val)), 2)]
    assert np.allclose(every, np.concatenate(halves, axis=1), rtol=1e-5)


def test_trainer_trains_on_latents_of_sixteen_channels(tmp_path):
    logger = MemoryLogger()
    model, summary = run(write_cache(tmp_path / "cache", channels=16), tmp_path / "state", logger=logger)
    assert model.config.in_channels == 16 and summary["steps"] == 9 and np.isfinite(summary["val_loss"])
    assert sorted(logger.previews) == [4, 8, 9]


def test_choose_precision_refuses_fp16_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for resumed_from in (None, "bf16"):
        with pytest.raises(UserError, match="fp16 needs a GPU"):
            choose_precision("fp16", print, resumed_from)


def test_choose_precision_without_bf16_instructions_is_fp32(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert choose_precision("bf16", lines.append) == "no"
    assert lines == ["this processor has no bf16 instructions: training in fp32"]


def test_trainer_without_bf16_instructions_trains_in_fp32(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    logger = MemoryLogger()
    model, _ = run(cache, tmp_path, {"mixed_precision": "bf16"}, logger=logger)
    assert same(model, run(cache, tmp_path)[0])
    assert len([line for line in logger.lines if "no bf16 instructions: training in fp32" in line]) == 1


def test_choose_precision_keeps_that_of_the_checkpoint(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(setup, "has_fast_bf16", lambda device: False)
    assert choose_precision("bf16", print, resumed_from="bf16") == "bf16"
    assert choose_precision("no", print, resumed_from="bf16") == "no"  # with other settings, on purpose


@pytest.mark.slow
def test_trainer_compiled_is_close_to_plain(cache, tmp_path):
    plain, compiled = (run(cache, tmp_path, compile_model=wanted)[0] for wanted in (False, True))
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("images", "warmup", "taken"), [(20, 100, 4), (20, 3, 3), (20, 0, 0), (4, 100, 0)])
def test_trainer_warm_up_is_at_most_a_tenth_of_the_run(tmp_path, images, warmup, taken):
    """20 images for 12 epochs are 40 steps of 6; with 100 steps of warm-up the rate ended at 0.39 of what is set."""
    cache, logger = write_cache(tmp_path / "cache", images=images + 6), MemoryLogger()
    run(cache, tmp_path / "state", {"warmup_steps": warmup}, {"log_every": 1}, logger, num_epochs=12)
    rates = [logger.curves[step]["learning_rate"] / 1e-3 for step in sorted(logger.curves)]
    assert len(rates) == 2 * images and rates.index(max(rates)) == max(0, taken - 1) and max(rates) == pytest.approx(1)
    assert rates[-1] < 0.2  # the cosine has come to its end
    line = f"train.warmup_steps: {warmup} is more than a tenth of this run; the learning rate rises for {taken} steps"
    assert (line in logger.lines) == (taken < warmup)
    assert logger.lines[0] == f"{images} images, 12 epochs: {2 * images} steps of 6, fp32 on cpu"


def test_trainer_prints_once_how_long_it_takes(cache, tmp_path):
    logger = MemoryLogger()
    run(cache, tmp_path, runtime={"log_every": 4}, logger=logger, num_epochs=6)
    assert [line.split(":")[0] for line in logger.lines if "to go" in line] == ["step 4 of 18"]


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (9000, "2.5 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def full_memory(monkeypatch, name: str) -> None:
    def full(*_, **__):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(trainer, name, full)


def test_trainer_out_of_memory_in_validation_is_one_line(cache, tmp_path, monkeypatch):
    full_memory(monkeypatch, "validation_loss")
    with pytest.raises(UserError, match=r"^memory ran out; a smaller train\.batch_size may fit, .*gradient_accumulation_steps"):
        run(cache, tmp_path)


def test_trainer_out_of_memory_in_a_preview_goes_on(cache, tmp_path, monkeypatch):
    expected, _ = run(cache, tmp_path)
    full_memory(monkeypatch, "sample_preview")
    logger = MemoryLogger()
    model, _ = run(cache, tmp_path, logger=logger)
    assert same(model, expected) and not logger.previews
    assert [line.split(":")[0] for line in logger.lines if "preview" in line] == [f"no preview at step {k}" for k in (4, 8, 9)]


def test_trainer_out_of_cpu_memory_names_what_fits(cache, tmp_path, monkeypatch):
    original = trainer.diffusion_loss

    def small_memory(network, objective, latents, *arguments):
        return original(network, objective, latents, *arguments) if len(latents) <= 3 else torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(trainer, "diffusion_loss", small_memory)
    with pytest.raises(UserError, match="train.batch_size: 6 images need more memory than there is; 3 fit"):
        run(cache, tmp_path)
