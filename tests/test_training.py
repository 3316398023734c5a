"""Training: what a step sees is a pure function of (seed, step), and the loop learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPO, write_cache
from PIL import Image
from safetensors.torch import load_file

from dit.config import Model, Schedule, load_config
from dit.errors import UserError
from dit.training import loop
from dit.training.batches import draw_step, drop_captions, global_batch, read_step
from dit.training.loop import Watchers, choose_precision, train_transformer
from dit.training.schedule import learning_rate_factor
from dit.training.validation import validation_loss

PARAMS = load_config(REPO / "params.yaml")
MODEL = Model(patch_size=2, hidden_size=64, num_layers=2, num_heads=4)
CPU = torch.device("cpu")


def watch(metrics: dict | None = None, lines: list | None = None, previews: dict | None = None) -> Watchers:
    return Watchers(
        metrics=lambda step, values: (metrics if metrics is not None else {}).setdefault(step, {}).update(values),
        preview=lambda step, picture: (previews if previews is not None else {}).update({step: picture}),
        log=(lines if lines is not None else []).append,
        decode=lambda latents: [Image.new("RGB", (64, 64))] * len(latents),
    )


def run(cache, epochs: int = 3, train: dict | None = None, watchers: Watchers | None = None, rate: float = 1e-3):
    settings = replace(PARAMS.train, **{"batch_size": 6, "warmup_steps": 2, "mixed_precision": "no"} | (train or {}))
    schedule = Schedule(num_epochs=epochs, learning_rate=rate, logit_mean=0.0, compile_model=False)
    runtime = replace(PARAMS.runtime, log_every=2, validate_every=4, sample_every=4)
    AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first training
    return train_transformer(cache, MODEL, schedule, settings, runtime, watchers or watch())


def test_a_step_draws_among_all_crops_and_mirror_images(tmp_path):
    cache = write_cache(tmp_path, views=6)
    views = torch.cat([load_file(path)["moments"] for path in sorted(tmp_path.glob("shard-*"))])[cache.train]
    seen = set()
    for step in range(20):
        for moments in read_step(cache, 0, step, 9, True, slice(0, 9)).moments:
            seen |= {int(view) for view in (views == moments).flatten(2).all(2).nonzero()[:, 1]}
    assert seen == set(range(6))
    fixed = {step: read_step(cache, 0, step, 9, False, slice(0, 9)).moments for step in range(5)}
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
        chance = draw_step(cache.latent_shape, seed, step, 8, 0.5, 0.0, CPU)
        return [*vars(read_step(cache, seed, step, 8, True, slice(0, 8))).values(), *vars(chance).values()]

    torch.manual_seed(5)
    first = everything(3, 7)
    torch.manual_seed(6)
    everything(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(3, 7), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(first[:2] + first[4:7], (everything(3, 8)[:2] + everything(3, 8)[4:7]), strict=True)
    )


def test_the_parts_of_processes_make_up_the_global_batch(cache):
    whole = read_step(cache, 0, 2, 8, True, slice(0, 8))
    halves = [read_step(cache, 0, 2, 8, True, slice(a, a + 4)) for a in (0, 4)]
    for name, value in vars(whole).items():
        assert torch.equal(value, torch.cat([getattr(half, name) for half in halves]))


def test_dropped_captions_become_the_empty_one(cache):
    batch, empty = read_step(cache, 0, 0, 4, False, slice(0, 4)), cache.read_empty(1)
    result = drop_captions(batch, torch.tensor([True, False, True, False]), empty)
    assert torch.equal(result.tokens[0], empty.tokens[0]) and torch.equal(result.mask[2], empty.mask[0])
    assert torch.equal(result.pooled[1], batch.pooled[1]) and torch.equal(result.tokens[3], batch.tokens[3])


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate_factor("cosine", step, 10, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[10] and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert learning_rate_factor("linear", 55, 10, 100) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 99, 10, 100) == 1


def test_the_same_settings_train_the_same_weights_and_another_seed_others(cache):
    first, again, other = (run(cache, train={"seed": seed})[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["unpatch.weight"], other["unpatch.weight"])


def test_training_reports_curves_previews_and_a_log(cache):
    metrics, lines, previews = {}, [], {}
    _, summary = run(cache, watchers=watch(metrics, lines, previews))
    assert summary["steps"] == 9 and summary["images_per_second"] > 0
    assert sorted(metrics) == [2, 4, 6, 8, 9] and "val_loss" in metrics[4] and "val_loss" not in metrics[2]
    assert {"train_loss", "grad_norm", "learning_rate", "images_per_second", "mfu"} <= set(metrics[9])
    assert sorted(previews) == [4, 8, 9] and previews[9].width > 500
    assert any("step 9/9 loss" in line for line in lines)


def test_mixed_precision_trains_validates_and_draws_close_to_what_fp32_does(cache, monkeypatch):
    monkeypatch.setattr(loop, "has_bf16", lambda device: True)  # emulated where it is not there: slow, and the same numbers
    curves: list[dict] = [{}, {}]
    for precision, curve in zip(("no", "bf16"), curves, strict=True):
        run(cache, train={"mixed_precision": precision}, watchers=watch(curve))
    assert curves[1][8]["val_loss"] == pytest.approx(curves[0][8]["val_loss"], rel=0.02)
    assert curves[1][9]["train_loss"] == pytest.approx(curves[0][9]["train_loss"], rel=0.05)


def test_eight_images_are_learned_by_heart(tmp_path):
    cache = write_cache(tmp_path, images=10, val=2, shards=1, captions=1)
    metrics: dict = {}
    run(cache, 150, {"caption_dropout": 0.0, "horizontal_flip": False, "ema_decay": 0.9}, watch(metrics), rate=3e-3)
    losses = [metrics[step]["train_loss"] for step in sorted(metrics)]
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_accumulating_gradients_trains_as_one_larger_batch_does(cache):
    whole = run(cache, train={"batch_size": 6})[0]
    assert whole is not None
    parts = replace(PARAMS.train, batch_size=3, gradient_accumulation_steps=2, warmup_steps=2, mixed_precision="no")
    schedule = Schedule(num_epochs=3, learning_rate=1e-3, logit_mean=0.0, compile_model=False)
    runtime = replace(PARAMS.runtime, log_every=2, validate_every=100, sample_every=100)
    split, _ = train_transformer(cache, MODEL, schedule, parts, runtime, watch())
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_step_without_finite_gradients_is_skipped_and_reported(cache, monkeypatch):
    lines: list[str] = []
    original, calls = loop.diffusion.loss, []

    def poisoned(prediction, images, noise):
        calls.append(1)
        return original(prediction, images, noise) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loop.diffusion, "loss", poisoned)
    model, _ = run(cache, watchers=watch(lines=lines))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any("1 steps up to step 4 were skipped" in line for line in lines)


def test_the_validation_loss_is_the_same_for_every_batch_size(cache):
    model = loop.build_model(cache, MODEL, 0).eval()
    losses = [validation_loss(model, cache, batch_size, passes=2) for batch_size in (1, 4, 6)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_precision_that_the_machine_cannot_do_is_refused_or_replaced(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", print)
    lines: list[str] = []
    monkeypatch.setattr(loop, "has_bf16", lambda device: False)
    assert choose_precision("bf16", lines.append) == "no" and "no bf16 instructions" in lines[0]
