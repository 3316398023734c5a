"""The one forward pass of the objective: training, validation and evaluation all measure their loss here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dit.model.objectives import Objective


def diffusion_loss(
    network: Callable[..., torch.Tensor],
    objective: Objective,
    latents: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Add noise, predict, and return the weighted mean squared error of each image: (N,) float32.

    Args:
        network: called as `DiT.forward`.
        objective: the path, the target and the weights.
        latents: (N, C, H, W), scaled as the diffusion model sees them.
        noise: (N, C, H, W), standard normal.
        t: (N,) timesteps in [0, 1], 1 is pure noise.
        text: (N, L, E) text tokens.
        text_mask: (N, L) bool, True where there is a token.
        pooled: (N, P) pooled text.
    """
    noisy = objective.add_noise(latents, noise, t)  # (N, C, H, W)
    prediction = network(noisy, t, text.float(), text_mask, pooled.float())  # (N, C, H, W)
    error = (prediction.float() - objective.target(latents, noise, t)).square().flatten(1).mean(1)  # (N,)
    return objective.weight(t) * error
