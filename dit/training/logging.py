"""What is logged while training: running sums on the device, and the curves, log lines and previews that are made of them."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

BINS = 5  # of the timesteps, equally wide

# Where each sum is: first what every process counts of its own rows, then what is the same in all processes.
LOSS, COUNT, BIN_LOSS = 0, 1, slice(2, 2 + BINS)
BIN_COUNT = slice(2 + BINS, 2 + 2 * BINS)
NORM, GOOD, SKIPPED, IN_A_ROW = range(2 + 2 * BINS, 6 + 2 * BINS)
PER_PROCESS = slice(0, NORM)


class RunningMetrics:
    """Sums over the steps since the last log; they stay on the device, so that no step waits for the host.

    Attributes:
        totals: (6 + 2 BINS,) float64, on the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.totals = torch.zeros(6 + 2 * BINS, dtype=torch.float64, device=device)
        self._steps, self._seconds, self._started = 0, 0.0, time.perf_counter()

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, norm: torch.Tensor) -> None:
        """Add a step: `losses` and `timesteps` (n,) of this process's rows, and the gradient's `norm`, () of all."""
        good = torch.isfinite(norm)
        zero = torch.zeros((), device=self.device)
        losses = torch.where(good, losses, zero).double()
        counted = good.expand(len(losses)).double()
        bins = (timesteps * BINS).long().clamp(0, BINS - 1)
        totals = self.totals
        totals[LOSS] += losses.sum()
        totals[COUNT] += counted.sum()
        totals[BIN_LOSS] += torch.zeros(BINS, dtype=torch.float64, device=self.device).index_add(0, bins, losses)
        totals[BIN_COUNT] += torch.zeros(BINS, dtype=torch.float64, device=self.device).index_add(0, bins, counted)
        totals[NORM] += torch.where(good, norm, zero)
        totals[GOOD] += good
        totals[SKIPPED] += ~good
        totals[IN_A_ROW] = torch.where(good, zero, totals[IN_A_ROW] + 1)
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of `images_per_second` for what is not a step."""
        self._seconds += time.perf_counter() - self._started
        try:
            yield
        finally:
            self._started = time.perf_counter()

    def reduced(self, accelerator: Accelerator) -> torch.Tensor:
        """Return the sums over all processes; every process has to call this."""
        totals = self.totals.clone()
        if accelerator.num_processes > 1:
            totals[PER_PROCESS] = accelerator.reduce(totals[PER_PROCESS].contiguous())
        return totals

    def restore(self, totals: torch.Tensor, accelerator: Accelerator) -> None:
        """Resume from sums that were saved; the first process takes over what all had counted."""
        self.totals.copy_(totals)
        if not accelerator.is_main_process:
            self.totals[PER_PROCESS] = 0

    def compute_and_reset(self, accelerator: Accelerator, batch_size: int, seconds_per_image_at_peak: float) -> dict[str, float]:
        """Return the means since the last call, under the names they are logged by. Waits for the device."""
        totals = self.reduced(accelerator).cpu()
        seconds = self._seconds + time.perf_counter() - self._started
        rate = self._steps * batch_size / seconds if self._steps else float("nan")
        values = {
            "train_loss": (totals[LOSS] / totals[COUNT]).item(),
            "grad_norm": (totals[NORM] / totals[GOOD]).item(),
            "skipped_steps": totals[SKIPPED].item(),
            "images_per_second": rate,
            "mfu": rate * seconds_per_image_at_peak,
        }
        means = (totals[BIN_LOSS] / totals[BIN_COUNT]).tolist()
        values |= {f"loss_t_{k / BINS:.1f}_{(k + 1) / BINS:.1f}": mean for k, mean in enumerate(means)}
        if self.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        in_a_row = self.totals[IN_A_ROW].clone()
        self.totals.zero_()
        self.totals[IN_A_ROW] = in_a_row
        self._steps, self._seconds, self._started = 0, 0.0, time.perf_counter()
        return values

    @property
    def nonfinite_in_a_row(self) -> int:
        """How many steps up to now were skipped, one after the other. Waits for the device."""
        return int(self.totals[IN_A_ROW].item())


class MetricLogger:
    """Keeps curves, log lines and previews, and passes them on; the trainer itself knows no tracker.

    Args:
        log: the text file with a line per event.
        previews: the folder of the preview images.
        kept: a folder that outlives a killed run, for copies of the previews; None to keep none.
        on_metrics: called with (step, {name: value}).
        on_preview: called with (step, image).
        echo: prints a line to the user.
    """

    def __init__(
        self,
        log: Path,
        previews: Path,
        kept: Path | None = None,
        on_metrics: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        on_preview: Callable[[int, Image.Image], None] = lambda step, image: None,
        echo: Callable[[str], None] = print,
    ):
        self._log, self._previews, self._kept = log, previews, kept
        self._on_metrics, self._on_preview, self._echo = on_metrics, on_preview, echo
        self.curves: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        previews.mkdir(parents=True, exist_ok=True)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log `values` at `step`; NaN (the loss of a bin without images) is left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.curves.setdefault(step, {}).update(values)
        self._on_metrics(step, values)

    def log_preview(self, step: int, image: Image.Image) -> None:
        """Save a preview image."""
        path = self._previews / f"step-{step:06d}.png"
        image.save(path)
        if self._kept:
            self._kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._kept / path.name)
        self._on_preview(step, image)

    def log_line(self, line: str, echo: bool = True) -> None:
        """Write a line into the log and, with `echo`, print it; the first line replaces the log of an earlier training."""
        mode = "a" if self.lines else "w"
        self.lines.append(line)
        with self._log.open(mode, encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
        if echo:
            self.echo(line)

    def echo(self, line: str) -> None:
        """Print a line without logging it."""
        self._echo(line)

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"curves": [[step, values] for step, values in self.curves.items()], "lines": self.lines}

    def restore(self, state: dict, step: int) -> None:
        """Resume from what was logged up to `step`."""
        self.curves = dict(state["curves"])
        self.lines = list(state["lines"])
        self._log.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8", newline="\n")
        for path in sorted(self._kept.glob("step-*.png")) if self._kept else []:
            if int(path.stem.removeprefix("step-")) <= step:
                shutil.copyfile(path, self._previews / path.name)

    def write_curves(self, path: Path) -> None:
        """Write the curves as a table with a row per step."""
        import pandas as pd

        table = pd.DataFrame.from_dict(self.curves, orient="index").rename_axis("step").sort_index()
        table.to_csv(path, float_format="%.6g", lineterminator="\n")


def log_step(metrics: dict[str, float], done: int, total_steps: int, logger: MetricLogger, progress: tqdm) -> None:
    """Log what `RunningMetrics` measured up to step `done`: as curves, as a line of the log, and beside the bar `progress`."""
    rate = metrics["images_per_second"]
    speed = f"{rate:.{0 if rate >= 10 else 2}f} images/s"
    progress.set_postfix_str(f"loss {metrics['train_loss']:.3f}, {speed}, MFU {metrics['mfu']:.0%}")
    logger.log_metrics(done, metrics)
    memory = f" {metrics['gpu_memory_gb']:.1f} GB" if "gpu_memory_gb" in metrics else ""
    logger.log_line(
        f"step {done}/{total_steps} loss {metrics['train_loss']:.4f} grad {metrics['grad_norm']:.2f} "
        f"lr {metrics['learning_rate']:.2e} {speed} MFU {metrics['mfu']:.1%}{memory}",
        echo=False,
    )
    if metrics["skipped_steps"]:
        logger.log_line(f"{metrics['skipped_steps']:.0f} steps up to step {done} were skipped: loss or gradients not finite")


def duration(seconds: float) -> str:
    """Word a time roughly: "40 s", "7 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class NullLogger(MetricLogger):
    """The logger of every process but the first: it logs nothing."""

    def __init__(self):
        self.curves, self.lines = {}, []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Ignore metrics."""

    def log_preview(self, step: int, image: Image.Image) -> None:
        """Ignore a preview."""

    def log_line(self, line: str, echo: bool = True) -> None:
        """Ignore a line."""

    def echo(self, line: str) -> None:
        """Print nothing."""

    def restore(self, state: dict, step: int) -> None:
        """Restore nothing."""
