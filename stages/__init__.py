"""What the stages share: reading params.yaml, starting processes, and failing with one clear line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from dit.config import Params, load_config
from dit.errors import UserError, is_out_of_memory, out_of_memory
from stages.dvc_files import lost_outs, restore_metrics, unlink_outs

# What torch's launcher sets for each process that it starts: ours, torchrun, accelerate launch. RANK alone is none: clusters and
# containers set it, too, for every program.
STARTED_BY_TORCH = "TORCHELASTIC_RUN_ID"
# By these accelerate takes a process for one of several.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

BATCHES = ("encode", "train", "sample")  # stages whose memory is that of a batch, which a setting of their block sizes


def run_stage(
    name: str, main: Callable[[Params], None], metrics: list[str], parallel: bool = False, writes_outs: bool = True
) -> None:
    """Run `main` on params.yaml as stage `name`; print a `UserError` in one line and exit with 1.

    A `parallel` stage runs in `runtime.num_processes` processes, one per GPU or CPU core. The arguments behind its name on the
    command line are passed on. What is run without `writes_outs` leaves the stage's outs as they are.

    DVC deletes a stage's outs before it starts it. `dvc checkout --force` brings back those that it caches; `metrics`, the files
    that live in git instead, are brought back here.
    """
    is_worker = STARTED_BY_TORCH in os.environ  # one of several processes: the one that started them does the rest
    if not is_worker:
        for variable in RANKS:
            os.environ.pop(variable, None)
    try:
        params = load_config()
        if writes_outs and os.environ.get("RANK", "0") == "0":
            unlink_outs(name)
        count = 1 if is_worker or not parallel else _process_count(name, params)
        if name == "train" and params.runtime.sharding == "full" and count == 1 and not is_worker:
            print("train: runtime.sharding: full divides nothing in one process; runtime.num_processes sets how many", flush=True)
        if count > 1:
            from stages.processes import run_processes

            run_processes([sys.executable, "-m", f"stages.{name}", *sys.argv[1:]], count)
        elif is_worker:
            from stages.processes import end_with_launcher, leave_processes

            end_with_launcher()
            main(params)
            leave_processes()
        else:
            main(params)
    except BaseException as error:
        lost = [] if is_worker else lost_outs(name)
        if not is_worker:
            restore_metrics(name, metrics)
        problem = _user_message(error, name)
        if problem is None:
            raise
        print(f"{name}: {problem}", file=sys.stderr)
        if lost and not getattr(error, "resumes", False):
            print(f"{name}: `dvc checkout --force` brings the earlier outputs back", file=sys.stderr)
        sys.exit(1)


def _process_count(name: str, params: Params) -> int:
    """Return in how many processes a parallel stage runs; without being told, only the training runs in several."""
    if params.runtime.num_processes != "auto":
        return params.runtime.num_processes
    if name != "train":
        return 1
    from stages.processes import choose_process_count  # imports torch, which the download stage need not wait for

    return choose_process_count(params.train.batch_size)


def _user_message(error: BaseException, name: str) -> str | None:
    """Return what a user of stage `name` can act on; None for a defect of ours, which needs its stack trace."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some (`dvc gc -w` drops what no commit uses) and run again"
    if is_out_of_memory(error):
        return out_of_memory(error, f"a smaller {name}.batch_size may fit" if name in BATCHES else "")
    return None
