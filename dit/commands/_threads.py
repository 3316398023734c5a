"""How the threads of a CPU wait for each other. OpenMP reads it when torch is loaded, so nothing here imports torch."""

from __future__ import annotations

import os

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables of a user who has decided


def sleep_while_waiting() -> None:
    """Let threads sleep at the end of an operation until the last of them is there, unless the environment says how they wait.

    By default they turn in a loop, in vain while another program has one of their cores: beside a busy process the sample stage
    took seven times as long. Sleeping costs nothing (encode) to a sixth (evaluate) of the speed of a quiet machine; what it costs
    the commands was not measured (docs/performance.md).
    """
    if not any(name in os.environ for name in OWN):
        os.environ["OMP_WAIT_POLICY"] = "passive"
