"""A training that was stopped or killed resumes to the same bits, and never from another one's state."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch

from dit.errors import UserError
from dit.training import setup
from dit.training.checkpoint import Checkpoints, check_shapes, open_checkpoint, run_fingerprint
from dit.training.stop import Stopped
from helpers.training import MODEL, MemoryLogger, run, same


def stop_at(step: int, number: int = signal.SIGTERM):
    """A logger that sends this process a signal when `step` is logged."""
    return MemoryLogger(lambda line: os.kill(os.getpid(), number) if line.startswith(f"step {step}/9 loss") else None)


def curves(logger: MemoryLogger) -> dict:
    """What does not depend on the clock."""
    timed = ("images_per_second", "mfu")
    return {step: {k: v for k, v in values.items() if k not in timed} for step, values in logger.curves.items()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [2, 6])
def test_signal_saves_and_training_resumes_bit_identically(cache, tmp_path, number, step):
    before = signal.getsignal(number)
    whole, logger = run(cache, tmp_path / "whole", logger=(undisturbed := MemoryLogger()))[0], MemoryLogger()
    says = f"stopped by {signal.Signals(number).name} after step {step} of 9; the same command resumes there"
    with pytest.raises(Stopped, match=says):
        run(cache, tmp_path / "halves", logger=stop_at(step, number))
    assert signal.getsignal(number) == before
    checkpoint = Checkpoints(tmp_path / "halves", 2).newest(pytest.fail)
    assert checkpoint.step == step
    torch.manual_seed(99)  # randomness that is in no counter would show
    assert same(run(cache, tmp_path / "halves", logger=logger, resume=checkpoint)[0], whole)
    assert curves(logger) == curves(undisturbed)


@pytest.mark.parametrize(
    "train",
    [
        {"gradient_accumulation_steps": 3, "batch_size": 2},
        {"objective": "ddpm", "early_stopping_patience": 5},
        {"gradient_checkpointing": True, "lr_scheduler": "linear"},
    ],
)
def test_resume_is_bit_identical_with_other_settings(cache, tmp_path, train):
    whole = run(cache, tmp_path / "whole", train)[0]
    with pytest.raises(Stopped):
        run(cache, tmp_path / "halves", train, logger=stop_at(6))
    checkpoint = Checkpoints(tmp_path / "halves", 2).newest(pytest.fail)
    assert same(run(cache, tmp_path / "halves", train, resume=checkpoint)[0], whole)


def test_resume_keeps_precision(cache, tmp_path, monkeypatch):
    """Another machine may decide otherwise."""
    monkeypatch.setattr(setup, "has_fast_bf16", lambda device: True)
    whole = run(cache, tmp_path / "whole", {"mixed_precision": "bf16"})[0]
    with pytest.raises(Stopped):
        run(cache, tmp_path / "halves", {"mixed_precision": "bf16"}, logger=stop_at(6))
    monkeypatch.setattr(setup, "has_fast_bf16", lambda device: False)
    checkpoint = Checkpoints(tmp_path / "halves", 2).newest(pytest.fail)
    assert same(run(cache, tmp_path / "halves", {"mixed_precision": "bf16"}, resume=checkpoint)[0], whole)
    assert not same(run(cache, tmp_path / "fp32", {"mixed_precision": "bf16"})[0], whole)


def test_checkpoints_keep_the_last_and_nothing_incomplete(cache, tmp_path):
    run(cache, tmp_path, runtime={"checkpoint_every": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:08d}.{kind}" for step in (6, 8) for kind in ("json", "safetensors")
    ]


def test_newest_skips_damaged_checkpoint(cache, tmp_path):
    run(cache, tmp_path, runtime={"checkpoint_every": 2})
    newest = tmp_path / "step-00000008.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    lines: list[str] = []
    assert Checkpoints(tmp_path, 2).newest(lines.append).step == 6
    assert "step-00000008.safetensors: damaged" in lines[0] and "taking the one before it" in lines[0]
    newest.unlink()
    assert Checkpoints(tmp_path, 2).newest(lines.append).step == 6 and "cannot be read" in lines[1]
    (tmp_path / "step-00000006.json").write_text("{")
    assert Checkpoints(tmp_path, 2).newest(lines.append) is None and "not the record" in lines[-1]


def test_checkpoint_without_record_is_none(tmp_path):
    (tmp_path / "step-00000002.safetensors").write_bytes(b"half")
    assert Checkpoints(tmp_path, 2).newest(pytest.fail) is None
    with pytest.raises(UserError, match=r"step-00000002\.json: cannot be read"):
        open_checkpoint(tmp_path / "step-00000002.safetensors")


def test_checkpoint_write_error_reaches_training(tmp_path):
    (tmp_path / "folder").write_text("a file is in the way")
    checkpoints = Checkpoints(tmp_path / "folder", 2)
    checkpoints.save(1, {"a": torch.zeros(2)}, {})
    with pytest.raises(OSError):
        checkpoints.wait()


def test_checkpoint_is_a_copy(tmp_path):
    checkpoints, tensor = Checkpoints(tmp_path, 2), torch.zeros(1000, 1000)
    checkpoints.save(1, {"a": tensor}, {"b": 1})
    tensor += 1  # training continues while it is written
    checkpoints.wait()
    found = open_checkpoint(tmp_path / "step-00000001.json")
    assert not found.tensors()["a"].any() and found.record == {"b": 1} and found.step == 1


def test_resume_beyond_the_end_is_refused(cache, tmp_path):
    run(cache, tmp_path, runtime={"checkpoint_every": 8})
    checkpoint = open_checkpoint(tmp_path / "step-00000008.json")
    with pytest.raises(UserError, match="of step 8, but the settings ask for 6 steps only"):
        run(cache, tmp_path, resume=checkpoint, num_epochs=2)


def test_check_shapes_names_first_parameter_that_differs(cache, tmp_path):
    run(cache, tmp_path, runtime={"checkpoint_every": 8})
    checkpoint, narrow = open_checkpoint(tmp_path / "step-00000008.json"), replace(MODEL, hidden_size=32)
    with pytest.raises(
        UserError, match=r"another transformer .* weights\.x_embedder\.weight is \[64, 4, 2, 2\] in it, not \[32, 4, 2, 2\]"
    ):
        check_shapes(checkpoint, checkpoint.tensors(), setup.build_model(cache, narrow, 0))


def test_run_fingerprint_depends_on_settings_and_data():
    keys = {run_fingerprint("data", {"seed": 0}), run_fingerprint("data", {"seed": 1}), run_fingerprint("other", {"seed": 0})}
    assert len(keys) == 3 and run_fingerprint("data", {"seed": 0}) in keys
