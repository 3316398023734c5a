"""A training that begins with another model takes its weights, and names what does not fit; a kept state goes on exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.training.checkpoint import Checkpoint, Checkpoints
from dit.training.export import save_model
from dit.training.init_model import InitModel, load_init
from dit.training.init_weights import weights_digest
from dit.training.kept_state import explain_difference, find_kept
from dit.training.setup import build_trainable
from dit.training.trainer import Trainer
from helpers.cache import write_cache
from helpers.small_models import rename_as_version_0_1
from helpers.training import MODEL, OPTIM, TRAIN, MemoryLogger, run, same, settings

FULL = {"method": "full", "init_from": "base"}
EXACT = {"lr_scheduler": "constant", "warmup_steps": 0}


def save_base(cache: LatentCache, folder: Path, **train) -> InitModel:
    model, _ = run(cache, folder / "state", train)
    save_model(folder / "base", model, cache, MODEL, OPTIM, replace(TRAIN, **train))
    return load_init(folder / "base", "base")


@pytest.fixture
def init(cache, tmp_path) -> InitModel:
    return save_base(cache, tmp_path)


def trainer(cache: LatentCache, folder: Path, init: InitModel, train: dict, logger: MemoryLogger | None = None) -> Trainer:
    """A training that has not made a step."""
    return Trainer(cache, MODEL, *settings(FULL | train), logger or MemoryLogger(), None, Checkpoints(folder, 2), None, init)


def test_init_gives_weights_and_average_their_start(cache, tmp_path, init):
    begun = trainer(cache, tmp_path / "next", init, {"seed": 5})
    assert same(begun.transformer, init.transformer)
    assert all(torch.equal(a, b) for a, b in zip(begun.state.ema.shadow_params, init.transformer.parameters(), strict=True))
    assert not same(run(cache, tmp_path / "more", FULL, init=init)[0], init.transformer)


def test_init_keeps_its_text_statistics(tmp_path, init):
    other = write_cache(tmp_path / "other")
    other.text_statistics = {name: value + 1 for name, value in other.text_statistics.items()}
    begun = build_trainable(other, MODEL, TRAIN, init)
    assert torch.equal(begun.tokens_mean, init.transformer.tokens_mean)
    assert not torch.equal(begun.tokens_mean, other.text_statistics["tokens_mean"])


def test_init_takes_latents_of_another_size(tmp_path, init):
    larger = write_cache(tmp_path / "larger", size=16)
    logger = MemoryLogger()
    _, summary = run(larger, tmp_path / "next", FULL, init=init, logger=logger)
    assert summary["steps"] == 9 and summary["val_loss"] > 0
    assert "begins with the EMA weights and the text statistics of base; the optimiser begins anew" in logger.lines


def test_init_that_does_not_fit_is_one_line(tmp_path, init):
    other = write_cache(tmp_path / "other", channels=16, text_sizes=(48, 16))
    wanted = replace(MODEL, patch_size=4, num_layers=3)
    with pytest.raises(UserError) as error:
        build_trainable(other, wanted, TRAIN, init)
    line = str(error.value)
    assert line.startswith("train.init_from: base does not fit the settings and the latents: ") and "\n" not in line
    misfits = ("in_channels 4 (wanted: 16)", "patch_size 2 (wanted: 4)", "num_layers 2 (wanted: 3)", "cross_attention_dim 32")
    assert all(misfit in line for misfit in misfits)
    assert "hidden_size" not in line


def test_init_of_another_objective_or_text_encoder_is_said(tmp_path, init):
    other, logger = write_cache(tmp_path / "other"), MemoryLogger()
    other.index["clip"] = {"name": "other", "revision": None, "resolved": "sha256:1"}
    trainer(other, tmp_path / "next", init, {"objective": "ddpm"}, logger)
    assert any("base predicts flow_prediction, and this training v_prediction" in line for line in logger.lines)
    assert any("with the text encoder builtin (None), and these latents are of other (sha256:1)" in line for line in logger.lines)


def test_init_loads_a_model_of_version_0_1(tmp_path, init):
    rename_as_version_0_1(tmp_path / "base" / "transformer")
    assert same(load_init(tmp_path / "base", "base").transformer, init.transformer)


def test_init_that_is_no_model_is_one_line(tmp_path, init):
    with pytest.raises(UserError, match=r"train\.init_from: there is not there, there is no .*; a folder such as models/base"):
        weights_digest(tmp_path / "there", "there")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"train\.init_from: empty has no transformer/\*\.safetensors"):
        load_init(tmp_path / "empty", "empty")
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"train\.init_from: base: not a trained model, or a damaged one") as error:
        load_init(tmp_path / "base", "base")
    assert "\n" not in str(error.value)


def test_init_digest_is_of_the_weights(cache, tmp_path, init):
    before = weights_digest(tmp_path / "base", "base")
    (tmp_path / "base" / "README.md").write_text("reworded")
    assert weights_digest(tmp_path / "base", "base") == before
    save_base(cache, tmp_path, seed=1)
    assert weights_digest(tmp_path / "base", "base") != before


def keep(cache: LatentCache, folder: Path, epochs: int, train: dict) -> Path:
    """Train as with `runtime.keep_state`; the folder of the kept state."""
    run(cache, folder / "state", train, num_epochs=epochs, keep=folder / "kept")
    return folder / "kept"


def test_kept_state_goes_on_to_the_same_bits(cache, tmp_path):
    at_once, _ = run(cache, tmp_path / "at_once", EXACT, num_epochs=5)
    kept = find_kept(keep(cache, tmp_path, 2, EXACT), replace(OPTIM, num_epochs=5), pytest.fail)
    assert kept.step == 6 and explain_difference(kept, replace(OPTIM, num_epochs=5), replace(TRAIN, **EXACT)) == ""
    further, summary = run(cache, tmp_path / "more", EXACT, resume=kept, num_epochs=5)
    assert same(further, at_once) and summary["steps"] == 15


def test_kept_state_after_a_cosine_goes_on_to_other_weights(cache, tmp_path):
    at_once, _ = run(cache, tmp_path / "at_once", num_epochs=5)
    kept = find_kept(keep(cache, tmp_path, 2, {}), replace(OPTIM, num_epochs=5), pytest.fail)
    says = "other weights than all epochs at once, since its learning rates were others (train.lr_scheduler cosine)"
    assert explain_difference(kept, replace(OPTIM, num_epochs=5), TRAIN) == says
    assert not same(run(cache, tmp_path / "more", resume=kept, num_epochs=5)[0], at_once)


@pytest.mark.parametrize(("warmup", "differs"), [(0, False), (2, False), (3, True), (100, True)])
def test_kept_state_knows_whether_the_warm_up_was_cut_short(warmup, differs):
    """Of 20 steps a warm-up may be 2, of 50 it may be 5."""
    kept = Checkpoint(20, Path("kept"), {"model": {"facts": {"num_epochs": 4, "images": 30, "batch_size": 6}}})
    train = replace(TRAIN, lr_scheduler="constant", warmup_steps=warmup)
    says = explain_difference(kept, replace(OPTIM, num_epochs=10), train)
    assert bool(says) == differs and ("its warm-up was shorter" in says) == differs


def test_kept_state_is_of_fewer_epochs_and_the_longest(cache, tmp_path):
    folder = keep(cache, tmp_path, 2, EXACT)
    assert find_kept(folder, replace(OPTIM, num_epochs=2), pytest.fail) is None
    assert find_kept(tmp_path / "nothing", OPTIM, pytest.fail) is None
    for epochs in (3, 1):  # a shorter training takes nothing away
        keep(cache, tmp_path, epochs, EXACT)
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000009.json", "step-00000009.safetensors"]


def test_kept_state_of_an_early_stop_is_none(cache, tmp_path):
    train = EXACT | {"early_stopping_patience": 1, "validate_every": 1}
    logger = MemoryLogger()
    _, summary = run(cache, tmp_path / "state", train, logger=logger, keep=tmp_path / "kept", num_epochs=20, learning_rate=1.0)
    assert summary["steps"] < 60
    assert not list((tmp_path / "kept").glob("*")) and "stopped early, so that no state is kept" in "\n".join(logger.lines)


def test_kept_state_gives_another_size_its_moments(cache, tmp_path):
    path = next(keep(cache, tmp_path, 2, EXACT).glob("*.safetensors"))
    init, logger = load_init(path, "kept"), MemoryLogger()
    begun = trainer(write_cache(tmp_path / "larger", size=16), tmp_path / "next", init, {}, logger)
    count = len(begun.trainable)
    assert f"statistics of kept; the optimiser's moments of {count} parameters" in "\n".join(logger.lines)
    weight = begun.transformer.x_embedder.weight
    assert torch.equal(begun.state.optimizer.state[weight]["exp_avg"], init.moments["x_embedder.weight"]["exp_avg"])
    assert init.moments["x_embedder.weight"]["exp_avg"].any() and init.moments["x_embedder.weight"]["step"] == 6
