"""How many processes a stage takes where nobody says so."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

import stages
from dit.cli import main
from dit.commands._threads import OWN, sleep_while_waiting
from dit.config import load_config
from helpers import REPO
from stages.processes import choose_process_count, cores

PARAMS = load_config(REPO / "params.yaml")


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Four cores with two threads each, and no GPU; nobody has set the number of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (16, 1), (31, 1), (32, 2), (63, 3), (64, 4), (96, 4)])
def test_processes_are_one_for_each_core_that_has_enough_images(batch_size, count):
    assert choose_process_count(batch_size) == count


def test_processes_are_no_more_than_the_cores_that_are_allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    assert choose_process_count(96) == cores() == 2


def test_cores_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    assert cores() == 1


def test_processes_are_one_with_a_gpu_and_with_threads_of_ones_own(monkeypatch):
    with monkeypatch.context() as one:
        one.setattr(torch.accelerator, "is_available", lambda: True)
        assert choose_process_count(96) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_process_count(96) == 1


@pytest.mark.parametrize(("asked", "expected"), [("auto", {"encode": 1, "train": 4}), (3, {"encode": 3, "train": 3})])
def test_stages_run_in_as_many_processes_as_are_asked_for(asked, expected):
    params = replace(PARAMS, runtime=replace(PARAMS.runtime, num_processes=asked))
    assert {name: stages._process_count(name, params) for name in expected} == expected


@pytest.mark.parametrize(("asked", "warned"), [(1, True), (2, False)])
def test_one_process_that_should_divide_its_model_is_told_so(monkeypatch, tmp_path, capsys, asked, warned):
    params = replace(PARAMS, runtime=replace(PARAMS.runtime, num_processes=asked, sharding="full"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "load_config", lambda: params)
    monkeypatch.setattr(stages, "unlink_outs", lambda name: None)
    monkeypatch.setattr("stages.processes.run_processes", lambda command, count: None)
    stages.run_stage("train", lambda params: None, [], parallel=True)
    assert ("runtime.sharding: full divides nothing" in capsys.readouterr().out) == warned


@pytest.fixture
def waiting(monkeypatch):
    """Nobody has said how threads wait; what is set here ends with the test."""
    for name in OWN:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "policy"), [("encode", ["passive"]), ("sample", ["passive"]), ("evaluate", ["passive"]), ("train", [])]
)
def test_threads_of_stages_with_large_operations_sleep(waiting, name, policy):
    """And that is decided before torch is loaded."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            sys.exit(print('torch', os.environ.get('OMP_WAIT_POLICY', '')))\n"
        f"sys.meta_path.insert(0, Finder())\nimport stages.{name}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch", *policy]


@pytest.mark.parametrize(("own", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "9")])
def test_threads_wait_as_the_user_says(monkeypatch, waiting, own, value):
    monkeypatch.setenv(own, value)
    sleep_while_waiting()
    assert {name: os.environ[name] for name in OWN if name in os.environ} == {own: value}


@pytest.mark.parametrize(("command", "policy"), [(["where"], "passive"), (["benchmark"], None)])
def test_threads_of_commands_sleep_unless_they_measure(waiting, capsys, command, policy):
    main(command)
    assert os.environ.get("OMP_WAIT_POLICY") == policy
