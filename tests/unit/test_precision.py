"""What is decided by measuring the machine, and what a training asks of the host's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dit.utils import hardware as precision
from helpers import REPO

FREED = """
import ctypes, sys
sys.path.insert(0, {repo!r})
if not hasattr(ctypes.CDLL(None), "mallopt"):
    print("no glibc")
    sys.exit()
import psutil
import torch
from dit.training.setup import keep_freed_memory
if {keep}:
    keep_freed_memory()
block = torch.ones(2**26)  # 256 MB
before = psutil.Process().memory_info().rss
del block
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize(("bf16", "worth_it"), [(0.5, False), (1.1, False), (2.2, True), (5.0, True)])
def test_bf16_is_used_where_it_is_clearly_faster(monkeypatch, bf16, worth_it):
    speeds = {torch.float32: 1.0, torch.bfloat16: bf16}
    monkeypatch.setattr(precision, "matmul_peak", lambda device, dtype, *size, **seconds: speeds[dtype])
    assert precision.has_fast_bf16.__wrapped__(torch.device("cpu")) == worth_it


def test_a_busy_moment_does_not_decide(monkeypatch):
    """Another program has the cores during one of the rounds, whichever it is."""
    for busy in range(2 * precision.ROUNDS):
        calls = iter(range(2 * precision.ROUNDS))

        def peak(device, dtype, *_, calls=calls, busy=busy):
            return (2.2 if dtype == torch.bfloat16 else 1.0) * (0.1 if next(calls) == busy else 1.0)

        monkeypatch.setattr(precision, "matmul_peak", peak)
        assert precision.has_fast_bf16.__wrapped__(torch.device("cpu"))


def test_freed_memory_stays_with_a_training_and_otherwise_goes_back():
    given_back = {}
    for keep in (False, True):
        code = FREED.format(repo=str(REPO), keep=keep)
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        if printed == "no glibc":
            pytest.skip("only glibc can be told to keep what is freed")
        given_back[keep] = int(printed)
    assert given_back[False] > 200e6 and given_back[True] < 50e6
