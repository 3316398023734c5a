"""Training steps to compare: this model's, those of diffusers' transformers, and what the tutorial does before each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTTransformer2DModel, PixArtTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dit.config import VAE_FACTOR, Model
from dit.model.transformer import DiT
from dit.training.setup import compile_network, parameter_groups

LATENT = (4, 32, 32)  # of 256 pixels
TEXT_SIZE = 768  # of openai/clip-vit-large-patch14
Step = Callable[[], None]


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
    size = {"cross_attention_dim": TEXT_SIZE, "pooled_projection_dim": TEXT_SIZE}
    network = DiT(LATENT[0], model.patch_size, model.hidden_size, model.num_layers, model.num_heads, **size).to(device)
    run = compile_network(network, compiled, device, print)
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
    run = compile_network(network, compiled, device, print)
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
    run = compile_network(network, compiled, device, print)
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
    clip = CLIPTextModelWithProjection(config)
    for network in (vae, clip):  # diffusers' own `to` warns of modules that it would rather keep in fp32, of which there are none
        torch.nn.Module.to(network.eval(), device, dtype)
    pictures = torch.randn(batch, 3, VAE_FACTOR * LATENT[1], VAE_FACTOR * LATENT[2], device=device, dtype=dtype)
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
