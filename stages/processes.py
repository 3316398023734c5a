"""Several processes for one stage, as torch.distributed and accelerate expect to find each other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time

import torch

from dit.errors import UserError

PATIENCE = 5.0  # seconds for the others to end by themselves, once one has


def leave_processes() -> None:
    """Part from the others in good order: a process that just exits may be aborted by its own communication threads."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class ProcessFailed(UserError):
    """One of the processes ended with an error; it has said which."""


def run_processes(command: list[str], count: int) -> None:
    """Run `command` `count` times side by side, each with its rank in the environment, and wait for all.

    As soon as one fails the others are ended, and what it said is printed, whichever it was.
    SIGTERM is passed on to them (Ctrl-C they get themselves), and they may take their time to save and stop.

    Raises:
        UserError: there are fewer GPUs.
        ProcessFailed: one of them failed.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"runtime.num_processes: {count}, but there are {gpus} GPUs; {gpus} would be right")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    if not gpus:
        shared["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryFile("w+") as others:
        processes = [
            subprocess.Popen(
                command,
                env=threads | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=others if rank else None,
                stderr=others if rank else None,
            )
            for rank in range(count)
        ]

        def pass_on(number: int, frame) -> None:
            for process in processes:
                process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on), signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(0.1)
            first = next((rank for rank, code in enumerate(codes) if code), 0)  # what the others run into then is a consequence
            deadline = time.monotonic() + PATIENCE
            while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
                time.sleep(0.1)
            if any(codes):
                if first or not codes[0]:  # process 0 has printed by itself, and not the cause
                    others.seek(0)
                    print(others.read(), end="", flush=True)
                rank = first or next(rank for rank, code in enumerate(codes) if code)
                raise ProcessFailed(f"process {rank} of {count} failed ({' '.join(command[1:3])[:60]}), see above")
        finally:
            signal.signal(signal.SIGTERM, before[0])
            signal.signal(signal.SIGINT, before[1])
            for process in processes:
                process.kill()
                process.wait()
