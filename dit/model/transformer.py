"""The Diffusion Transformer: patchify -> N blocks -> unpatchify, on VAE latents, conditioned on time and text.

Shapes in comments: N images, C latent channels, H x W latents, T = (H / p)(W / p) image tokens of width D in h heads of
size d, L text tokens of width E, P the width of the pooled text vector.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from dit.model.convolutions import Head, Stem, stem_and_head_flops
from dit.model.norm import layer_norm
from dit.model.positions import (
    NUM_FREQUENCIES,
    TIMESTEP_FREQUENCIES,
    apply_rotary_emb,
    rope_freqs,
    sincos_pos_embed,
    timestep_embedding,
)

MLP_RATIO = 4
# Below it an error of the image would count for ever more: there, the last layer's target is partly the noise.
SMALLEST_TIMESTEP = 0.25
# What the parameters and the settings were called up to version 0.1: exported and registered models of then still load.
OLD_MODULES = {
    "patch": "x_embedder",
    "place": "pos_embed",
    "time": "t_embedder",
    "pooled": "pooled_embedder",
    "modulation": "final_layer.adaLN_modulation",
    "unpatch": "final_layer.linear",
}
OLD_BLOCK_MODULES = {"attention": "attn", "cross_attention": "cross_attn", "modulation": "adaLN_modulation"}
SMALL_AT_FIRST = ("t_embedder.0.weight", "t_embedder.2.weight", "pooled_embedder.weight", "final_layer.linear.weight")
OLD_CONFIG = {"text_size": "cross_attention_dim", "pooled_size": "pooled_projection_dim"}


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale `x` (N, T, D) by 1 + `scale` and add `shift`, each (N, D)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Normalise `x` (N, T, D) and `modulate` it; on a GPU what is normalised is computed again on the way back, as in `MLP`."""
    if should_checkpoint_activations(x):
        return checkpoint(_modulated_norm, x, shift, scale, use_reentrant=False, preserve_rng_state=False)
    return _modulated_norm(x, shift, scale)


def _modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return modulate(layer_norm(x), shift, scale)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attend from `q` (N, h, T, d) to `k` and `v` (N, h, L, d), fused on a GPU.

    On a CPU the fused backward pass took 2.4 times as long as the plain one (96 x 16 tokens, width 192, bf16, 2 cores); and
    the plain one, unless told otherwise, computes bf16 in fp32, which adds 10 % to a whole step.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled():
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # it holds for CPUs, too
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class QKNorm(nn.Module):
    """Layer norm of queries or keys over each head, without bias (Dehghani et al. 2023, arXiv:2302.05442, section 2.2).

    RMS norm is not fused on CPUs, and a whole training step took 14 % longer with it.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` (N, h, T, d) over d."""
        return layer_norm(x, self.weight)


class SelfAttention(nn.Module):
    """Multi-head self-attention with normalised queries and keys and 2-D rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.norm_q = QKNorm(hidden_size // num_heads)
        self.norm_k = QKNorm(hidden_size // num_heads)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Attend among the image tokens `x` (N, T, D); `rotary` as `rope_freqs` returns it."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, h, T, d)
        q = apply_rotary_emb(self.norm_q(q), rotary)
        k = apply_rotary_emb(self.norm_k(k), rotary)
        x = attend(q, k, v)  # (N, h, T, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T, D)


class CrossAttention(nn.Module):
    """Image tokens look at text tokens. The text's keys and values depend on nothing else, so they can be kept."""

    def __init__(self, hidden_size: int, num_heads: int, cross_attention_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv = nn.Linear(cross_attention_dim, 2 * hidden_size, bias=False)
        self.norm_q = QKNorm(hidden_size // num_heads)
        self.norm_k = QKNorm(hidden_size // num_heads)
        self.out = nn.Linear(hidden_size, hidden_size)

    def keys_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (N, h, L, d) of `text` (N, L, E)."""
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, h, L, d)
        return self.norm_k(k), v

    def forward(self, x: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Attend from `x` (N, T, D) to the text; `mask` (N, L) is True where there is a token."""
        k, v = keys_values
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, h, T, d)
        x = attend(self.norm_q(q), k, v, mask[:, None, None])  # (N, h, T, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (N, T, D)


class MLP(nn.Sequential):
    """Two linear layers and a GELU.

    On a GPU what the GELU returns, the widest tensor of a block, is computed again on the way back rather than kept: a compiled
    step of 96 images of the default size then keeps 14.3 GB of activations instead of 17.4 (counted, see
    docs/performance.md). A CPU has memory enough and keeps it.
    """

    def __init__(self, hidden_size: int):
        super().__init__(
            nn.Linear(hidden_size, MLP_RATIO * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_RATIO * hidden_size, hidden_size),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each token of `x` (N, T, D)."""
        x = self[0](x)  # (N, T, 4 D)
        if should_checkpoint_activations(x):
            return checkpoint(self._second_half, x, use_reentrant=False, preserve_rng_state=False)
        return self._second_half(x)

    def _second_half(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](x))


def should_checkpoint_activations(x: torch.Tensor) -> bool:
    """Return whether memory counts for more than time where `x` is."""
    return x.is_cuda and torch.is_grad_enabled()


class Block(nn.Module):
    """Self-attention, cross-attention, MLP, each under adaLN-Zero (Peebles and Xie 2023, section 3.2).

    With cross-attention under it, too, what a patch asks of the text depends on how noisy the image is and on the whole
    caption: after 600 steps of the default recipe 47 % of images were right instead of 43 %.
    """

    def __init__(self, hidden_size: int, num_heads: int, cross_attention_dim: int):
        super().__init__()
        self.attn = SelfAttention(hidden_size, num_heads)
        self.cross_attn = CrossAttention(hidden_size, num_heads, cross_attention_dim)
        self.mlp = MLP(hidden_size)
        self.adaLN_modulation = nn.Linear(hidden_size, 9 * hidden_size)

    def forward(self, x, condition, keys_values, mask, rotary) -> torch.Tensor:
        """Apply the block to `x` (N, T, D) under `condition` (N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.adaLN_modulation(condition).chunk(9, dim=-1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulated_norm(x, shift1, scale1), rotary))  # (N, T, D)
        x = torch.addcmul(x, gate2[:, None], self.cross_attn(modulated_norm(x, shift2, scale2), keys_values, mask))
        return torch.addcmul(x, gate3[:, None], self.mlp(modulated_norm(x, shift3, scale3)))  # (N, T, D)


class FinalLayer(nn.Module):
    """Layer norm under adaLN, then a linear layer to the pixels of a patch (Peebles and Xie 2023, section 3.2)."""

    def __init__(self, hidden_size: int, patch_channels: int):
        super().__init__()
        self.adaLN_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, patch_channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Project tokens `x` (N, T, D) to patches (N, T, p * p * C) under `condition` (N, D)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))  # (N, T, p * p * C)


class DiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text-to-image Diffusion Transformer.

    Args:
        in_channels: channels of the latents, 4 or 16.
        patch_size: side of the square of latents that becomes one token.
        hidden_size: width D; a multiple of 4 x num_heads.
        num_layers: number of blocks.
        num_heads: attention heads.
        cross_attention_dim: width E of the text tokens.
        pooled_projection_dim: width P of the pooled text vector.
        conv_channels: of the convolutions before and after the blocks, at the latents' own resolution; 0 for none.
        output: what the last layer predicts. "velocity": the objective's target. "image", of a flow alone: the image, from which
            the velocity follows (Li and He 2025, arXiv:2511.13720). Noise need not pass through the network then, which helps
            where a token is not much narrower than `hidden_size`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers reads a list)
    _keep_in_fp32_modules = ["tokens_mean", "tokens_std", "pooled_mean", "pooled_std"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 768,
        num_layers: int = 16,
        num_heads: int = 12,
        cross_attention_dim: int = 768,
        pooled_projection_dim: int = 768,
        conv_channels: int = 0,
        output: str = "velocity",
    ):
        super().__init__()
        self.gradient_checkpointing = False
        features = conv_channels or in_channels
        self.stem = Stem(in_channels, conv_channels, hidden_size) if conv_channels else None
        self.x_embedder = nn.Conv2d(features, hidden_size, patch_size, stride=patch_size)
        self.pos_embed = nn.Linear(4 * NUM_FREQUENCIES, hidden_size)
        self.t_embedder = nn.Sequential(
            nn.Linear(TIMESTEP_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.pooled_embedder = nn.Linear(pooled_projection_dim, hidden_size)
        for name, size in (("tokens", cross_attention_dim), ("pooled", pooled_projection_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, cross_attention_dim) for _ in range(num_layers))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * features)
        self.head = Head(conv_channels, in_channels, hidden_size) if conv_channels else None
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialise: Xavier for every matrix; zero for every adaLN and for the last layer, so that blocks start as identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last = "head.conv_out.weight" if self.head else "final_layer.linear.weight"
        for name, parameter in self.named_parameters():
            if name.endswith("adaLN_modulation.weight") or name == last:
                nn.init.zeros_(parameter)
            elif name in SMALL_AT_FIRST:
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple:
        """Read a config.json, also one of version 0.1 (see `OLD_CONFIG`)."""
        config_dict = {OLD_CONFIG.get(name, name): value for name, value in config_dict.items()}
        return super().extract_init_dict(config_dict, **kwargs)

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Rename the weights of version 0.1; diffusers calls this on everything that it loads."""
        for name in list(state_dict):
            state_dict[current_name(name)] = state_dict.pop(name)

    def set_text_statistics(
        self, tokens_mean: torch.Tensor, tokens_std: torch.Tensor, pooled_mean: torch.Tensor, pooled_std: torch.Tensor
    ) -> None:
        """Set mean and standard deviation of every channel of the text, (E,) and (P,), by which it is standardised from now on.

        They are saved with the weights. The mean makes up most of the length of a CLIP's tokens, 95 % in the bundled one:
        unless it is subtracted, all keys are alike, and cross-attention does not learn to choose among them.
        """
        for name, value in (
            ("tokens_mean", tokens_mean),
            ("tokens_std", tokens_std),
            ("pooled_mean", pooled_mean),
            ("pooled_std", pooled_std),
        ):
            getattr(self, name).copy_(value)

    def text_keys_values(self, text: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return every block's keys and values of `text` (N, L, E): compute once per prompt, reuse over all sampling steps."""
        text = ((text - self.tokens_mean) / self.tokens_std).to(self.x_embedder.weight.dtype)
        return [cast(Block, block).cross_attn.keys_values(text) for block in self.blocks]

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor | None,
        text_mask: torch.Tensor,
        pooled: torch.Tensor,
        keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Predict the objective's target, by default the velocity noise - image.

        Args:
            latents: (N, C, H, W), noisy; H and W multiples of the patch size. All inputs are cast to the weights' dtype.
            timesteps: (N,) in [0, 1], 1 is pure noise.
            text: (N, L, E) text tokens; may be None where `keys_values` is given.
            text_mask: (N, L) bool, True where there is a token.
            pooled: (N, P) pooled text.
            keys_values: what `text_keys_values(text)` returned.

        Returns:
            (N, C, H, W), float32.
        """
        _, _, height, width = latents.shape
        p, dtype = self.config.patch_size, self.x_embedder.weight.dtype  # ModelMixin.dtype goes through all weights
        if height % p or width % p:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {p} x {p}")
        height, width = height // p, width // p
        if keys_values is None:
            if text is None:
                raise ValueError("text: needed where keys_values is not given")
            keys_values = self.text_keys_values(text)
        t = self.t_embedder(timestep_embedding(timesteps).to(dtype))  # (N, D)
        pooled = ((pooled - self.pooled_mean) / self.pooled_std).to(dtype)
        condition = F.silu(t + self.pooled_embedder(pooled))  # (N, D)
        features = latents.to(dtype)
        if self.stem:
            features = self.stem(features, condition)  # (N, K, H, W)
        x = self.x_embedder(features).flatten(2).transpose(1, 2)  # (N, T, D)
        x = x + self.pos_embed(sincos_pos_embed(height, width, x.device).to(dtype))
        rotary = rope_freqs(height, width, self.config.hidden_size // self.config.num_heads, x.device)  # (2, T, d / 2)
        for block, kv in zip(self.blocks, keys_values, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition, kv, text_mask, rotary)
            else:
                x = block(x, condition, kv, text_mask, rotary)  # (N, T, D)
        x = self.final_layer(x, condition)  # (N, T, p * p * C), of K instead of C channels where there is a head
        x = x.unflatten(1, (height, width)).unflatten(-1, (p, p, -1))  # (N, H / p, W / p, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (N, C, H, W)
        if self.head:
            x = self.head(features + x, condition)
        if self.config.output == "image":
            return (latents.float() - x.float()) / timesteps.float().clamp(min=SMALLEST_TIMESTEP)[:, None, None, None]
        return x.float()


def current_name(name: str) -> str:
    """Return what the parameter that version 0.1 called `name` is called now."""
    parts = name.split(".")
    if parts[0] == "blocks":
        parts[2] = OLD_BLOCK_MODULES.get(parts[2], parts[2])
    else:
        parts[0] = OLD_MODULES.get(parts[0], parts[0])
    return ".".join(parts)


def forward_flops(model: DiT, latent_size: tuple[int, int], text_tokens: int) -> int:
    """Count the floating-point operations of one image's forward pass, matrix products only (a multiply-add counts as two).

    A training step costs three times as much: once forward, twice backward.
    """
    c = model.config
    d, tokens = c.hidden_size, latent_size[0] * latent_size[1] // c.patch_size**2
    per_token = 4 * d * d + 2 * d * d + 2 * MLP_RATIO * d * d + 2 * tokens * d + 2 * text_tokens * d
    per_block = tokens * per_token + text_tokens * 2 * c.cross_attention_dim * d + 9 * d * d
    patches = 2 * tokens * d * c.patch_size**2 * (c.conv_channels or c.in_channels) + tokens * 4 * NUM_FREQUENCIES * d
    convolutions = stem_and_head_flops(latent_size, c.in_channels, c.conv_channels, d) if c.conv_channels else 0
    once = TIMESTEP_FREQUENCIES * d + d * d + c.pooled_projection_dim * d + 2 * d * d
    return 2 * (c.num_layers * per_block + patches + convolutions + once)
