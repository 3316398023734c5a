"""The networks of the race, called alike: this project's transformer, PixArt's, and a SiT with cross-attention.

Each is given what it takes of the same text: all the standardised tokens, this project's the pooled vector, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from dit.config import Params
from dit.latents.cache import LatentCache
from dit.training.setup import build_model


class Peer(nn.Module):
    """What both have that standardises the text tokens, as `DiT` does: what is compared is not who knows of their mean."""

    def __init__(self, cache: LatentCache):
        super().__init__()
        for name in ("tokens_mean", "tokens_std"):
            self.register_buffer(name, torch.as_tensor(cache.text_statistics[name]))

    def standardize(self, text: torch.Tensor) -> torch.Tensor:
        """Give every channel of `text` (N, L, E) mean 0 and deviation 1 over the training set."""
        return (text - cast(torch.Tensor, self.tokens_mean)) / cast(torch.Tensor, self.tokens_std)


class PixArt(Peer):
    """PixArt-alpha's transformer as diffusers has it: cross-attention, one shared adaLN (Chen et al. 2023, arXiv:2310.00426)."""

    def __init__(self, cache: LatentCache, params: Params):
        super().__init__(cache)
        model = params.active.model
        channels, side, _ = cache.latent_shape
        self.network = PixArtTransformer2DModel(
            num_attention_heads=model.num_heads,
            attention_head_dim=model.hidden_size // model.num_heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=model.num_layers,
            sample_size=side,
            patch_size=model.patch_size,
            cross_attention_dim=model.hidden_size,
            caption_channels=cache.cross_attention_dim,
            use_additional_conditions=False,
        )

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Predict as `DiT.forward` does, from arguments of the same shapes; `pooled` is not looked at."""
        nothing, mask = {"resolution": None, "aspect_ratio": None}, text_mask.to(latents.dtype)
        text = self.standardize(text)
        return self.network(latents, text, 1000 * timesteps, nothing, encoder_attention_mask=mask, return_dict=False)[0]


class SiT(Peer):
    """SiT's blocks (Ma et al. 2024, arXiv:2401.08740), DiT's with adaLN-Zero, each with a cross-attention to the text.

    The last layer has no adaLN of its own.
    """

    def __init__(self, cache: LatentCache, params: Params):
        super().__init__(cache)
        model, (channels, side, _) = params.active.model, cache.latent_shape
        width, self.patch_size = model.hidden_size, model.patch_size
        self.x_embedder = PatchEmbed(side, side, self.patch_size, channels, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                model.num_heads,
                width // model.num_heads,
                cross_attention_dim=cache.cross_attention_dim,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1,
                attention_bias=True,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
            for _ in range(model.num_layers)
        )
        for block in cast(Any, self.blocks):  # each begins as identity, as in Peebles and Xie 2023, and there are no classes
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
            nn.init.zeros_(block.attn2.to_out[0].weight)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, self.patch_size**2 * channels)
        nn.init.zeros_(self.linear.weight)

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Predict as `DiT.forward` does, from arguments of the same shapes; `pooled` is not looked at."""
        height, width = (side // self.patch_size for side in latents.shape[2:])
        text = self.standardize(text)
        bias = torch.where(text_mask, 0.0, -10_000.0)[:, None]  # (N, 1, L), which is added to the scores
        x, label = self.x_embedder(latents), torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        for block in self.blocks:
            x = block(
                x,
                encoder_hidden_states=text,
                encoder_attention_mask=bias,
                timestep=1000 * timesteps,
                class_labels=label,
            )
        x = self.linear(self.norm(x)).unflatten(1, (height, width)).unflatten(-1, (self.patch_size, self.patch_size, -1))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def this_project(cache: LatentCache, params: Params) -> nn.Module:
    """Return this project's transformer."""
    return build_model(cache, params.active.model, params.train.seed)


PEERS: dict[str, Callable[[LatentCache, Params], nn.Module]] = {"this-model": this_project, "pixart": PixArt, "sit": SiT}
