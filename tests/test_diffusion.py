"""Rectified flow against cases that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dit import diffusion


def test_the_path_runs_from_image_to_noise_at_constant_velocity():
    image, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert torch.equal(diffusion.add_noise(image, noise, torch.zeros(3)), image)
    assert torch.equal(diffusion.add_noise(image, noise, torch.ones(3)), noise)
    later, earlier = (diffusion.add_noise(image, noise, torch.full((3,), t)) for t in (0.75, 0.25))
    assert torch.allclose((later - earlier) / 0.5, diffusion.velocity(image, noise), atol=1e-5)


def test_the_loss_is_zero_for_the_right_velocity_alone():
    image, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    assert not diffusion.loss(noise - image, image, noise).any()
    assert torch.allclose(diffusion.loss(noise - image + 2, image, noise), torch.full((3,), 4.0), atol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_timesteps_are_logit_normal(mean):
    t = diffusion.sample_timesteps(20_000, torch.Generator().manual_seed(0), mean)
    logits = torch.logit(t)
    assert t.min() > 0 and t.max() < 1
    assert abs(logits.mean() - mean) < 0.03 and abs(logits.std() - 1) < 0.03


def test_the_integrator_carries_noise_to_a_gaussian_that_is_known_in_closed_form():
    """For images from N(m, s^2) the ideal velocity is E[noise - x | x_t]; its flow maps z to m + s z."""
    mean, deviation = 3.0, 0.5

    def ideal(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        t = timesteps[:, None, None, None]
        variance = (1 - t) ** 2 * deviation**2 + t**2
        surprise = (x - (1 - t) * mean) / variance
        return t * surprise - (mean + (1 - t) * deviation**2 * surprise)

    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    result = diffusion.integrate(ideal, noise, 500)
    assert torch.allclose(result, mean + deviation * noise, atol=0.02)


def test_guidance_of_one_is_the_conditional_prediction_and_more_goes_beyond():
    conditional, unconditional = torch.tensor(2.0), torch.tensor(1.0)
    assert diffusion.guide(conditional, unconditional, 1.0) == 2
    assert diffusion.guide(conditional, unconditional, 3.0) == 4
