"""How fast training is, beside what the hardware could do, beside its peers, and beside encoding at every step.

Everything is measured in one run and alternately, since the speed of machines drifts; of each the fastest step counts.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from dit.benchmark.baselines import (
    LATENT,
    Inputs,
    Step,
    TrainingStep,
    attention_kernels,
    count_flops,
    dit_step,
    encoding,
    encoding_first,
    own_step,
    pixart_step,
)
from dit.benchmark.synthetic import write_synthetic
from dit.config import Model, Params
from dit.latents.cache import LatentCache
from dit.model.transformer import forward_flops
from dit.training.checkpoint import Checkpoints, open_checkpoint
from dit.training.logging import NullLogger
from dit.training.setup import DTYPES, choose_precision, keep_freed_memory
from dit.training.trainer import Trainer
from dit.utils.hardware import matmul_peak


@dataclass
class Row:
    """One line of the table; times in seconds, `share` of the matmul peak, memory in GB (of a GPU; None on a CPU)."""

    name: str
    images_per_second: float
    seconds_per_step: float
    share: float | None
    peak_memory: float | None
    ratio: float  # this model's bare images/s to this row's


@dataclass
class CheckpointCost:
    """Of one checkpoint: its size, for how long the loop waits, when it is on the disk, how long looking and reading takes."""

    gigabytes: float
    seconds_held: float
    seconds_written: float
    seconds_read: float


class Timed(Checkpoints):
    """Takes the time of the last checkpoint."""

    cost: CheckpointCost

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict) -> None:
        started = time.perf_counter()
        super().save(step, tensors, record)
        held = time.perf_counter() - started
        self.wait()
        written = time.perf_counter() - started
        started = time.perf_counter()
        checkpoint = open_checkpoint(self.folder / f"step-{step:08d}.json")
        size = sum(value.nbytes for value in checkpoint.tensors().values())
        self.cost = CheckpointCost(size / 1e9, held, written, time.perf_counter() - started)


def loop_rate(
    params: Params, model: Model, batch: int, tokens: int, steps: int, precision: str, compiled: bool, deterministic: bool
) -> tuple[float, CheckpointCost]:
    """Images per second of `Trainer` itself, on a synthetic cache, in the fastest of `steps` steps; and what a
    checkpoint costs."""
    rates: dict[int, float] = {}

    class Rates(NullLogger):
        def log_metrics(self, step: int, values: dict[str, float]) -> None:
            if "images_per_second" in values:
                rates[step] = values["images_per_second"]

    warm_up = 3  # steps, the first of which compiles
    with tempfile.TemporaryDirectory() as folder:
        images = (warm_up + steps) * batch
        write_synthetic(Path(folder) / "cache", -(-images * 20 // 19), longest=tokens)
        cache = LatentCache(Path(folder) / "cache")
        never = 10**9
        train = replace(
            params.train, batch_size=batch, gradient_accumulation_steps=1, mixed_precision=precision, validate_every=never
        )
        optim = replace(params.active.optim, num_epochs=1, compile_model=compiled)
        runtime = replace(params.runtime, log_every=1, checkpoint_every=warm_up, deterministic=deterministic)
        checkpoints = Timed(Path(folder) / "state", 1)

        AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first training
        Trainer(cache, model, optim, train, runtime, Rates(), None, checkpoints).train()
    measured = [rate for step, rate in rates.items() if step > warm_up]
    return max(measured), checkpoints.cost


def fastest(steps: dict[str, Step], rounds: int, device: torch.device) -> tuple[dict[str, float], dict[str, float | None]]:
    """Seconds of each step's fastest run and its peak GPU memory in GB, `rounds` runs each in turn, after one to warm up."""
    seconds = dict.fromkeys(steps, float("inf"))
    memory: dict[str, float | None] = dict.fromkeys(steps)
    for number in tqdm(range(rounds + 1), desc="benchmark", unit="round", leave=False):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                if isinstance(step, TrainingStep):  # the others' weights lie beside it
                    memory[name] = (torch.cuda.max_memory_allocated() - before + step.held) / 1e9
            if number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds, memory


def benchmark(params: Params, model: Model, batch: int, tokens: int, rounds: int, precision: str, compiled: bool) -> dict:
    """Measure everything; returns what `table` prints, as JSON has it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(precision, print)
    dtype = DTYPES[precision]
    inputs = Inputs.random(batch, tokens, device)
    bare = own_step(model, inputs, dtype, compiled)
    steps: dict[str, Step] = {"this model": bare}
    for kind in (False, True) if compiled else (False,):
        suffix = ", compiled" if kind else ""
        steps[f"PixArtTransformer2DModel{suffix}"] = pixart_step(model, inputs, dtype, kind)
        steps[f"DiTTransformer2DModel{suffix}, classes alone"] = dit_step(model, inputs, dtype, kind)
    flops = {"this model": 3 * forward_flops(bare.network, LATENT[1:], tokens)}
    flops |= {
        name: 3 * count_flops(step.forward) // batch
        for name, step in steps.items()
        if "this" not in name and "compiled" not in name
    }
    flops |= {name: flops[name.replace(", compiled", "")] for name in steps if "compiled" in name}
    kernels = attention_kernels(own_step(model, inputs, dtype, compiled=False))
    parameters = bare.parameters
    peaks = [matmul_peak(device, dtype)]
    seconds, memory = fastest(steps, rounds, device)
    peaks.append(matmul_peak(device, dtype))
    tutorial = {"this model, encoding at every step": encoding_first(bare, encoding(batch, tokens, dtype, device))}
    for found, more in zip((seconds, memory), fastest(tutorial, 1, device), strict=True):
        found |= more
    steps.clear()
    tutorial.clear()
    del bare
    loops: dict[str, tuple[float, float | None]] = {}
    for deterministic in (False, True) if device.type == "cuda" else (False,):  # a CPU is deterministic anyway
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate, cost = loop_rate(params, model, batch, tokens, rounds, precision, compiled, deterministic)
        used = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        loops[f"this model, the training loop{', deterministic' if deterministic else ''}"] = (rate, used)
    peaks.append(matmul_peak(device, dtype))
    peak, own = max(peaks), batch / seconds["this model"]

    def row(name: str, rate: float, memory: float | None) -> Row:
        share = rate * flops[name] / peak if name in flops else None
        return Row(name, rate, batch / rate, share, memory, own / rate)

    flops |= dict.fromkeys(loops, flops["this model"])
    rows = [row(name, batch / best, memory[name]) for name, best in seconds.items()]
    rows[1:1] = [row(name, rate, used) for name, (rate, used) in loops.items()]
    return {
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
        "precision": precision,
        "compiled": compiled,
        "model": asdict(model),
        "parameters": parameters,
        "batch_size": batch,
        "text_tokens": tokens,
        "attention": kernels,
        "matmul_peak": peak,
        "flops_per_image_and_step": flops["this model"],
        "rows": [asdict(row) for row in rows],
        "checkpoint": asdict(cost),
    }


def table(results: dict) -> str:
    """The results as a Markdown table."""
    model = results["model"]
    size = " x ".join(str(model[key]) for key in ("hidden_size", "num_layers", "num_heads"))
    lines = [
        f"{size}, patch {model['patch_size']}, {results['parameters'] / 1e6:.3g} M parameters, {results['device']}, "
        f"{results['precision']}{', compiled' if results['compiled'] else ''}, batch {results['batch_size']}, "
        f"{results['text_tokens']} text tokens; matmul peak {results['matmul_peak'] / 1e12:.2f} TFLOP/s, "
        f"{results['flops_per_image_and_step'] / 1e9:.4g} GFLOP per image and step",
        "",
        "| a training step of | images/s | ms/step | share of the matmul peak | peak memory | this model is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        memory = "" if row["peak_memory"] is None else f"{row['peak_memory']:.1f} GB"
        lines.append(
            f"| {row['name']} | {row['images_per_second']:.3g} | {1000 * row['seconds_per_step']:.0f} | {share} | {memory} | "
            f"{row['ratio']:.2f} |"
        )
    cost = results["checkpoint"]
    lines += [
        "",
        f"Attention: {', '.join(results['attention'])}. A checkpoint has {cost['gigabytes']:.2f} GB; the loop waits "
        f"{cost['seconds_held']:.2f} s for it, it is on the disk after {cost['seconds_written']:.1f} s, and looking and reading "
        f"take {cost['seconds_read']:.1f} s.",
    ]
    return "\n".join(lines)
