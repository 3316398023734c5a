"""Train once undisturbed, then again with kills at random moments; print what came of it as JSON.

    python tests/helpers/killer.py SIGNAL KILLS         in the folder of a project with a latent cache

Libraries are loaded once, and every attempt is a fork, so that the kills fall into the training and not into imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd

import stages.train as stage
from dit.utils.files import sha256_file
from stages import run_stage

WEIGHTS = Path("models/dit/transformer/diffusion_pytorch_model.safetensors")
LOG = Path("attempts.txt")


def start() -> int:
    """The train stage in a process group of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    output = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train"]
    code = 1
    try:
        run_stage("train", stage.main, metrics=[stage.METRICS, stage.CURVES, stage.RUN], parallel=True)
        code = 0
    finally:
        os._exit(code)


def result() -> list[str]:
    """What no kill may change: the weights, and the curves but for what a clock measures."""
    curves = pd.read_csv(stage.CURVES).drop(columns=["images_per_second", "mfu"])
    return [sha256_file(WEIGHTS), curves.to_csv()]


def finish() -> list[str]:
    _, status = os.waitpid(start(), 0)
    if status:
        sys.exit(LOG.read_text())
    return result()


def main() -> None:
    number, kills = signal.Signals[sys.argv[1]], int(sys.argv[2])
    finish()  # what is compiled is kept, so that later attempts start faster
    started = time.perf_counter()
    expected = finish()
    longest = seconds = time.perf_counter() - started
    rng, state = random.Random(0), Path(".state/train")
    killed = with_work = completed = 0
    while killed < kills:
        pid = start()
        time.sleep(rng.uniform(0, 1) * longest)
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            if number == signal.SIGKILL:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
            killed += 1
            had_work = any(state.rglob("step-*.json"))
            with_work += had_work
            longest *= 1 if had_work else 1.1  # something else runs here by now, and all takes longer
        elif status:
            sys.exit(LOG.read_text())
        if status == 0:  # it resumed so often that it came to its end: from the start again
            completed += 1
            longest *= 0.9
            assert result() == expected
    found = finish()
    left = [str(path) for path in state.rglob("step-*")]
    summary = {"same": found == expected, "killed": killed, "with_work": with_work, "completed": completed, "left": left}
    print(json.dumps(summary | {"seconds": round(seconds, 1), "sha256": found[0]}))


if __name__ == "__main__":
    main()
