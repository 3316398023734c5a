"""Training steps to compare: this model's, those of diffusers' transformers, and one that encodes its batch first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dit.config import VAE_FACTOR, Model
from dit.latents.cache import CLIP_TOKENS
from dit.model.transformer import DiT
from dit.training.setup import compile_network, parameter_groups

LATENT = (4, 32, 32)  # of 256 pixels
TEXT_SIZE = 768  # of openai/clip-vit-large-patch14
Step = Callable[[], None]


class TrainingStep:
    """A step as the trainer makes it, around any network: autocast, forward, backward, clipping, fused AdamW.

    Args:
        network: whose parameters are trained.
        forward: returns its prediction for fixed inputs.
        dtype: of autocast; float32 for none.
        device: where the network is.
    """

    def __init__(self, network: torch.nn.Module, forward: Callable[[], torch.Tensor], dtype: torch.dtype, device: torch.device):
        self.network, self.forward, self.dtype, self.device = network, forward, dtype, device
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.optimizer = torch.optim.AdamW(parameter_groups(network, 0.01), lr=1e-4, fused=True)
        self.target = torch.randn(1, device=device)

    def __call__(self) -> None:
        """Make the step."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.forward()
        F.mse_loss(prediction.float(), self.target.expand_as(prediction)).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state_bytes(self) -> int:
        """Bytes of the float32 weights and AdamW's two moments."""
        return 3 * 4 * self.parameters


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
        """Sample the inputs of `batch` images, with captions of 8 to `tokens` tokens."""
        latents = torch.randn(batch, *LATENT, device=device)
        lengths = torch.randint(8, tokens + 1, (batch, 1), device=device)
        text = torch.randn(batch, tokens, TEXT_SIZE, device=device)
        mask = torch.arange(tokens, device=device)[None] < lengths
        return cls(latents, torch.rand(batch, device=device), text, mask, torch.randn(batch, TEXT_SIZE, device=device))


def own_network(model: Model) -> DiT:
    """Make this project's transformer, for the latents and text embeddings of `Inputs`."""
    return DiT(**asdict(model), in_channels=LATENT[0], cross_attention_dim=TEXT_SIZE, pooled_projection_dim=TEXT_SIZE)


def own_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """Make a step of this project's transformer."""
    device = inputs.latents.device
    network = own_network(model).to(device)
    run = compile_network(network, compiled, device, print)
    arguments = (inputs.latents, inputs.timesteps, inputs.text, inputs.mask, inputs.pooled)
    return TrainingStep(network, lambda: run(*arguments), dtype, device)


def pixart_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """Make a step of PixArt-alpha's transformer: cross-attention, one shared adaLN (Chen et al. 2023, arXiv:2310.00426)."""
    network = PixArtTransformer2DModel(
        **_diffusers_size(model),
        cross_attention_dim=model.hidden_size,
        caption_channels=TEXT_SIZE,
        use_additional_conditions=False,
    )
    arguments = {
        "timestep": 1000 * inputs.timesteps,
        "encoder_hidden_states": inputs.text,
        "encoder_attention_mask": inputs.mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return _diffusers_step(network, inputs, arguments, dtype, compiled)


def class_dit_step(model: Model, inputs: Inputs, dtype: torch.dtype, compiled: bool) -> TrainingStep:
    """Make a step of diffusers' DiT (Peebles and Xie 2022, arXiv:2212.09748): a class for each image, no cross-attention."""
    labels = torch.randint(0, 1000, (len(inputs.latents),), device=inputs.latents.device)
    arguments = {"timestep": (1000 * inputs.timesteps).long(), "class_labels": labels}
    return _diffusers_step(DiTTransformer2DModel(**_diffusers_size(model)), inputs, arguments, dtype, compiled)


def _diffusers_size(model: Model) -> dict[str, int]:
    return {
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "num_layers": model.num_layers,
        "sample_size": LATENT[1],
        "patch_size": model.patch_size,
    }


def _diffusers_step(
    network: torch.nn.Module, inputs: Inputs, arguments: dict[str, Any], dtype: torch.dtype, compiled: bool
) -> TrainingStep:
    device = inputs.latents.device
    run = compile_network(network.to(device), compiled, device, print)
    return TrainingStep(network, lambda: run(inputs.latents, **arguments, return_dict=False)[0], dtype, device)


def untrained_encoders(**vocabulary: int) -> tuple[AutoencoderKL, CLIPTextModelWithProjection]:
    """Make untrained encoders of the shapes of stabilityai/sd-vae-ft-mse and openai/clip-vit-large-patch14's text side.

    Args:
        vocabulary: `vocab_size`, `bos_token_id` and `eos_token_id` of another tokenizer than CLIP's.
    """
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    size = {"hidden_size": TEXT_SIZE, "intermediate_size": 4 * TEXT_SIZE, "projection_dim": TEXT_SIZE}
    return vae, CLIPTextModelWithProjection(CLIPTextConfig(**size, **vocabulary, num_hidden_layers=12, num_attention_heads=12))


def encode_first(step: Step, batch: int, dtype: torch.dtype, device: torch.device) -> Step:
    """Let `step` encode `batch` 256-pixel images and captions of 77 tokens before, as the tutorial does at every step."""
    vae, clip = untrained_encoders()
    for network in (vae, clip):  # diffusers' own `to` warns of modules that it would rather keep in fp32, of which there are none
        torch.nn.Module.to(network.eval(), device, dtype)
    images = torch.randn(batch, 3, VAE_FACTOR * LATENT[1], VAE_FACTOR * LATENT[2], device=device, dtype=dtype)
    captions = torch.randint(0, clip.config.vocab_size - 2, (batch, CLIP_TOKENS), device=device)

    def encode_and_step() -> None:
        with torch.no_grad():
            vae.encode(images).latent_dist.sample()
            clip(input_ids=captions)
        step()

    return encode_and_step


def count_flops(forward: Callable[[], torch.Tensor]) -> int:
    """Count the floating-point operations of a forward pass as torch does: matrix products alone."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def attention_kernels(step: TrainingStep) -> list[str]:
    """Return which of torch's implementations of attention a step uses, as its profiler names them."""
    activities = [ProfilerActivity.CPU]  # where they are called from, whatever they run on
    with profile(activities=activities) as seen, torch.autocast(step.device.type, step.dtype):
        step.forward()
    names = {event.key.removeprefix("aten::_scaled_dot_product_") for event in seen.key_averages()}
    return sorted(name for name in names if "attention" in name and "::" not in name)
