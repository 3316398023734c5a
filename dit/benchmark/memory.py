"""How much of a GPU's memory each stage needs, counted without a GPU.

The real networks run on torch's meta device, where tensors have a size and no numbers, and `LiveBytes` adds up those that are
alive. `PretendGPU` makes them go the way that they go on a GPU. Counted is what is in use when most is: at the end of the forward
pass, after which gradients come as activations go, or with gradient checkpointing at the end of the backward pass.

Not counted: CUDA itself (`CUDA_BYTES`), the workspaces of its libraries, and what is lost between blocks. Compiled networks keep
less for the backward pass (docs/performance.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from dit.config import Params
from dit.encoders.loading import PRECISIONS
from dit.evaluation.clip import BATCH_SIZE as FEATURES_AT_ONCE
from dit.evaluation.losses import BATCH_SIZE as LOSSES_AT_ONCE
from dit.latents.cache import CLIP_TOKENS
from dit.latents.device_cache import SHARE
from dit.model.loss import diffusion_loss
from dit.model.objectives import make_objective
from dit.model.transformer import DiT
from dit.training.lora import add_adapters, trainable_parameters
from dit.training.setup import DTYPES
from dit.training.trainer import PREVIEW_IMAGES
from dit.utils.autoencoder import AT_ONCE, HAS_POSTERIOR, decode_latents, encode_grid, vae_factor

META, GPU = torch.device("meta"), torch.device("cuda")
CAPTION_TOKENS = 16  # of a caption in the cache, start and end included; COCO's have 13
CUDA_BYTES = 0.6e9  # of CUDA itself, about, whatever is computed
RTX_4090 = 24e9  # bytes
BLOCK = 512  # bytes: CUDA's allocator hands out multiples of it
# What autocast does on a GPU (torch.amp's documentation).
IN_16_BITS = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.addmm, torch.baddbmm)
IN_FLOAT32 = (F.group_norm, F.softmax, torch.softmax, F.mse_loss)
IN_THE_WIDEST = (torch.addcmul, torch.cat, torch.stack)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive: `now`, and `peak`, the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func` and count the storages of what it returns that are new."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """Stands for the fused attention of a GPU, which keeps its inputs, its output and a number per query, nothing per pair."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Make the output (N, h, T, d) for `q` (N, h, T, d), `k` and `v` (N, h, L, d)."""
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, torch.empty(q.shape[:-1], device=META))
        return output


class PretendGPU(TorchFunctionMode):
    """Makes tensors on the meta device say that they are on a GPU, and treats them as there.

    Args:
        dtype: of autocast; None without it.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call `func` as autocast and a GPU's kernels would."""
        kwargs = dict(kwargs or {})
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # that `func` reads, if it reads one
        if attribute in ("is_cuda", "device"):
            return True if attribute == "is_cuda" else GPU
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        if func is torch.Tensor.to:
            args = tuple(META if isinstance(value, torch.device) else value for value in args)
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*(_to_dtype(value, self.dtype) for value in args[:3]))
        if self.dtype:
            args, kwargs = self._autocast(func, (args, kwargs))
        return func(*args, **kwargs)

    def _autocast(self, func: Callable, inputs: tuple[tuple, dict]) -> tuple[tuple, dict]:
        if func in IN_16_BITS:
            return _to_dtype(inputs, self.dtype)
        found = {value.dtype for value in tree_iter(inputs) if isinstance(value, torch.Tensor) and value.is_floating_point()}
        if func in IN_FLOAT32 or (func in IN_THE_WIDEST and len(found) > 1):
            return _to_dtype(inputs, torch.float32)
        return inputs


def _to_dtype(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return tree_map_only(torch.Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, tree)


def _convert(network: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(network.eval(), dtype)  # diffusers' own `to` warns of modules that it would rather keep in float32


@contextmanager
def counting(autocast: torch.dtype | None = None) -> Iterator[LiveBytes]:
    """Count what is alive of all that is made in the block, on a GPU that is not there."""
    with LiveBytes() as live, META, PretendGPU(autocast):
        yield live


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training: what stays, what the forward pass adds at most, gradients, and weights, which stay, too."""

    stays: int
    forward: int
    gradients: int
    weights: int

    @property
    def divisible(self) -> int:
        """Return the bytes that sharding divides: weights, moments and EMA."""
        return self.weights + 3 * self.gradients


class StageMemory:
    """Counts the bytes of every stage that a recipe has.

    Args:
        params: the settings.
        vae: the configuration of its autoencoder, as in its config.json.
        clip: that of its CLIP.
        images: how many are in the cache; 0 if it is not known.
        gpu_bytes: of the GPU's memory, of which the latent cache may have `SHARE`.
    """

    def __init__(self, params: Params, vae: dict[str, Any], clip: dict[str, Any], images: int, gpu_bytes: float = RTX_4090):
        self.params, self.recipe = params, params.active
        self.vae_config, self.clip_config, self.images, self.gpu_bytes = vae, clip, images, gpu_bytes
        side = self.recipe.encode.image_size
        self.pixels = (3, side, side)
        self.latent = (vae["latent_channels"], side // vae_factor(vae), side // vae_factor(vae))
        text = clip.get("text_config", clip)
        self.text_size = text.get("hidden_size", 512)
        self.pooled_size = clip.get("projection_dim", text.get("projection_dim", 512))
        self.autocast = None if params.train.mixed_precision == "no" else DTYPES[params.train.mixed_precision]
        count = params.runtime.num_processes
        self.processes = 1 if count == "auto" else count

    def count(self) -> dict[str, int]:
        """Return the most bytes that each stage needs at once, by its name."""
        return {
            "encode": self.encode(),
            "train": self.train(),
            "validate": self.validate(),
            "preview": self.preview(),
            "sample": self.sample(),
            "evaluate": self.evaluate(),
        }

    def encode(self) -> int:
        """Count both encoders, and a batch of images and of captions in them."""
        settings, dtype = self.recipe.encode, PRECISIONS[self.recipe.encode.precision]
        with counting() as live, torch.no_grad():
            vae, text = self._vae(dtype), self._text(dtype)
            if settings.vae_slicing:
                vae.enable_slicing()
            if settings.vae_tiling:
                vae.enable_tiling()
            images = torch.empty(settings.batch_size, *self.pixels, dtype=dtype)
            encode_grid(vae, images[:2] if settings.vae_slicing else images)  # of those that go one by one, two are enough
            text(input_ids=torch.zeros(settings.batch_size, CLIP_TOKENS, dtype=torch.long))
            self._decode(vae, settings.batch_size)  # reconstructions
        return live.peak

    def train(self) -> int:
        """Count what stays, and what the forward pass keeps, or gradients and a block: its activations are the last to go.

        Several processes share a batch; with `runtime.sharding` they share weights, gradients, moments and EMA, too, and two
        blocks are whole at a time: one is computed, the next one gathered.
        """
        checkpointing = self.params.train.gradient_checkpointing
        whole = self.training_memory(self.recipe.model.num_layers, checkpointing)
        two, one = self.training_memory(2), self.training_memory(1)
        block, gradients, stays = two.forward - one.forward, whole.gradients, whole.stays
        if self.params.runtime.sharding == "full" and self.processes > 1:
            stays -= whole.divisible - whole.divisible // self.processes - 2 * (two.weights - one.weights)
            gradients //= self.processes
        return stays + (whole.forward + gradients + block if checkpointing else max(whole.forward, gradients + block))

    def validate(self) -> int:
        """Count what stays of a training, and a batch without gradients."""
        with counting(self.autocast) as live:
            network, _kept = self._training_state(self.recipe.model.num_layers)
            with torch.no_grad():
                self._loss(network, self.params.train.batch_size)
        return live.peak

    def preview(self) -> int:
        """Count what stays of a training, and a sheet of images with and without their captions."""
        with counting(self.autocast) as live, torch.no_grad():
            network, kept = self._training_state(self.recipe.model.num_layers)
            self._predict(network, 2 * PREVIEW_IMAGES)
            self._decode(kept["vae"], PREVIEW_IMAGES)
        return live.peak

    def sample(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Count the pipeline, its transformer in `dtype`, its encoders in float32, and a batch with and without captions."""
        count = self.params.sample.batch_size
        with counting() as live, torch.no_grad():
            network, vae, text = _convert(self._network(self.recipe.model.num_layers), dtype), self._vae(), self._text()
            text(input_ids=torch.zeros(2 * count, CLIP_TOKENS, dtype=torch.long))
            self._predict(network, 2 * count)
            self._decode(vae, count)
        return live.peak

    def evaluate(self) -> int:
        """Count CLIP on a batch of images; then, beside it, the transformer on a batch of the validation set."""
        from transformers import CLIPConfig, CLIPModel

        with counting() as live, torch.no_grad():
            clip = CLIPModel(CLIPConfig.from_dict(self.clip_config)) if "vision_config" in self.clip_config else self._text()
            if isinstance(clip, CLIPModel):
                side = clip.config.vision_config.image_size
                clip.get_image_features(torch.empty(FEATURES_AT_ONCE, 3, side, side))
            self._loss(self._network(self.recipe.model.num_layers), LOSSES_AT_ONCE)
        return live.peak

    def training_memory(self, layers: int, checkpointing: bool = False) -> TrainingMemory:
        """Count the parts of a training of so many layers, in one process, not sharded."""
        with counting(self.autocast) as live:
            network, _kept = self._training_state(layers)
            if checkpointing:
                network.enable_gradient_checkpointing()
            stays = live.now
            _loss = self._loss(network, -(-self.params.train.batch_size // self.processes))
        weights = sum(parameter.numel() * parameter.itemsize for parameter in network.parameters())
        gradients = sum(parameter.numel() * parameter.itemsize for parameter in trainable_parameters(network).values())
        return TrainingMemory(stays, live.peak - stays, gradients, weights)

    def _training_state(self, layers: int) -> tuple[DiT, dict[str, Any]]:
        """Make what is there all the time: weights, AdamW's moments, EMA, the previews' VAE and, if it is small, the cache."""
        train = self.params.train
        network = self._network(layers)
        if train.method == "lora":
            add_adapters(network, train.lora, train.seed)
        trained = list(trainable_parameters(network).values())
        kept: dict[str, Any] = {"state": [torch.empty_like(each) for each in trained for _ in range(3)], "vae": self._vae()}
        cache = self.images * self.bytes_of_image()
        if cache <= SHARE * self.gpu_bytes:
            kept["cache"] = torch.empty(cache, dtype=torch.uint8)
        return network, kept

    def bytes_of_image(self) -> int:
        """Return what the cache holds of an image: latents of all crops and their mirror images, captions of usual length."""
        encode = self.recipe.encode
        channels, height, width = self.latent
        grids = 2 * (1 + encode.crops) * (1 + HAS_POSTERIOR[self.vae_config["_class_name"]])
        captions = getattr(self.recipe.data, "captions_per_image", 1)
        return 2 * (grids * channels * height * width + captions * (CAPTION_TOKENS * self.text_size + self.pooled_size))

    def _network(self, layers: int) -> DiT:
        model = asdict(replace(self.recipe.model, num_layers=layers))
        sizes = {"cross_attention_dim": self.text_size, "pooled_projection_dim": self.pooled_size}
        return DiT(**model, in_channels=self.latent[0], **sizes)

    def _vae(self, dtype: torch.dtype = torch.float32) -> Any:
        import diffusers

        return _convert(getattr(diffusers, self.vae_config["_class_name"]).from_config(self.vae_config), dtype)

    def _text(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = self.clip_config.get("text_config", self.clip_config) | {"projection_dim": self.pooled_size}
        return _convert(CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)), dtype)

    def _loss(self, network: DiT, count: int) -> torch.Tensor:
        objective = make_objective(self.params.train.objective, "flow_prediction")
        latents, noise = torch.empty(count, *self.latent), torch.empty(count, *self.latent)
        return diffusion_loss(network, objective, latents, noise, torch.empty(count), *self._conditions(count)).sum()

    def _decode(self, vae: Any, count: int) -> None:
        """Make `count` images; of those that `decode_latents` decodes one after the other, the first are enough."""
        _images = torch.empty(count, *self.pixels)
        at_once = max(1, AT_ONCE // (self.pixels[1] * self.pixels[2]))
        decode_latents(vae, torch.empty(min(count, at_once), *self.latent))

    def _predict(self, network: DiT, count: int) -> torch.Tensor:
        return network(torch.empty(count, *self.latent), torch.empty(count), *self._conditions(count))

    def _conditions(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        text = torch.empty(count, CLIP_TOKENS, self.text_size)
        return text, torch.ones(count, CLIP_TOKENS, dtype=torch.bool), torch.empty(count, self.pooled_size)
