"""What happened since the last log: sums that stay on the device, so that no step waits for the host."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator

BINS = 5  # of the timesteps, equally wide

# The places of the sums: first what every process has counted of its own rows, then what all know alike.
LOSS, COUNT, BIN_LOSS = 0, 1, slice(2, 2 + BINS)
BIN_COUNT = slice(2 + BINS, 2 + 2 * BINS)
NORM, GOOD, SKIPPED, IN_A_ROW = range(2 + 2 * BINS, 6 + 2 * BINS)
SHARED = slice(0, NORM)


class Window:
    """Sums over the steps since the last log.

    Attributes:
        totals: (6 + 2 BINS,) float64, on the device.
        in_a_row: how many steps up to now were skipped one after the other; a tensor, too.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.totals = torch.zeros(6 + 2 * BINS, dtype=torch.float64, device=device)
        self._steps, self._seconds, self._started = 0, 0.0, time.perf_counter()

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, norm: torch.Tensor) -> None:
        """Count a step: `losses` and `timesteps` (n,) of this process's rows, and the gradient's `norm`, () of all."""
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

    def pause(self) -> None:
        """Stop the clock, for what is not a step."""
        self._seconds += time.perf_counter() - self._started

    def go_on(self) -> None:
        self._started = time.perf_counter()

    def reduced(self, accelerator: Accelerator) -> torch.Tensor:
        """The sums over all processes; every process calls this."""
        totals = self.totals.clone()
        if accelerator.num_processes > 1:
            totals[SHARED] = accelerator.reduce(totals[SHARED].contiguous())
        return totals

    def restore(self, totals: torch.Tensor, accelerator: Accelerator) -> None:
        """Go on with sums that were saved; the first process takes over what all had counted."""
        self.totals.copy_(totals)
        if not accelerator.is_main_process:
            self.totals[SHARED] = 0

    def close(self, accelerator: Accelerator, batch_size: int, seconds_per_image_at_peak: float) -> dict[str, float]:
        """The window's means, under the names they are logged by, and a new window. Waits for the device."""
        totals = self.reduced(accelerator).cpu()
        self.pause()
        rate = self._steps * batch_size / self._seconds if self._steps else float("nan")
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
    def in_a_row(self) -> int:
        """How many steps up to now were skipped, one after the other. Waits for the device."""
        return int(self.totals[IN_A_ROW].item())
