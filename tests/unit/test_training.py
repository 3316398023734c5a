"""Training: what a step sees is a pure function of (seed, step), and the loop learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit.errors import UserError
from dit.latents.device_cache import DeviceLatentCache
from dit.model.objectives import Flow
from dit.training import trainer as loop
from dit.training.data import StepBatches, drop_captions, global_batch, load_batches, read_batch, sample_step_noise
from dit.training.setup import choose_precision, learning_rate_factor
from dit.training.validation import validation_loss
from helpers.cache import write_cache
from helpers.training import CPU, MODEL, PARAMS, Notes, run, same, settings


def test_a_step_draws_among_all_crops_and_mirror_images(tmp_path):
    cache = write_cache(tmp_path, views=6)
    views = torch.cat([load_file(path)["moments"] for path in sorted(tmp_path.glob("shard-*"))])[cache.train]
    seen = set()
    for step in range(20):
        for moments in read_batch(cache, 0, step, 9, True, slice(0, 9)).moments:
            seen |= {int(view) for view in (views == moments).flatten(2).all(2).nonzero()[:, 1]}
    assert seen == set(range(6))
    fixed = {step: read_batch(cache, 0, step, 9, False, slice(0, 9)).moments for step in range(5)}
    shown = [int((views == m).flatten(2).all(2).nonzero()[0, 1]) for moments in fixed.values() for m in moments]
    assert set(shown) == {0, 2, 4}  # never mirrored


def test_every_epoch_shows_every_image_once_in_another_order():
    images = np.arange(100, 112)
    seen = np.concatenate([global_batch(images, seed=1, step=step, batch_size=8) for step in range(6)])
    for epoch in range(4):
        assert sorted(seen[12 * epoch : 12 * epoch + 12]) == images.tolist()
    assert seen[:12].tolist() != seen[12:24].tolist()
    assert seen[:12].tolist() != [global_batch(images, 2, 0, 12).tolist()][0]


def test_a_step_depends_on_seed_and_step_alone(cache):
    def everything(seed: int, step: int):
        chance = sample_step_noise(cache.latent_shape, seed, step, 8, 0.5, Flow(), CPU)
        return [*vars(read_batch(cache, seed, step, 8, True, slice(0, 8))).values(), *vars(chance).values()]

    torch.manual_seed(5)
    first = everything(3, 7)
    torch.manual_seed(6)
    everything(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(3, 7), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(first[:2] + first[4:7], (everything(3, 8)[:2] + everything(3, 8)[4:7]), strict=True)
    )


def test_the_parts_of_processes_make_up_the_global_batch(cache):
    whole = read_batch(cache, 0, 2, 8, True, slice(0, 8))
    halves = [read_batch(cache, 0, 2, 8, True, slice(a, a + 4)) for a in (0, 4)]
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(half, name) for half in halves]))


def test_dropped_captions_become_the_empty_one(cache):
    batch, empty = read_batch(cache, 0, 0, 4, False, slice(0, 4)), cache.read_empty(1)
    result = drop_captions(batch, torch.tensor([True, False, True, False]), empty)
    assert torch.equal(result.tokens[0], empty.tokens[0]) and torch.equal(result.mask[2], empty.mask[0])
    assert torch.equal(result.pooled[1], batch.pooled[1]) and torch.equal(result.tokens[3], batch.tokens[3])


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate_factor("cosine", step, 10, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[10] and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert learning_rate_factor("linear", 55, 10, 100) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 99, 10, 100) == 1


def test_the_same_settings_train_the_same_weights_and_another_seed_others(cache, tmp_path):
    first, again, other = (run(cache, tmp_path, {"seed": seed})[0] for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first.unpatch.weight, other.unpatch.weight)


def test_training_reports_curves_previews_and_a_log(cache, tmp_path):
    notes = Notes()
    _, summary = run(cache, tmp_path, journal=notes)
    curves = notes.curves
    assert summary["steps"] == 9 and summary["images_per_second"] > 0
    assert sorted(curves) == [2, 4, 6, 8, 9] and "val_loss" in curves[4] and "val_loss" not in curves[2]
    assert {"train_loss", "grad_norm", "learning_rate", "images_per_second", "mfu", "val_loss", "val_loss_raw"} <= set(curves[9])
    assert curves[4]["val_loss"] != curves[4]["val_loss_raw"]
    assert sorted(notes.pictures) == [4, 8, 9] and notes.pictures[9].width > 500
    assert any("step 9/9 loss" in line for line in notes.lines)


def test_the_loss_is_reported_by_timestep(cache, tmp_path):
    notes = Notes()
    run(cache, tmp_path, runtime={"log_every": 9}, journal=notes)
    bins = [notes.curves[9][f"loss_t_{k / 5:.1f}_{(k + 1) / 5:.1f}"] for k in range(5)]
    assert all(loss > 0 for loss in bins)
    assert min(bins) < notes.curves[9]["train_loss"] < max(bins)


def test_the_window_counts_each_row_in_its_bin_and_no_skipped_step(monkeypatch):
    class Alone:
        num_processes, is_main_process = 1, True

    window = loop.RunningMetrics(CPU)
    window.add(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.15, 0.99]), torch.tensor(3.0))
    window.add(torch.tensor([float("nan")]), torch.tensor([0.5]), torch.tensor(float("nan")))
    assert window.in_a_row == 1
    values = window.close(Alone(), 3, 0.0)
    assert values["train_loss"] == 3 and values["grad_norm"] == 3 and values["skipped_steps"] == 1
    assert values["loss_t_0.0_0.2"] == 1.5 and values["loss_t_0.8_1.0"] == 6 and np.isnan(values["loss_t_0.4_0.6"])
    window.add(torch.tensor([float("inf")]), torch.tensor([0.5]), torch.tensor(float("inf")))
    assert window.in_a_row == 2  # over the border of two windows
    window.add(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor(1.0))
    assert window.in_a_row == 0


def test_mixed_precision_trains_validates_and_draws_close_to_what_fp32_does(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "has_fast_bf16", lambda device: True)  # slow where it is emulated, and the same numbers
    fp32, bf16 = Notes(), Notes()
    for precision, notes in (("no", fp32), ("bf16", bf16)):
        run(cache, tmp_path, {"mixed_precision": precision}, journal=notes)
    assert bf16.curves[8]["val_loss"] == pytest.approx(fp32.curves[8]["val_loss"], rel=0.02)
    assert bf16.curves[9]["train_loss"] == pytest.approx(fp32.curves[9]["train_loss"], rel=0.05)


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_eight_images_are_learned_by_heart(tmp_path, objective):
    """Random pictures of 256 numbers each: knowing nothing of them costs about 2 for the flow's target and 1 for v."""
    cache, notes = write_cache(tmp_path / "cache", images=10, val=2, shards=1, captions=1, size=4), Notes()
    train = {"caption_dropout": 0.0, "horizontal_flip": False, "batch_size": 8, "objective": objective, "validate_every": 1000}
    often = {"log_every": 50, "sample_every": 1000, "checkpoint_every": 1000}
    run(cache, tmp_path / "state", train, often, notes, num_epochs=800, learning_rate=3e-3)
    losses = [values["train_loss"] for values in notes.curves.values() if "train_loss" in values]
    assert losses[-1] < 0.1 * losses[0]


def test_accumulating_gradients_trains_as_one_larger_batch_does(cache, tmp_path):
    whole = run(cache, tmp_path, {"batch_size": 6})[0]
    split = run(cache, tmp_path, {"batch_size": 3, "gradient_accumulation_steps": 2})[0]
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def poison(monkeypatch, calls_to_spoil: set[int], factor: float) -> None:
    """Multiply the loss by `factor` in the given calls, counted from 1."""
    original, calls = loop.diffusion.loss, itertools.count(1)

    def poisoned(*arguments):
        loss = original(*arguments)
        return loss * factor if torch.is_grad_enabled() and next(calls) in calls_to_spoil else loss

    monkeypatch.setattr(loop.diffusion, "loss", poisoned)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e6])
def test_a_step_that_explodes_or_is_no_number_is_skipped_and_reported(cache, tmp_path, monkeypatch, factor):
    notes = Notes()
    poison(monkeypatch, {3}, factor)
    model, _ = run(cache, tmp_path, journal=notes)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any("1 steps up to step 4 were skipped" in line for line in notes.lines)
    assert [notes.curves[step]["skipped_steps"] for step in (2, 4, 6)] == [0, 1, 0]


def test_a_skipped_step_changes_no_weight(cache, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)), float("nan"))
    model = run(cache, tmp_path, {"max_nonfinite_steps": 100})[0]
    assert same(model, loop.build_model(cache, MODEL, PARAMS.train.seed))


def test_too_many_skipped_steps_end_the_training_with_the_good_state_and_the_parameter(cache, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(4, 100)), float("nan"))
    with pytest.raises(UserError, match=r"the 3 steps after step 3 were skipped .* parameter .* is patch\.weight\."):
        run(cache, tmp_path, {"max_nonfinite_steps": 3})
    kept = load_file(tmp_path / "step-00000006.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())


def test_training_stops_early_and_takes_the_best_weights(cache, tmp_path, monkeypatch):
    losses = iter([0.5, 9.0, 0.4, 9.0, 0.6, 9.0, 0.7, 9.0, 0.1, 9.0])  # of the moving average and the raw weights in turn
    seen = []

    def validate(model, *arguments):
        seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return next(losses)

    monkeypatch.setattr(loop, "validation_loss", validate)
    notes = Notes()
    model, summary = run(cache, tmp_path, {"validate_every": 1, "early_stopping_patience": 2}, journal=notes)
    assert summary["steps"] == 4 and summary["val_loss"] == 0.4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), seen[2], strict=True))
    assert "stopped early at step 4: the lowest validation loss was at step 2" in notes.lines


def test_validating_and_drawing_do_not_change_what_is_trained(cache, tmp_path):
    often = run(cache, tmp_path, {"validate_every": 1}, {"sample_every": 1, "log_every": 1})[0]
    seldom = run(cache, tmp_path, {"validate_every": 100}, {"sample_every": 100, "log_every": 100})[0]
    assert same(often, seldom)


def test_a_batch_that_does_not_fit_in_memory_is_answered_with_one_that_does(cache, tmp_path, monkeypatch):
    original = loop.diffusion.loss

    def small_memory(objective, prediction, *arguments):
        if len(prediction) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(objective, prediction, *arguments)

    monkeypatch.setattr(loop.diffusion, "loss", small_memory)
    with pytest.raises(UserError, match="train.batch_size: 6 images need more memory than there is; 3 fit: .*steps 2"):
        run(cache, tmp_path)
    with pytest.raises(UserError, match="batch_size: 15 .*; 3 fit: .*steps 5"):
        run(cache, tmp_path, {"batch_size": 15, "gradient_checkpointing": True})


def test_batches_are_the_same_from_files_from_workers_and_from_the_devices_memory(tmp_path):
    cache = write_cache(tmp_path, views=6)
    steps = StepBatches(cache, 3, 8, True, [slice(0, 3), slice(3, 8)])
    expected = [read_batch(cache, 3, step, 8, True, rows) for step in (2, 3) for rows in steps.parts]
    resident = load_batches(steps, 2, 4, CPU, settings(runtime={"data_on_device": True})[2])
    plain = load_batches(steps, 2, 4, CPU, settings()[2])
    workers = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(4, 8), num_workers=2)
    for batches in (resident, plain, workers):
        found = list(batches)
        assert len(found) == 4
        for batch, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(vars(batch).values(), vars(wanted).values(), strict=True))
    assert isinstance(DeviceLatentCache(cache, CPU).read(cache.train[:1], np.zeros(1), np.zeros(1, bool)).mask, torch.Tensor)


def test_the_validation_loss_is_the_same_for_every_batch_size(cache):
    model = loop.build_model(cache, MODEL, 0).eval()
    losses = [validation_loss(model, cache, batch_size, Flow(), passes=2) for batch_size in (1, 4, 6)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_precision_that_the_machine_cannot_do_is_refused_or_replaced(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", print)
    lines: list[str] = []
    monkeypatch.setattr(loop, "has_fast_bf16", lambda device: False)
    assert choose_precision("bf16", lines.append) == "no" and "not faster in bf16" in lines[0]
    assert choose_precision("bf16", print, begun_in="bf16") == "bf16"  # a training that goes on
    assert choose_precision("no", print, begun_in="bf16") == "no"  # with other settings, on purpose
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", print, begun_in="bf16")


@pytest.mark.slow
def test_compiled_training_is_close_to_plain_training(cache, tmp_path):
    plain, compiled = (run(cache, tmp_path, compile_model=wanted)[0] for wanted in (False, True))
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
