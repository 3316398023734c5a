"""What a training needs before its first step: processes, precision, model, parameters, compilation, memory, learning rate."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, compile_regions

from dit.config import Model, Runtime, Train
from dit.errors import UserError, is_out_of_memory
from dit.latents.cache import LatentCache
from dit.model.transformer import DiT
from dit.training.checkpoint import Checkpoint
from dit.training.init_model import InitModel
from dit.training.logging import MetricLogger
from dit.training.lora import add_adapters, trainable_parameters
from dit.training.sharding import is_sharded, shard
from dit.utils.hardware import has_fast_bf16

WARM_UP_SHARE = 10  # a warm-up is at most one tenth of the steps, so that a short run reaches the learning rate that is set
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def choose_precision(wanted: str, log: Callable[[str], None], resumed_from: str | None = None) -> str:
    """Return `train.mixed_precision` if this machine can do it; a CPU without bf16 instructions trains in fp32 and logs so.

    Args:
        wanted: the setting.
        log: called with a line where another precision is taken.
        resumed_from: the precision of the checkpoint that is resumed. Where bf16 is wanted it is kept, bf16 or the fp32 in its
            place, since another one leads to other weights; where another one is wanted, the setting counts.

    Raises:
        UserError: fp16 is wanted without a GPU.
    """
    if wanted == "bf16" and resumed_from in ("bf16", "no"):
        return resumed_from
    if torch.cuda.is_available():
        return wanted
    if wanted == "fp16":
        raise UserError("train.mixed_precision: fp16 needs a GPU; bf16 or no would be right on this machine")
    if wanted == "bf16" and not has_fast_bf16(torch.device("cpu")):
        log("this processor has no bf16 instructions: training in fp32")
        return "no"
    return wanted


def make_accelerator(train: Train, runtime: Runtime, logger: MetricLogger, resume: Checkpoint | None) -> Accelerator:
    """Prepare the processes and the precision, that of `resume` if there is one, and on a GPU what makes it fast or exact."""
    resumed_from = resume.record.get("precision") if resume else None
    (precision,) = broadcast_object_list([choose_precision(train.mixed_precision, logger.log_line, resumed_from)])
    keep_buffers = DistributedDataParallelKwargs(broadcast_buffers=False)  # the text's statistics never change
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[keep_buffers])
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        return accelerator
    torch.set_float32_matmul_precision("high")  # TF32 where bf16 is not asked for
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def build_model(cache: LatentCache, model: Model, seed: int) -> DiT:
    """Initialise a transformer that fits the cache; the same seed gives the same weights."""
    torch.manual_seed(seed)
    transformer = DiT(
        **asdict(model),
        in_channels=cache.latent_shape[0],
        cross_attention_dim=cache.cross_attention_dim,
        pooled_projection_dim=cache.pooled_projection_dim,
    )
    transformer.set_text_statistics(**cache.text_statistics)
    return transformer


def build_trainable(cache: LatentCache, model: Model, train: Train, init: InitModel | None) -> DiT:
    """Initialise the transformer that is trained: at random or with the weights of `init`; with adapters, if they are trained.

    Raises:
        UserError: `init` does not fit, or the transformer has no layers of the names that adapters are wanted for.
    """
    transformer = build_model(cache, model, train.seed)
    if init:
        init.load_into(transformer)
    if train.method == "lora":
        add_adapters(transformer, train.lora, train.seed)
    return transformer


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters that are trained: matrices decay; biases and norms do not."""
    parameters = trainable_parameters(model).values()
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def prepare_network(transformer: DiT, accelerator: Accelerator, sharding: str) -> torch.nn.Module:
    """Move `transformer` to its device, with all weights in each process or divided over them, and set its precision."""
    if sharding == "none" or accelerator.num_processes == 1:
        return accelerator.prepare_model(transformer)
    shard(transformer.to(accelerator.device), accelerator.device, accelerator.num_processes)
    return accelerator.prepare_model(transformer, device_placement=False, evaluation_mode=True)  # without DDP


def compile_network(
    network: torch.nn.Module, wanted: bool | str, device: torch.device, log: Callable[[str], None]
) -> Callable[..., torch.Tensor]:
    """Compile the network for each shape that training has, its blocks but once; with "auto" on a GPU alone.

    Of the default recipe it takes a quarter of a minute on a CPU, as a whole more than a minute. Compiled code needs a C++
    compiler; without one, training runs uncompiled and logs so.
    """
    if not wanted or (wanted == "auto" and device.type == "cpu"):
        return network
    if not shutil.which(os.environ.get("CXX", "g++")):
        log("no C++ compiler was found, so the transformer is not compiled")
        return network
    if is_sharded(next(network.parameters())):
        # In place, since a copy gathers no weights; and without what gathers: whole blocks, compiled, learned other weights.
        for block in cast(DiT, network).blocks:
            for part in (block.attn, block.mlp):
                cast(torch.nn.Module, part).compile(dynamic=False)
        return network
    return compile_regions(network, dynamic=False)


def warmup_steps(train: Train, total_steps: int) -> int:
    """Return for how many steps of a training the learning rate rises."""
    return min(train.warmup_steps, total_steps // WARM_UP_SHARE)


def learning_rate_factor(kind: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the peak learning rate at `step` (0 <= step < total_steps), in [0, 1].

    Linear warm-up, then `kind`: cosine, linear or constant; 0 is reached after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one, instead of returning it to the system.

    A step on a CPU frees gigabytes and allocates them again, and each time the kernel has to find, clear and map them page by
    page: a step of the 768 wide transformer took 1.2 to 1.35 times as long (batches of 8). With another C library nothing
    changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:  # there is no glibc here
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def largest_batch_that_fits(attempt: Callable[[int], None], size: int) -> int:
    """Return the largest of size / 2, size / 4, … with which `attempt` does not run out of memory; 0 if there is none."""
    while size > 1:
        size //= 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            attempt(size)
            return size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    return 0


def oom_message(train: Train, fits: int) -> str:
    """Word what to set where `train.batch_size` does not fit into memory and `fits` images do."""
    problem = f"train.batch_size: {train.batch_size} images need more memory than there is"
    more_time = "" if train.gradient_checkpointing else ", or set train.gradient_checkpointing to true (a third more time)"
    if not fits:
        return f"{problem}, and so does a single one; take a smaller model or a larger patch_size{more_time}"
    micro_batches = -(-train.batch_size // fits) * train.gradient_accumulation_steps
    return (
        f"{problem}; {fits} fit: with train.gradient_accumulation_steps {micro_batches} a step is of as many images as before"
        f"{more_time}"
    )
