"""The evaluation as a whole: its metrics of a small run, twice the same, and of sets that are too small for some of them."""

from __future__ import annotations

import functools
import io
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from dit.config import Model, load_config
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.evaluation.intervals import half_samples, paired_difference, wilson
from dit.evaluation.losses import TIMESTEPS, measure_losses, validation_losses
from dit.evaluation.metrics import Evaluation, evaluate_samples
from dit.latents.cache import LatentCache
from dit.model.objectives import make_objective
from dit.model.transformer import DiT
from dit.shapes.captions import parse
from dit.sources.writer import DatasetWriter, FetchResult
from dit.training.export import save_model
from helpers import REPO
from helpers.cache import write_cache
from helpers.scenes import captions, descriptions, rendered
from helpers.small_models import CHANNELS
from stages.evaluate import log_evaluation

PARAMS = load_config(REPO / "params.yaml")
SETTINGS = replace(PARAMS.evaluate, resamples=20, val_passes=2)


def make_run(folder: Path, images: int, held_out: int, groups: dict[str, list[str]], about_shapes: bool = True, **train) -> Path:
    """Make a run as the earlier stages leave it: data set, latents, a random model, and a rendered scene for each prompt."""
    described = descriptions(31, images)
    texts = captions(described) if about_shapes else [f"photograph {k}" for k in range(images)]
    writer = DatasetWriter(folder / "raw", replace(PARAMS.shapes.data, val_fraction=held_out / images), images)
    for k, (image, text) in enumerate(zip(rendered(described, 31), texts, strict=True)):
        content = io.BytesIO()
        image.save(content, "PNG")
        writer.add(f"images/{k}.png", content.getvalue(), [text])
    writer.close(FetchResult())
    cache = write_cache(folder / "latents", images=images, val=held_out, channels=CHANNELS)
    cache.index["clip"] = cache.index["vae"] = EncoderSource("builtin").to_dict()
    torch.manual_seed(0)
    transformer = DiT(CHANNELS, hidden_size=32, num_layers=2, num_heads=2, cross_attention_dim=32, pooled_projection_dim=16)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = Model(patch_size=2, hidden_size=32, num_layers=2, num_heads=2, conv_channels=0, output="velocity")
    save_model(folder / "dit", transformer, cache, model, PARAMS.shapes.optim, replace(PARAMS.train, **train))
    prompts = [(text, group) for group, texts in groups.items() for text in texts]
    (folder / "images").mkdir()
    for k, image in enumerate(rendered(descriptions(32, len(prompts)), 32)):
        image.save(folder / "images" / f"{k}.png")
    rows = [{"file": f"{k}.png", "text": text, "seed": k, "group": group} for k, (text, group) in enumerate(prompts)]
    (folder / "images" / "prompts.json").write_text(json.dumps(rows))
    return folder


def evaluate(folder: Path, **changes) -> Evaluation:
    return evaluate_samples(
        samples=folder / "images",
        model=folder / "dit",
        latents=folder / "latents",
        raw=folder / "raw",
        settings=replace(SETTINGS, **changes),
        runtime=PARAMS.runtime,
        worst=folder / "worst.png",
        nearest=folder / "nearest.png",
    )


@functools.cache
def prompted(seed: int, count: int) -> list[str]:
    return captions(descriptions(seed, count))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Evaluation, dict[str, list[str]]]:
    groups = {"val": prompted(33, 12), "unseen": prompted(34, 6), "diversity": sorted(prompted(35, 3) * 2), "own": ["a dog"] * 2}
    folder = make_run(tmp_path_factory.mktemp("run"), 60, 14, groups)
    return folder, evaluate(folder), groups


def test_evaluate_every_metric_has_its_interval(small):
    metrics = small[1].metrics
    names = {name for name in metrics if not name.endswith(("_low", "_high", "_prompts", "_distance"))}
    assert names == {
        *("prompt_accuracy", "prompt_accuracy_unseen", "clip_score", "diversity_clip", "val_loss"),
        *(f"prompt_accuracy_{attribute}" for attribute in ("colour", "shape", "size", "relation", "count")),
        *(f"{name}_clip_n12" for name in ("frechet_distance", "kid", "precision", "recall")),
        *("memorised", "nearer_than_held_out", "held_out_repeats", "samples_same", "held_out_same"),
    }
    for name in names:
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"], name
        assert metrics[f"{name}_low"] < metrics[f"{name}_high"], name
    assert [metrics[f"{name}_prompts"] for name in ("prompt_accuracy", "prompt_accuracy_unseen", "memorised")] == [12, 6, 12]
    assert np.isfinite(list(metrics.values())).all()


def test_evaluate_ignores_the_global_seeds(small):
    folder, first, _ = small
    figures = [(folder / name).read_bytes() for name in ("worst.png", "nearest.png")]
    torch.manual_seed(123)
    np.random.seed(123)
    assert evaluate(folder) == first
    assert [(folder / name).read_bytes() for name in ("worst.png", "nearest.png")] == figures


def test_accuracy_by_number_adds_up(small):
    metrics, rows = small[1].metrics, small[1].by_number
    for group, name in (("val", "prompt_accuracy"), ("unseen", "prompt_accuracy_unseen")):
        own = [row for row in rows if row["group"] == group]
        assert [row["things"] for row in own] == sorted({len(parse(text).objects) for text in small[2][group]})
        assert sum(row["count"] for row in own) == metrics[f"{name}_prompts"]
        right = sum(row["accuracy"] * row["count"] for row in own)
        assert right == pytest.approx(metrics[name] * metrics[f"{name}_prompts"], abs=0.01)


def test_log_evaluation_leaves_the_training_its_val_loss(tmp_path, monkeypatch):
    """It differs from that of the evaluation, which the child run has with its ends."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "curves.csv").write_text("step,train_loss,val_loss\n1,0.5,0.4\n")
    (tmp_path / "samples" / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "images" / "0.png")
    (tmp_path / "samples" / "images" / "prompts.json").write_text('[{"file": "0.png", "text": "a", "seed": 0}]')
    child, parent = MagicMock(), MagicMock()
    parent.start_child.return_value = child
    monkeypatch.setattr("stages.evaluate.find_run", lambda params, latents_digest: parent)
    results = {f"{name}{end}": 0.3 for name in ("val_loss", "clip_score") for end in ("", "_low", "_high")}
    log_evaluation(PARAMS, results, [])
    child.log_metrics.assert_called_once_with(results)
    assert set(parent.log_metrics.call_args.args[0]) == {"clip_score", "clip_score_low", "clip_score_high"}


def test_evaluate_photographs_have_all_but_prompt_accuracy(tmp_path):
    texts = [f"photograph {k}" for k in range(5)]
    evaluation = evaluate(make_run(tmp_path, 20, 5, {"val": texts}, about_shapes=False, objective="ddpm"))
    assert not [name for name in evaluation.metrics if name.startswith("prompt_accuracy")] and evaluation.by_attribute == []
    assert evaluation.by_number == []
    assert {"clip_score", "frechet_distance_clip_n5", "kid_clip_n5", "memorised", "val_loss"} <= set(evaluation.metrics)
    assert [row["t"] for row in evaluation.by_timestep] == list(TIMESTEPS)


def test_evaluate_with_features_of_another_model(tmp_path):
    (tmp_path / "dinov2").mkdir()
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    BitImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False).save_pretrained(tmp_path / "dinov2")
    run = make_run(tmp_path / "run", 20, 8, {"val": prompted(33, 9)})
    metrics = evaluate(run, features=str(tmp_path / "dinov2")).metrics
    for features in ("clip", "dinov2"):
        assert {f"frechet_distance_{features}_n8", f"kid_{features}_n8", f"recall_{features}_n8_low"} <= set(metrics)
    assert metrics["frechet_distance_clip_n8"] != metrics["frechet_distance_dinov2_n8"] > 0


@pytest.mark.parametrize(("images", "held_out", "count"), [(4, 2, 2), (3, 1, 1)])
def test_evaluate_tiny_sets(tmp_path, images, held_out, count):
    folder = make_run(tmp_path, images, held_out, {"val": prompted(33, count)})
    metrics = evaluate(folder).metrics
    assert {"clip_score", "prompt_accuracy", "val_loss"} <= set(metrics) and not [name for name in metrics if "_clip_n" in name]
    assert np.isfinite(list(metrics.values())).all()
    assert (folder / "nearest.png").exists() and (folder / "worst.png").exists()


def test_evaluate_without_samples(tmp_path):
    with pytest.raises(UserError, match="no samples to evaluate; `dvc repro` generates them first"):
        evaluate(tmp_path)


def test_measure_losses_by_timestep(small):
    """The error of a network of zeros is noise - image at every timestep, and the noise is the same at all."""
    folder = small[0]
    model = DiT.from_pretrained(folder / "dit", subfolder="transformer").eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    cache = LatentCache(folder / "latents")
    at = [validation_losses(model, cache, make_objective("flow", "flow_prediction"), 100, timestep=t) for t in (0.05, 0.95)]
    assert np.array_equal(*at) and at[0].mean() == pytest.approx(1 + 0.5**2, rel=0.1)  # the cache's latents are 0.5 wide
    _, rows = measure_losses(folder / "dit", cache, SETTINGS, "cpu")
    assert len({row["val_loss"] for row in rows}) == 10 and all(row["low"] < row["val_loss"] < row["high"] for row in rows)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (1, 5), (490, 500), (500, 500)])
def test_wilson_agrees_with_scipy(right, count):
    expected = binomtest(right, count).proportion_ci(0.9, method="wilson")
    assert wilson(right / count, count, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_paired_difference_agrees_with_newcombe():
    """Of 50 cases 20 have both, 12 the first, 2 the second and 16 neither: 0.0562 to 0.3292."""
    first = np.array([True] * 32 + [False] * 18)
    second = np.array([True] * 20 + [False] * 12 + [True] * 2 + [False] * 16)
    assert paired_difference(first, second, 0.95) == pytest.approx((0.0562, 0.3292), abs=5e-5)


def test_half_samples_agrees_with_the_t_interval_and_its_coverage():
    rng, covered, settings = np.random.default_rng(0), 0, replace(SETTINGS, resamples=100)
    for _ in range(100):
        values = rng.normal(3, 2, 41)
        low, high = half_samples(values.mean(), lambda rows, values=values: values[rows].mean(), 41, settings)
        assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 41**0.5, rel=0.3)
        covered += low < 3 < high
    assert 89 <= covered <= 100
