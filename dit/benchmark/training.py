"""How fast training is, beside what the hardware could do, beside its peers, and beside encoding at every step.

Everything is measured in one run and alternately, since the speed of machines drifts; of each the fastest step counts.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from dit.benchmark.baselines import (
    LATENT,
    Inputs,
    Step,
    TrainingStep,
    attention_kernels,
    class_dit_step,
    count_flops,
    encode_first,
    own_network,
    own_step,
    pixart_step,
)
from dit.benchmark.results import default_device, device_name, markdown_table
from dit.benchmark.synthetic import write_synthetic
from dit.config import Model, Params
from dit.latents.cache import LatentCache
from dit.model.transformer import forward_flops
from dit.training.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from dit.training.logging import NullLogger
from dit.training.setup import DTYPES, choose_precision, keep_freed_memory
from dit.training.trainer import Trainer
from dit.utils.hardware import matmul_peak, synchronize

OWN, TUTORIAL = "this model", "this model, encoding at every step"
PEERS = {"PixArtTransformer2DModel": pixart_step, "DiTTransformer2DModel, classes alone": class_dit_step}
COMPILED, EAGER = ", compiled", ", not compiled"
WARM_UP = 3  # steps of the training loop, the first of which compiles
HEADER = ("a training step of", "images/s", "ms/step", "share of the matmul peak", "peak memory", "this model is faster by")


@dataclass
class Row:
    """One line of the table; `share` is of the matmul peak, memory is a GPU's in GB (None on a CPU)."""

    name: str
    images_per_second: float
    seconds_per_step: float
    share: float | None
    peak_memory: float | None
    ratio: float  # this model's bare images/s to this row's


@dataclass
class CheckpointCost:
    """Size of a checkpoint; seconds that the loop waits for it, until it is on the disk, and to check and read it."""

    gigabytes: float
    seconds_held: float
    seconds_written: float
    seconds_read: float


class TimedCheckpoints(Checkpoints):
    """Checkpoints that measure the cost of the last one."""

    cost: CheckpointCost

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict) -> None:
        """Save a checkpoint, wait until it is written, and read it again."""
        started = time.perf_counter()
        super().save(step, tensors, record)
        held = time.perf_counter() - started
        self.wait()
        written = time.perf_counter() - started
        started = time.perf_counter()
        checkpoint = open_checkpoint(self.folder / f"step-{step:08d}.json")
        size = sum(value.nbytes for value in checkpoint.tensors().values())
        self.cost = CheckpointCost(size / 1e9, held, written, time.perf_counter() - started)


class CurveLogger(NullLogger):
    """Keeps the curves, and writes nothing."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Keep `values`."""
        self.curves.setdefault(step, {}).update(values)


def benchmark_training(
    params: Params, model: Model, batch: int, tokens: int, rounds: int, precision: str, compiled: bool
) -> dict[str, Any]:
    """Measure training steps of `model`, of its peers, with encoding before each, and of the trainer itself.

    Args:
        params: settings of the trainer beside those below.
        model: size of all transformers.
        batch: images in a step.
        tokens: length that captions are padded to.
        rounds: steps of each, of which the fastest counts.
        precision: as `train.mixed_precision`.
        compiled: whether this model and its peers are compiled; the peers are measured uncompiled, too.

    Returns:
        What `training_table` prints, for JSON.
    """
    device = default_device()
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(precision, print)
    dtype = DTYPES[precision]
    inputs = Inputs.random(batch, tokens, device)
    kernels = attention_kernels(own_step(model, inputs, dtype, compiled=False))
    # Operations of an image, forward and backward.
    flops = {name: 3 * count_flops(make(model, inputs, dtype, False).forward) // batch for name, make in PEERS.items()}
    flops[OWN] = 3 * forward_flops(own_network(model), LATENT[1:], tokens)

    own = own_step(model, inputs, dtype, compiled)
    parameters = own.parameters
    steps: dict[str, Step] = {OWN: own}
    if compiled:
        steps[OWN + EAGER] = own_step(model, inputs, dtype, compiled=False)
    for compiles in (False, True) if compiled else (False,):
        for name, make in PEERS.items():
            steps[name + (COMPILED if compiles else "")] = make(model, inputs, dtype, compiles)
    peaks = [matmul_peak(device, dtype)]
    seconds, memory = time_steps(steps, rounds, device)
    peaks.append(matmul_peak(device, dtype))
    tutorial, _ = time_steps({TUTORIAL: encode_first(own, batch, dtype, device)}, 1, device)
    steps.clear()
    del own

    loops: dict[str, tuple[float, float | None]] = {}
    for deterministic in (False, True) if device.type == "cuda" else (False,):  # a CPU is deterministic anyway
        name = f"{OWN}, the training loop{deterministic * ', deterministic'}"
        loops[name], cost = time_trainer(params, model, batch, tokens, rounds, precision, compiled, deterministic)
    peaks.append(matmul_peak(device, dtype))

    def row(name: str, seconds_per_step: float, memory: float | None, flops: int | None) -> Row:
        share = flops * batch / seconds_per_step / max(peaks) if flops else None
        return Row(name, batch / seconds_per_step, seconds_per_step, share, memory, seconds_per_step / seconds[OWN])

    rows = [
        row(name, best, memory[name], flops[name.removesuffix(COMPILED).removesuffix(EAGER)]) for name, best in seconds.items()
    ]
    rows[1:1] = [row(name, best, used, flops[OWN]) for name, (best, used) in loops.items()]
    rows.append(row(TUTORIAL, tutorial[TUTORIAL], None, None))
    return {
        "device": device_name(device),
        "precision": precision,
        "compiled": compiled,
        "model": asdict(model),
        "parameters": parameters,
        "batch_size": batch,
        "text_tokens": tokens,
        "attention": kernels,
        "matmul_peak": max(peaks),
        "flops_per_image_and_step": flops[OWN],
        "rows": [asdict(row) for row in rows],
        "checkpoint": asdict(cost),
    }


def time_steps(steps: dict[str, Step], rounds: int, device: torch.device) -> tuple[dict[str, float], dict[str, float | None]]:
    """Run all steps in turn, once to warm up and `rounds` times more.

    Returns:
        By name, the seconds of the fastest run, and the peak GPU memory in GB: None on a CPU, and of what is no `TrainingStep`.
    """
    seconds = dict.fromkeys(steps, float("inf"))
    memory: dict[str, float | None] = dict.fromkeys(steps)
    for number in tqdm(range(rounds + 1), desc="benchmark", unit="round", leave=False):
        for name, step in steps.items():
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            step()
            synchronize(device)
            if number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
            if device.type == "cuda" and isinstance(step, TrainingStep):  # the others' weights are in memory, too
                memory[name] = (torch.cuda.max_memory_allocated() - before + step.state_bytes) / 1e9
    return seconds, memory


def time_trainer(
    params: Params, model: Model, batch: int, tokens: int, steps: int, precision: str, compiled: bool, deterministic: bool
) -> tuple[tuple[float, float | None], CheckpointCost]:
    """Run the trainer on a synthetic cache.

    Returns:
        The seconds of the fastest of `steps` steps, the peak GPU memory in GB, and the cost of a checkpoint.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, logger = TimedCheckpoints(Path(folder) / "state", 1), CurveLogger()
        cache = write_cache(Path(folder) / "cache", batch, WARM_UP + steps, tokens)
        own_runtime = replace(params.runtime, checkpoint_every=WARM_UP, deterministic=deterministic)
        make_trainer(replace(params, runtime=own_runtime), cache, model, batch, precision, compiled, checkpoints, logger).train()
    fastest = max(values.get("images_per_second", 0.0) for step, values in logger.curves.items() if step > WARM_UP)
    return (batch / fastest, torch.cuda.max_memory_allocated() / 1e9 if gpu else None), checkpoints.cost


def write_cache(folder: Path, batch: int, steps: int, tokens: int) -> LatentCache:
    """Write a synthetic cache with images for `steps` steps of `batch`, with captions of up to `tokens` tokens."""
    write_synthetic(folder, -(-batch * steps * 20 // 19), longest=tokens)
    return LatentCache(folder)


def make_trainer(
    params: Params,
    cache: LatentCache,
    model: Model,
    batch: int,
    precision: str,
    compiled: bool,
    checkpoints: Checkpoints,
    logger: NullLogger,
    resume: Checkpoint | None = None,
) -> Trainer:
    """Make a trainer of one epoch without validation, with what else `params` say."""
    changes: dict[str, Any] = {"batch_size": batch, "gradient_accumulation_steps": 1, "mixed_precision": precision}
    train = replace(params.train, **changes, method="scratch", init_from=None, validate_every=10**9)
    optim = replace(params.active.optim, num_epochs=1, compile_model=compiled)
    runtime = replace(params.runtime, log_every=1)
    AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first training
    return Trainer(cache, model, optim, train, runtime, logger, None, checkpoints, resume)


def training_table(results: dict[str, Any]) -> str:
    """Return the results as a line about the model, a Markdown table, and a line about attention and checkpoints."""
    model, cost = results["model"], results["checkpoint"]
    size = " x ".join(str(model[key]) for key in ("hidden_size", "num_layers", "num_heads"))
    convolutions = f", convolutions of {model['conv_channels']}" if model["conv_channels"] else ""
    rows = [
        (
            row["name"],
            f"{row['images_per_second']:.3g}",
            f"{1000 * row['seconds_per_step']:.0f}",
            "" if row["share"] is None else f"{row['share']:.0%}",
            "" if row["peak_memory"] is None else f"{row['peak_memory']:.1f} GB",
            f"{row['ratio']:.2f}",
        )
        for row in results["rows"]
    ]
    return (
        f"{size}, patch {model['patch_size']}{convolutions}, {results['parameters'] / 1e6:.3g} M parameters, "
        f"{results['device']}, {results['precision']}{', compiled' if results['compiled'] else ''}, "
        f"batch {results['batch_size']}, {results['text_tokens']} text tokens; "
        f"matmul peak {results['matmul_peak'] / 1e12:.2f} TFLOP/s, "
        f"{results['flops_per_image_and_step'] / 1e9:.4g} GFLOP per image and step\n\n"
        f"{markdown_table(HEADER, rows)}\n\n"
        f"Attention: {', '.join(results['attention'])}. A checkpoint has {cost['gigabytes']:.2f} GB; the loop waits "
        f"{cost['seconds_held']:.2f} s for it, it is on the disk after {cost['seconds_written']:.1f} s, and checking and reading "
        f"take {cost['seconds_read']:.1f} s."
    )
