"""Run a stage in several processes, one per GPU or CPU core, with torch's own launcher (what `torchrun` runs)."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dit.errors import UserError

LAUNCHER = "DIT_LAUNCHER_PID"  # an environment variable
IMAGES_PER_PROCESS = 16  # of a batch, at least
PATIENCE = 3600  # seconds that processes may take to save a checkpoint after SIGTERM


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def choose_process_count(batch_size: int) -> int:
    """Return how many processes share batches of `batch_size` where `runtime.num_processes` is auto: on a GPU, one.

    On a CPU it is one for each core, with `IMAGES_PER_PROCESS` or more. The threads of one process wait for each other at each
    operation, and in vain while another program has one of their cores; processes of one thread wait once a step
    (docs/performance.md: beside a busy process 456 instead of 67 images/s). Who sets OMP_NUM_THREADS gets one process with them.
    """
    if torch.accelerator.is_available() or "OMP_NUM_THREADS" in os.environ:
        return 1
    return max(1, min(cores(), batch_size // IMAGES_PER_PROCESS))


class ProcessFailed(UserError):
    """A process ended with an error that it has printed itself."""


class ProcessesStopped(ProcessFailed):
    """The processes were asked to stop and have said what they saved."""

    resumes = True


def end_with_launcher() -> None:
    """End this process as soon as the torch launcher that started it is gone, even if that was killed.

    torch's launcher starts each process in a session of its own, so that a signal to the launcher's group does not reach it:
    after `kill -9` it would keep training, and hold the lock on the checkpoints.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # which may be gone already: imports take seconds

    def watch() -> None:
        while os.getppid() == launcher and psutil.pid_exists(launcher):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def leave_processes() -> None:
    """Leave the process group: a process that just exits may be aborted by its own communication threads."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for as long as this lasts; processes that are started later must not take them for theirs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_processes(command: list[str], count: int) -> None:
    """Run `command` in `count` processes side by side, each with its rank in the environment, and wait for all.

    As soon as one fails the others are ended, and the output of the one that failed first is printed. SIGTERM and Ctrl-C are
    passed on to them, and they may take their time to save and stop.

    Raises:
        UserError: there are fewer GPUs.
        ProcessFailed: one of them failed.
        ProcessesStopped: a signal stopped them.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"runtime.num_processes: {count}, but there are {gpus} GPUs; {gpus} would be right")
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count)))
    inherited = {LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": threads} | ({} if gpus else {"ACCELERATE_USE_CPU": "true"})
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # each failure would be a stack trace
    with tempfile.TemporaryDirectory() as logs, _environment(inherited):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=PATIENCE,
            logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            raise ProcessesStopped(f"stopped by {error.sigval.name}, see above") from None
        except ChildFailedError as error:
            rank, _ = error.get_first_failure()
            if rank:  # process 0 prints by itself
                for name in ("stdout.log", "stderr.log"):
                    for file in Path(logs).rglob(f"{rank}/{name}"):
                        print(file.read_text(encoding="utf-8"), end="", flush=True)
            raise ProcessFailed(f"process {rank} of {count} failed ({' '.join(command[1:3])[:60]}), see above") from None
