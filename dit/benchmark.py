"""How fast training is, beside what the hardware could do, beside its peers, and beside encoding at every step.

Everything is measured in one run and alternately, since the speed of machines drifts; of each the fastest step counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dit.config import Model, Params
from dit.latents import LatentCache
from dit.model import DiT, forward_flops
from dit.synthetic import write_synthetic
from dit.throughput import matmul_peak
from dit.training.checkpoint import Checkpoints, open_checkpoint
from dit.training.journal import Silent
from dit.training.loop import DTYPES, choose_precision, compile_whole, parameter_groups, train_transformer
from dit.training.memory import keep_freed_memory

LATENT = (4, 32, 32)  # of 256 pixels
TEXT_SIZE = 768  # of openai/clip-vit-large-patch14
Step = Callable[[], None]


@dataclass
class Row:
    """One line of the table; times in seconds, `share` of the matmul peak, memory in GB (of a GPU; None on a CPU)."""

    name: str
    images_per_second: float
    seconds_per_step: float
    share: float | None
    peak_memory: float | None
    ratio: float  # this model's bare images/s to this row's


class TrainingStep:
    """A step as the loop makes it, around any network: autocast, forward, backward, clipping, fused AdamW.

    Args:
        network: whose parameters are trained.
        forward: returns its prediction for some fixed inputs.
    """

    def __init__(self, network: torch.nn.Module, forward: Callable[[], torch.Tensor], dtype: torch.dtype, device: torch.device):
        self.network, self.forward, self.dtype, self.device = network, forward, dtype, device
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.optimizer = torch.optim.AdamW(parameter_groups(network, 0.01), lr=1e-4, fused=True)
        self.target = torch.randn(1, device=device)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.forward()
        F.mse_loss(prediction.float(), self.target.expand_as(prediction)).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def held(self) -> int:
        """Bytes that it holds between steps: weights and two moments."""
        return 3 * 4 * self.parameters


def count_flops(forward: Callable[[], torch.Tensor]) -> int:
    """Floating-point operations of a forward pass, as torch counts them: matrix products alone."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


@dataclass
class Inputs:
    """Random inputs of a batch: latents (B, 4, 32, 32), timesteps (B,), text (B, L, E), mask (B, L), pooled (B, E)."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    def random(cls, batch: int, tokens: int, device: torch.device) -> Inputs:
        latents = torch.randn(batch, *LATENT, device=device)
        lengths = torch.randint(8, tokens + 1, (batch, 1), device=device)
        text = torch.randn(batch, tokens, TEXT_SIZE, device=device)
        mask = torch.arange(tokens, device=device)[None] < lengths
        return cls(latents, torch.rand(batch, device=device), text, mask, torch.randn(batch, TEXT_SIZE, device=device))


def own_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """This project's transformer."""
    device = inputs.latents.device
    size = {"text_size": TEXT_SIZE, "pooled_size": TEXT_SIZE}
    network = DiT(LATENT[0], model.patch_size, model.hidden_size, model.num_layers, model.num_heads, **size).to(device)
    run = compile_whole(network, compiled, device, print)
    arguments = (inputs.latents, inputs.timesteps, inputs.text, inputs.mask, inputs.pooled)
    return TrainingStep(network, lambda: run(*arguments), dtype, device)


def pixart_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """PixArt-alpha's transformer: cross-attention to text, one shared adaLN (Chen et al. 2023, arXiv:2310.00426)."""
    device = inputs.latents.device
    network = PixArtTransformer2DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.hidden_size // model.num_heads,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=model.num_layers,
        cross_attention_dim=model.hidden_size,
        sample_size=LATENT[1],
        patch_size=model.patch_size,
        caption_channels=TEXT_SIZE,
        use_additional_conditions=False,
    ).to(device)
    run = compile_whole(network, compiled, device, print)
    sizes = {"resolution": None, "aspect_ratio": None}
    arguments = {"timestep": 1000 * inputs.timesteps, "encoder_attention_mask": inputs.mask, "added_cond_kwargs": sizes}

    def forward() -> torch.Tensor:
        return run(inputs.latents, encoder_hidden_states=inputs.text, return_dict=False, **arguments)[0]

    return TrainingStep(network, forward, dtype, device)


def dit_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """The DiT of Peebles and Xie as diffusers has it: conditioned on a class alone, no cross-attention."""
    device = inputs.latents.device
    network = DiTTransformer2DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.hidden_size // model.num_heads,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=model.num_layers,
        sample_size=LATENT[1],
        patch_size=model.patch_size,
    ).to(device)
    run = compile_whole(network, compiled, device, print)
    labels = torch.randint(0, 1000, (len(inputs.latents),), device=device)
    times = (1000 * inputs.timesteps).long()

    def forward() -> torch.Tensor:
        return run(inputs.latents, timestep=times, class_labels=labels, return_dict=False)[0]

    return TrainingStep(network, forward, dtype, device)


def encoding(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Step:
    """What the tutorial does before each step: 256-pixel pictures and captions through untrained encoders of the shapes of
    stabilityai/sd-vae-ft-mse and openai/clip-vit-large-patch14."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=down, up_block_types=up, layers_per_block=2)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    vae, clip = vae.to(device, dtype).eval(), CLIPTextModelWithProjection(config).to(device, dtype).eval()
    pictures = torch.randn(batch, 3, 8 * LATENT[1], 8 * LATENT[2], device=device, dtype=dtype)
    words = torch.randint(0, config.vocab_size - 2, (batch, 77), device=device)  # padded to 77, as there

    @torch.no_grad()
    def encode() -> None:
        vae.encode(pictures).latent_dist.sample()
        clip(input_ids=words)

    return encode


def encoding_first(step: Step, encode: Step) -> Step:
    """A step of the tutorial."""

    def both() -> None:
        encode()
        step()

    return both


def attention_kernels(step: TrainingStep) -> list[str]:
    """Which of torch's implementations of attention run in a step, as its profiler names them."""
    activities = [ProfilerActivity.CPU]  # where they are called from, whatever they run on
    with profile(activities=activities) as seen, torch.autocast(step.device.type, step.dtype):
        step.forward()
    names = {event.key.removeprefix("aten::_scaled_dot_product_") for event in seen.key_averages()}
    return sorted(name for name in names if "attention" in name and "::" not in name)


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
    """Images per second of `train_transformer` itself, on a synthetic cache, in the fastest of `steps` steps; and what a
    checkpoint costs."""
    rates: dict[int, float] = {}

    class Rates(Silent):
        def metrics(self, step: int, values: dict[str, float]) -> None:
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
        schedule = replace(params.active.schedule, num_epochs=1, compile_model=compiled)
        runtime = replace(params.runtime, log_every=1, sample_every=never, checkpoint_every=warm_up, deterministic=deterministic)
        checkpoints = Timed(Path(folder) / "state", 1)

        def decode(latents: torch.Tensor) -> list[Image.Image]:
            return [Image.new("RGB", (8, 8))] * len(latents)

        AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first training
        train_transformer(cache, model, schedule, train, runtime, Rates(), decode, checkpoints)
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
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
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
