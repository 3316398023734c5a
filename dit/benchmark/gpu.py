"""All that only a GPU can show, in one go: no DVC, no MLflow and no network are needed, and no data.

On a CPU the same is done with a small model, so that nothing is run for the first time on a GPU that is lent for an hour.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dit.benchmark.baselines import LATENT, TEXT_SIZE, own_network, untrained_encoders
from dit.benchmark.memory import StageMemory
from dit.benchmark.results import default_device, markdown_table
from dit.benchmark.sampling import STEPS, Text, sample_latents
from dit.benchmark.training import CurveLogger, benchmark_training, make_trainer, time_trainer, training_table, write_cache
from dit.config import Model, Params
from dit.errors import UserError
from dit.latents.cache import CLIP_TOKENS, LatentCache
from dit.training.checkpoint import Checkpoints
from dit.training.setup import choose_precision
from dit.utils.autoencoder import decode_latents
from dit.utils.hardware import has_fast_bf16, synchronize

TESTS = Path("tests/integration/test_gpu.py")
KILLED_STEPS, KILLED_EVERY, KILLED_BATCH = 60, 10, 8  # of the training that is killed: steps, between checkpoints, images
DIGEST = "weights.sha256"
DECODED = 8  # images
ROUNDS = 3


def benchmark_gpu(params: Params, model: Model, batch: int, tokens: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Run the tests for GPUs, and measure training, memory, loading, resuming, sampling and decoding.

    Args:
        params: settings beside those below.
        model: size of all transformers.
        batch: images in a step.
        tokens: length that captions are padded to.
        rounds: steps of each, of which the fastest counts.
        compiled: whether this model and its peers are compiled; they are measured uncompiled, too.

    Returns:
        What `gpu_table` prints, for JSON.
    """
    device = default_device()
    precision = choose_precision("bf16", print)
    results: dict[str, Any] = {"tests": run_tests()}
    results["training"] = benchmark_training(params, model, batch, tokens, rounds, precision, compiled)
    results["memory"] = count_memory(params, model, batch)
    results["loading"] = time_loading(params, model, batch, tokens, rounds, precision, compiled)
    results["same_bits_after_kill"] = same_bits_after_kill(params, model, precision)
    results["out_of_memory"] = out_of_memory_advice(params, model, batch, tokens, precision, results["memory"])
    results |= time_sampling(model, batch, device)
    return results


def run_tests() -> str:
    """Run the tests for GPUs; return the last line that pytest prints, or why they were not run."""
    if not TESTS.exists() or not find_spec("pytest"):
        return "not run: they need pytest, and a clone of the project as the working directory"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", TESTS], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"failed: {done.stderr.strip()[-200:]}"


def count_memory(params: Params, model: Model, batch: int) -> dict[str, float]:
    """Count, in GB, what stays of a training without cache, and what the forward pass adds, as `dit check` does; not compiled."""
    vae, clip = untrained_encoders()
    recipe = replace(params.coco, model=model)
    settings = replace(params, recipe="coco", coco=recipe, train=replace(params.train, batch_size=batch, method="scratch"))
    config = dict(vae.config) | {"_class_name": type(vae).__name__}  # which only a saved one has
    counted = StageMemory(settings, config, clip.config.to_dict(), images=0)
    memory = counted.training_memory(model.num_layers)
    return {"stays": memory.stays / 1e9, "forward": memory.forward / 1e9}


def time_loading(
    params: Params, model: Model, batch: int, tokens: int, rounds: int, precision: str, compiled: bool
) -> dict[str, float]:
    """Measure the training loop, in images per second, with the cache in the device's memory and with workers that read files."""
    rates = {}
    for name, on_device in (("cache on the device", True), ("workers", False)):
        settings = replace(params, runtime=replace(params.runtime, data_on_device=on_device))
        (seconds, _), _ = time_trainer(settings, model, batch, tokens, rounds, precision, compiled, deterministic=False)
        rates[name] = batch / seconds
    return rates


def same_bits_after_kill(params: Params, model: Model, precision: str) -> bool:
    """Kill a training after its first checkpoint, resume it, and return whether its weights are those of one that was not killed.

    Each runs in a process of its own, in deterministic mode, not compiled.
    """
    settings = replace(params, runtime=replace(params.runtime, deterministic=True, checkpoint_every=KILLED_EVERY))
    spawn = get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cache(folder / "cache", KILLED_BATCH, KILLED_STEPS, CLIP_TOKENS)

        def start(state: str) -> Any:
            process = spawn.Process(target=_train_small, args=(settings, model, precision, folder / "cache", folder / state))
            process.start()
            return process

        def digest(state: str) -> str:
            process = start(state)
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a training ended with {process.exitcode}, see above")
            return (folder / state / DIGEST).read_text()

        straight, killed = digest("straight"), start("killed")
        while killed.is_alive() and not list((folder / "killed").glob("step-*.json")):
            time.sleep(0.02)
        killed.kill()
        killed.join()
        return straight == digest("killed")


def _train_small(params: Params, model: Model, precision: str, cache: Path, folder: Path) -> None:
    """Train from the newest checkpoint in `folder`, and write a hash of the weights into it."""
    checkpoints, logger = Checkpoints(folder, 2), CurveLogger()
    resume = checkpoints.newest(print)
    batch = KILLED_BATCH
    trainer = make_trainer(params, LatentCache(cache), model, batch, precision, False, checkpoints, logger, resume)
    network, _ = trainer.train()
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    (folder / DIGEST).write_text(digest.hexdigest())


def out_of_memory_advice(params: Params, model: Model, batch: int, tokens: int, precision: str, memory: dict[str, float]) -> str:
    """Train where a third of what the forward pass keeps has room; return the line that a user reads then."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    torch.cuda.empty_cache()
    room = 1e9 * (memory["stays"] + memory["forward"] / 3) + torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache, checkpoints = write_cache(Path(folder) / "cache", batch, 2, tokens), Checkpoints(Path(folder) / "state", 1)
            make_trainer(params, cache, model, batch, precision, False, checkpoints, CurveLogger()).train()
    except UserError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return "it fitted, although it should not"


@torch.no_grad()
def time_sampling(model: Model, batch: int, device: torch.device) -> dict[str, float]:
    """Measure the seconds of a sampling step of `batch` images with guidance, as the pipeline's, and of decoding an image."""
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    network = own_network(model).to(device).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.nn.Module.to(network, dtype)
    vae = untrained_encoders()[0].to(device).eval()
    noise = torch.randn(batch, *LATENT, device=device)

    def text(length: int) -> Text:
        mask = (torch.arange(CLIP_TOKENS, device=device) < length).expand(batch, -1)
        tokens = torch.randn(batch, CLIP_TOKENS, TEXT_SIZE, device=device)
        return tokens, mask, torch.randn(batch, TEXT_SIZE, device=device)

    caption, empty = text(CLIP_TOKENS), text(2)
    steps = _fastest(lambda: sample_latents(network, noise, caption, empty, batched=True, cached=True), device)
    return {
        "sampling_seconds_per_step": steps / STEPS,
        "sampled_images": batch,
        "decoding_seconds_per_image": _fastest(lambda: decode_latents(vae, noise[:DECODED]), device) / len(noise[:DECODED]),
    }


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    run()
    seconds = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds = min(seconds, time.perf_counter() - started)
    return seconds


def gpu_table(results: dict[str, Any]) -> str:
    """Return the table of `benchmark_training`, and one of all the rest."""
    memory, loading, own = results["memory"], results["loading"], results["training"]["rows"]
    measured = {row["name"]: row["peak_memory"] for row in own}
    peaks = ", ".join(f"{name}: {peak:.1f} GB" for name, peak in measured.items() if peak and name.startswith("this model"))
    rows = [
        (str(TESTS), results["tests"]),
        ("memory of a step, counted (not compiled, without a cache)", f"{memory['stays'] + memory['forward']:.1f} GB"),
        ("the same, measured", peaks or "needs a GPU"),
        *((f"the training loop, {name}", f"{rate:.3g} images/s") for name, rate in loading.items()),
        ("killed and resumed: the same bits", "yes" if results["same_bits_after_kill"] else "NO"),
        ("with too little memory", results["out_of_memory"]),
        (
            f"a sampling step of {results['sampled_images']} images, guidance",
            f"{1000 * results['sampling_seconds_per_step']:.0f} ms",
        ),
        ("the VAE's decoder, an image of 256 x 256", f"{1000 * results['decoding_seconds_per_image']:.0f} ms"),
    ]
    return f"{training_table(results['training'])}\n\n{markdown_table(('what', 'measured'), rows)}"


def small(model: Model) -> Model:
    """Return a model of the same kind that a CPU trains in no time."""
    return Model(**asdict(model) | {"hidden_size": 64, "num_layers": 2, "num_heads": 4})
