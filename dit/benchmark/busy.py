"""How fast training is beside a busy process, by how the threads of a CPU wait for each other.

Threads meet at the end of each operation. OpenMP reads how they wait when torch is loaded, so each way is measured in processes
of its own: when the machine is quiet, and then beside a loop in Python, which needs a core.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from dit.benchmark.results import markdown_table
from dit.benchmark.training import CurveLogger
from dit.config import load_config
from dit.latents.cache import LatentCache
from dit.training.checkpoint import Checkpoints
from dit.training.logging import NullLogger
from dit.training.trainer import Trainer

LATENTS = Path("data/latents")
HEADER = ("threads", "images/s when quiet", "beside a busy process", "share that is left")
LOG_EVERY, WARM_UP = 5, 3  # steps that are measured at once, and how many of these do not count
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Name: processes that share a batch, and what they find in the environment.
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "one for each core": (1, {}),
    "GOMP_SPINCOUNT=10000": (1, {"GOMP_SPINCOUNT": "10000"}),
    "GOMP_SPINCOUNT=1000": (1, {"GOMP_SPINCOUNT": "1000"}),
    "OMP_WAIT_POLICY=passive": (1, {"OMP_WAIT_POLICY": "passive"}),
    "OMP_NUM_THREADS=1": (1, {"OMP_NUM_THREADS": "1"}),
    "two processes of one thread": (2, {"OMP_NUM_THREADS": "1"}),
}


def benchmark_busy(steps: int) -> list[dict[str, Any]]:
    """Train for `steps` steps in each of the `WAYS`, quiet and busy, with the recipe and the latents of this folder.

    Raises:
        UserError: there are no latents.
    """
    LatentCache(LATENTS)
    rows = []
    for name, way in tqdm(WAYS.items(), desc="benchmark", unit="way", leave=False):
        quiet = train_in_processes(*way, steps)
        with busy_process():
            rows.append({"threads": name, "quiet": quiet, "busy": train_in_processes(*way, steps)})
    return rows


def busy_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `benchmark_busy` as a Markdown table."""
    cells = [(row["threads"], f"{row['quiet']:,.0f}", f"{row['busy']:,.0f}", f"{row['busy'] / row['quiet']:.0%}") for row in rows]
    return markdown_table(HEADER, cells)


@contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train_in_processes(processes: int, environment: dict[str, str], steps: int) -> float:
    """Train for some steps in processes of their own; return images/s."""
    command = ["-m", "dit.benchmark.busy", str(steps)]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
        environment = environment | {"ACCELERATE_USE_CPU": "true"}
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, *command]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the training ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def images_per_second(steps: int) -> float:
    """Train for `steps` steps in this process; return the median of images/s, 0 in all processes but the first."""
    process = PartialState(cpu=not torch.cuda.is_available())  # as the stage does; without it two processes were a third slower
    params, logger = load_config(), CurveLogger() if process.is_main_process else NullLogger()
    train = replace(params.train, method="scratch", init_from=None, validate_every=10**9)
    optim = replace(params.active.optim, num_epochs=1)
    runtime = replace(params.runtime, log_every=LOG_EVERY, checkpoint_every=10**9, sample_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        cache, checkpoints = LatentCache(LATENTS), Checkpoints(Path(folder), 1)
        trainer = Trainer(cache, params.active.model, optim, train, runtime, logger, None, checkpoints)
        trainer.total_steps = min(trainer.total_steps, steps)
        trainer.train()
    values = [logger.curves[step]["images_per_second"] for step in sorted(logger.curves)]
    return statistics.median(values[WARM_UP:] or values or [0.0])


if __name__ == "__main__":
    speed = images_per_second(int(sys.argv[1]))
    if speed:
        print(json.dumps(speed))
