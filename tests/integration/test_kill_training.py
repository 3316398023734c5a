"""A training that is killed or stopped at random moments, again and again, ends in the weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from helpers import REPO
from helpers.clones import Clone, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # 2 to 5 minutes each, alone on 2 cores
KILLS = 20
WEIGHTS = Path("models/dit/transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A clone with a latent cache, whose training takes 300 short steps, with a checkpoint every twenty."""
    clone = Clone(tmp_path_factory.mktemp("killed"))
    clone.dvc("repro", "encode")
    change(clone, {"optim": {"num_epochs": 100}, "runtime": {"checkpoint_every": 20, "sample_every": 150}})
    return clone


def change(clone: Clone, blocks: dict[str, dict]) -> None:
    path = clone.root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    for name, settings in blocks.items():
        (values["shapes"] if name in values["shapes"] else values)[name].update(settings)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


STAGE = (sys.executable, "-m", "stages.train")


def start(clone: Clone, output, command: tuple[str, ...] = STAGE) -> subprocess.Popen:
    """The stage as DVC starts it, in a group of its own."""
    return subprocess.Popen(
        command,
        cwd=clone.root,
        env=environment(clone.root) | {"DVC_ROOT": str(clone.root)},
        stdout=output,
        stderr=output,
        start_new_session=True,
    )


def finish(clone: Clone, command: tuple[str, ...] = STAGE) -> tuple[pd.DataFrame, str]:
    """Let it run to its end: the curves without what a clock measures, and what it printed."""
    with (clone.root.parent / "output.txt").open("w+") as output:
        code = start(clone, output, command).wait()
        output.seek(0)
        printed = output.read()
    assert code == 0, printed
    curves = pd.read_csv(clone.root / "metrics" / "curves.csv").drop(columns=["images_per_second", "mfu"])
    return curves, printed


@pytest.mark.parametrize(
    ("name", "compiled", "processes"),
    [("SIGKILL", False, 1), ("SIGTERM", False, 1), ("SIGKILL", True, 1), ("SIGKILL", False, 2)],
)
def test_training_survives_twenty_kills_bit_identically(clone, name, compiled, processes):
    change(clone, {"optim": {"compile_model": compiled}, "runtime": {"num_processes": processes}})
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "helpers" / "killer.py"), name, str(KILLS)],
        cwd=clone.root,
        env=environment(clone.root) | {"DVC_ROOT": str(clone.root), "PYTHONPATH": str(clone.root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, f"compiled {compiled}, {processes} processes: {found}")
    assert found["same"] and found["killed"] == KILLS and not found["left"]
    assert found["with_work"] > KILLS // 4


def test_exp_run_temp_resumes_after_kill(clone):
    change(clone, {"optim": {"compile_model": False}, "runtime": {"num_processes": 1}})
    clone.run("git", "commit", "-qam", "settings of this test")
    state = clone.root / ".state" / "train"
    assert not any(state.rglob("step-*"))
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "-S", "train.seed=7"]
    killed = subprocess.Popen(
        command,
        cwd=clone.root,
        env=environment(clone.root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not any(state.rglob("step-*.json")):
        assert killed.poll() is None, "it ended before there was a checkpoint"
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = clone.run(*command)
    assert "resuming after step" in again.stdout + again.stderr
    assert not any(state.rglob("step-*"))
    (run,) = [run for run in clone.parents() if run.data.params["train.seed"] == "7"]  # the same one, with no point twice
    assert run.info.status == "FINISHED" and "prompt_accuracy" in run.data.metrics
    steps = [point.step for point in clone.store().get_metric_history(run.info.run_id, "train_loss")]
    assert steps == sorted(set(steps)) and steps[-1] == clone.store().get_metric_history(run.info.run_id, "val_loss")[-1].step


def test_accelerate_launch_two_processes_train_as_one(clone):
    """Any `accelerate launch` will do: the stage finds that it is one of several, and only the first one writes."""
    change(clone, {"optim": {"num_epochs": 16, "compile_model": False}, "runtime": {"num_processes": 1}})
    change(clone, {"train": {"mixed_precision": "no"}})
    launch = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    finish(clone)
    one = load_file(clone.root / WEIGHTS)
    curves, printed = finish(clone, (sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "stages.train"))
    two = load_file(clone.root / WEIGHTS)
    assert curves["step"].max() == 48 and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    assert printed.count("48 steps of 16, fp32 on cpu, 2 processes") == 1
