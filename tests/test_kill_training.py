"""A training that is killed or stopped at random moments, again and again, ends in the weights of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from clones import Clone, environment
from safetensors.torch import load_file

from dit.files import file_hash

pytestmark = pytest.mark.slow
KILLS = 20
WEIGHTS = Path("models/dit/transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """A clone with a latent cache, whose training takes some thousand short steps with a checkpoint every hundred."""
    clone = Clone(tmp_path_factory.mktemp("killed"))
    clone.dvc("repro", "encode")
    change(clone, {"schedule": {"num_epochs": 1000}, "runtime": {"checkpoint_every": 100, "sample_every": 1000}})
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


def finish(clone: Clone, command: tuple[str, ...] = STAGE) -> tuple[str, pd.DataFrame, str]:
    """Let it run to its end: hash of the weights, the curves without what a clock measures, and what it printed."""
    with (clone.root.parent / "output.txt").open("w+") as output:
        code = start(clone, output, command).wait()
        output.seek(0)
        printed = output.read()
    assert code == 0, printed
    curves = pd.read_csv(clone.root / "metrics" / "curves.csv").drop(columns=["images_per_second", "mfu"])
    return file_hash(clone.root / WEIGHTS), curves, printed


@pytest.mark.parametrize(
    ("number", "compiled", "processes"),
    [
        (signal.SIGKILL, False, 1),
        (signal.SIGTERM, False, 1),
        (signal.SIGKILL, True, 1),
        (signal.SIGKILL, False, 2),
    ],
)
def test_twenty_kills_do_not_show_in_the_weights(clone, number, compiled, processes):
    change(clone, {"schedule": {"compile_model": compiled}, "runtime": {"num_processes": processes}})
    if compiled:
        finish(clone)  # what is compiled is kept, so that later starts take seconds
    started = time.perf_counter()
    expected, expected_curves, printed = finish(clone)
    longest = time.perf_counter() - started
    assert "going on" not in printed

    state, chance = clone.root / ".state" / "train", random.Random(0)
    kills = with_work = 0
    while kills < KILLS:
        process = start(clone, subprocess.DEVNULL)
        time.sleep(chance.uniform(0.1, 1) * longest)
        if process.poll() is None:
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.wait() != 0 or number == signal.SIGTERM  # which may come when all is done
            kills += 1
            with_work += any(state.rglob("step-*.json"))
        else:  # it went on so often that it has come to its end: from the start again
            assert process.returncode == 0
            assert file_hash(clone.root / WEIGHTS) == expected
    found, curves, printed = finish(clone)
    print(f"after {with_work} of {KILLS} there was a checkpoint; a whole training takes {longest:.0f} s")
    assert found == expected
    pd.testing.assert_frame_equal(curves, expected_curves)
    assert with_work > KILLS // 4
    assert not any(state.rglob("step-*"))
    runs = clone.parents()
    assert len({run.info.run_id for run in runs}) == len(runs)


def test_an_experiment_in_a_temporary_folder_goes_on_where_it_was_killed(clone):
    change(clone, {"schedule": {"compile_model": False}, "runtime": {"num_processes": 1}})
    clone.run("git", "commit", "-qam", "settings of this test")
    state = clone.root / ".state" / "train"
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
    assert "going on after step" in again.stdout + again.stderr
    assert not any(state.rglob("step-*"))


def test_accelerate_launch_trains_with_two_processes_what_one_trains(clone):
    """Any `accelerate launch` will do: the stage finds that it is one of several, and only the first one writes."""
    change(clone, {"schedule": {"num_epochs": 16, "compile_model": False}, "runtime": {"num_processes": 1}})
    change(clone, {"train": {"mixed_precision": "no"}})
    launch = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    finish(clone)
    one = load_file(clone.root / WEIGHTS)
    _, curves, printed = finish(clone, (sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "stages.train"))
    two = load_file(clone.root / WEIGHTS)
    assert curves["step"].max() == 48 and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    assert printed.count("48 steps of 16") == 1
