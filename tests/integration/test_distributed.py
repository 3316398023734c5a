"""Two gloo processes train as one does, and each prints and writes what it should."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dit.training.data import rank_slices
from dit.training.export import save_model
from helpers import REPO
from helpers.cache import write_cache
from helpers.training import MODEL, OPTIM, TRAIN, run

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{repo!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from accelerate import PartialState
from safetensors.torch import save_file
from dit.latents.cache import LatentCache
from dit.training.checkpoint import Checkpoints
from dit.training.init_model import load_init
from dit.training.logging import NullLogger
from helpers.training import MemoryLogger, run
state = PartialState(cpu=True)
logger = MemoryLogger() if state.is_main_process else NullLogger()
folder = Path({out!r}) / "checkpoints"
resume = Checkpoints(folder, 2).newest(print)
state.wait_for_everyone()
if {resumes!r}:
    assert resume
init = load_init(Path({base!r}), "base") if {base!r} else None
optim = {optim!r} | {{"num_epochs": {epochs}}}
model, summary = run(LatentCache({cache!r}), folder, {train!r}, {runtime!r}, logger, resume, init, **optim)
save_file(model.state_dict(), Path({out!r}) / f"rank{{state.process_index}}.safetensors")
losses = [values["train_loss"] for values in logger.curves.values() if "train_loss" in values]
(Path({out!r}) / f"curve{{state.process_index}}.txt").write_text(" ".join(map(str, losses)))
"""


def train_with(
    processes: int, cache, out, train: dict, epochs: int, resumes: bool = False, runtime: dict | None = None, **optim
) -> dict[str, torch.Tensor]:
    """Weights of the first process; a second call with the same `out` resumes from the last checkpoint there."""
    out.mkdir(exist_ok=resumes)
    code = SCRIPT.format(
        repo=str(REPO),
        tests=str(REPO / "tests"),
        cache=str(cache.folder),
        out=str(out),
        train=train,
        base=str(cache.folder.parent / "base") if "init_from" in train else "",
        epochs=epochs,
        resumes=resumes,
        runtime=runtime,
        optim=optim,
    )
    launch = f"from stages.processes import run_processes; run_processes([{sys.executable!r}, '-c', {code!r}], {processes})"
    command = [sys.executable, "-c", code if processes == 1 else launch]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_file(out / "rank0.safetensors")


@pytest.mark.parametrize(
    "train",
    [
        {"batch_size": 5, "caption_dropout": 0.3},  # 3 and 2 images
        pytest.param({"batch_size": 3, "gradient_accumulation_steps": 2, "objective": "ddpm"}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 5, "method": "lora", "init_from": "base"}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(tmp_path, train):
    cache = write_cache(tmp_path / "cache")
    if "init_from" in train:
        save_model(tmp_path / "base", run(cache, tmp_path / "state")[0], cache, MODEL, OPTIM, TRAIN)
    epochs = -(-50 * train["batch_size"] * train.get("gradient_accumulation_steps", 1) // len(cache.train))  # 50 steps
    one = train_with(1, cache, tmp_path / "one", train, epochs)
    two = train_with(2, cache, tmp_path / "two", train, epochs)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    other = load_file(tmp_path / "two" / "rank1.safetensors")
    assert all(torch.equal(two[name], other[name]) for name in two)
    curves = [np.loadtxt(tmp_path / folder / "curve0.txt") for folder in ("one", "two")]
    assert len(curves[0]) > 20 and np.allclose(*curves, atol=1e-5)
    assert len(list((tmp_path / "two" / "checkpoints").glob("*.safetensors"))) == 2
    again = train_with(2, cache, tmp_path / "two", train, epochs, resumes=True)
    assert all(torch.equal(two[name], again[name]) for name in two)


@pytest.mark.parametrize(
    ("train", "optim"),
    [
        ({"batch_size": 5, "caption_dropout": 0.3, "early_stopping_patience": 50}, {}),
        pytest.param({"batch_size": 4, "gradient_checkpointing": True}, {}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 4, "gradient_checkpointing": True}, {"compile_model": True}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 3, "gradient_accumulation_steps": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 5, "method": "lora", "init_from": "base"}, {}, marks=pytest.mark.slow),
    ],
)
def test_weights_divided_over_two_processes_train_as_one(tmp_path, train, optim):
    cache = write_cache(tmp_path / "cache")
    if "init_from" in train:
        save_model(tmp_path / "base", run(cache, tmp_path / "state")[0], cache, MODEL, OPTIM, TRAIN)
    epochs = -(-50 * train["batch_size"] * train.get("gradient_accumulation_steps", 1) // len(cache.train))  # 50 steps
    divided = {"sharding": "full"}
    one = train_with(1, cache, tmp_path / "one", train, epochs, **optim)
    two = train_with(2, cache, tmp_path / "two", train, epochs, runtime=divided, **optim)
    # Of one process whole blocks are compiled, of several their parts, which are rounded otherwise.
    tolerance = 1e-4 if optim else 1e-5
    assert max((one[name] - two[name]).abs().max().item() for name in one) < tolerance
    assert all(torch.equal(two[name], value) for name, value in load_file(tmp_path / "two" / "rank1.safetensors").items())
    checkpoints = [{p.name: load_file(p) for p in (tmp_path / of / "checkpoints").glob("*.safetensors")} for of in ("one", "two")]
    assert len(checkpoints[0]) == 2 and checkpoints[0].keys() == checkpoints[1].keys()
    for name, tensors in checkpoints[0].items():  # whole tensors in one file, as without sharding
        assert {key: value.shape for key, value in tensors.items()} == {k: v.shape for k, v in checkpoints[1][name].items()}
    again = train_with(2, cache, tmp_path / "two", train, epochs, resumes=True, runtime=divided, **optim)
    assert all(torch.equal(two[name], again[name]) for name in two)


@pytest.mark.parametrize(
    ("key", "step", "says"),
    [("'same'", "5", None), ("str(rank)", "5", "`dvc pull`"), ("'same'", "5 * rank", "from steps 0, 5; put .state on a disk")],
)
def test_check_ranks_agree(key, step, says):
    code = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
from accelerate import PartialState
from dit.errors import UserError
from dit.training.checkpoint import Checkpoint, check_ranks_agree
state = PartialState(cpu=True)
rank = int(os.environ["RANK"])
try:
    check_ranks_agree({key}, Checkpoint({step}, None, {{}}))
    print("alike")
except UserError as error:
    sys.exit(str(error))
finally:
    state.destroy_process_group()
"""
    launch = f"from stages.processes import run_processes; run_processes([{sys.executable!r}, '-c', {code!r}], 2)"
    done = subprocess.run([sys.executable, "-c", launch], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (says is None), done.stderr
    assert (says or "alike") in done.stdout + done.stderr


def test_rank_slices_cover_the_global_batch():
    shares = [rank_slices(7, 2, 3, rank) for rank in range(3)]
    rows = [row for slices in shares for part in slices for row in range(part.start, part.stop)]
    assert sorted(rows) == list(range(14)) and {len(slices) for slices in shares} == {2}


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {repo!r})
(Path({out!r}) / os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep({before})
from stages.processes import end_with_launcher
end_with_launcher()
(Path({out!r}) / ("watches" + os.environ["RANK"])).touch()
time.sleep(120)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("watching", [True, False])
def test_processes_end_with_their_launcher(tmp_path, watching):
    """Killed, it cannot end them; it may be killed while they are still importing."""
    code = WORKER.format(repo=str(REPO), out=str(tmp_path), before=0 if watching else 5)
    launch = f"from stages.processes import run_processes; run_processes([{sys.executable!r}, '-c', {code!r}], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", launch], cwd=REPO)
    try:
        names = [f"watches{rank}" if watching else f"{rank}" for rank in "01"]
        wait_until(lambda: all((tmp_path / name).exists() for name in names), 60)
        time.sleep(0.1)  # until both numbers are written
        pids = [int((tmp_path / rank).read_text()) for rank in "01"]
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 60)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
