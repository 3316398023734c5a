"""What is decided by the machine's processor, and what a training asks of the host's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dit.utils.hardware import has_fast_bf16, matmul_peak
from helpers import REPO

FREED = """
import ctypes, sys
sys.path.insert(0, {repo!r})
try:
    ctypes.CDLL("libc.so.6").mallopt
except OSError:
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


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"neon": True, "bf16": True}, True), ({"avx2": True}, False)],
)
def test_has_fast_bf16_follows_the_instructions(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_fast_bf16(torch.device("cpu")) == fast


@pytest.mark.slow
def test_keep_freed_memory():
    given_back = {}
    for keep in (False, True):
        code = FREED.format(repo=str(REPO), keep=keep)
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        if printed == "no glibc":
            pytest.skip("only glibc can be told to keep what is freed")
        given_back[keep] = int(printed)
    assert given_back[False] > 200e6 and given_back[True] < 50e6


def test_matmul_peak_is_measured_where_one_product_takes_all_the_time():
    """A busy machine, or bf16 that is emulated: the training divides by it."""
    assert matmul_peak(torch.device("cpu"), torch.float32, size=64, seconds=0.0) > 0
