"""Both objectives against cases that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dit.model.loss import diffusion_loss
from dit.model.objectives import DDPM, Flow, apply_cfg, euler_sample, make_objective
from helpers.gaussian import DEVIATION, MEAN, ideal

OBJECTIVES = [Flow(), DDPM("epsilon"), DDPM("v_prediction")]


def some(count: int = 3):
    source = torch.Generator().manual_seed(0)
    return (torch.randn(count, 4, 2, 2, generator=source) for _ in range(2))


def test_flow_has_constant_velocity():
    image, noise = some()
    flow = Flow()
    assert torch.equal(flow.add_noise(image, noise, torch.zeros(3)), image)
    assert torch.equal(flow.add_noise(image, noise, torch.ones(3)), noise)
    later, earlier = (flow.add_noise(image, noise, torch.full((3,), t)) for t in (0.75, 0.25))
    assert torch.allclose((later - earlier) / 0.5, flow.target(image, noise, torch.zeros(3)), atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_ddpm_keeps_variance_and_ends_in_noise(objective):
    image, noise = torch.randn(2, 4000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.3, 0.999):
        assert abs(objective.add_noise(image, noise, torch.full((4000,), t)).var() - 1) < 0.02
    assert (objective.add_noise(image, noise, torch.full((4000,), 0.999)) - noise).abs().max() < 0.05
    assert (objective.add_noise(image, noise, torch.zeros(4000)) - image).abs().max() < 0.06


def loss_of(objective, prediction, image, noise, t) -> torch.Tensor:
    """The loss of a network that predicts `prediction`."""
    text = torch.zeros(len(t), 1, 1)
    return diffusion_loss(lambda *_: prediction, objective, image, noise, t, text, text[..., 0] > 0, text[..., 0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_diffusion_loss_is_zero_for_right_prediction(objective):
    image, noise = some()
    t = torch.tensor([0.2, 0.5, 0.9])
    target = objective.target(image, noise, t)
    assert not loss_of(objective, target, image, noise, t).any()
    assert torch.allclose(loss_of(objective, target + 2, image, noise, t), torch.full((3,), 4.0), atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_to_x0_and_noise(objective):
    image, noise = some()
    t = torch.tensor([0.2, 0.5, 0.7])
    found = objective.to_x0_and_noise(objective.target(image, noise, t), objective.add_noise(image, noise, t), t)
    assert torch.allclose(found[0], image, atol=1e-3) and torch.allclose(found[1], noise, atol=1e-3)


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_flow_timesteps_are_logit_normal(mean):
    t = Flow(mean).timesteps(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    logits = torch.logit(t)
    assert t.min() > 0 and t.max() < 1
    assert abs(logits.mean() - mean) < 0.03 and abs(logits.std() - 1) < 0.03


@pytest.mark.parametrize("mean", [0.0, 1.1])
def test_ddpm_noise_levels_come_as_often_as_flow(mean):
    """The log signal-to-noise ratio of a flow, 2 log((1 - t) / t), has the mean -2 m and the deviation 2."""
    objective = DDPM("epsilon", logit_mean=mean)
    t = objective.timesteps((torch.arange(5000) + 0.5) / 5000)
    assert torch.allclose(t * 1000, (t * 1000).round(), atol=1e-3) and t.min() >= 0 and t.max() <= 0.999
    kept, added = objective.alpha_sigma(t)
    ratio = 2 * (kept / added).log()
    assert abs(ratio.mean() + 2 * mean) < 0.05 and abs(ratio.std() - 2) < 0.1
    assert objective.timesteps(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 0.999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_min_snr_weight(prediction_type):
    """An error e in the prediction is one of e added / kept (epsilon) or e added (v) in the image."""
    objective = DDPM(prediction_type, snr_gamma=5.0)
    t = torch.tensor([0.01, 0.1, 0.3, 0.8])
    kept, added = (share.flatten() for share in objective.alpha_sigma(t))
    snr = (kept / added) ** 2
    of_image = added / kept if prediction_type == "epsilon" else added
    assert torch.allclose(objective.weight(t), snr.clamp(max=5) * of_image**2, rtol=1e-3)
    assert snr[0] > 5 > snr[2]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_euler_sample_reaches_known_gaussian(objective):
    """The way from noise z of an ideal prediction ends at MEAN + DEVIATION z."""
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    result = euler_sample(objective, ideal(objective), noise, 500)
    assert torch.allclose(result, MEAN + DEVIATION * noise, atol=0.03)


def test_flow_loss_has_closed_form_for_gaussian():
    """The ideal prediction's error is the variance of noise - image given x_t: s^2 / ((1 - t)^2 s^2 + t^2)."""
    flow, count = Flow(), 40_000
    source = torch.Generator().manual_seed(0)
    image = MEAN + DEVIATION * torch.randn(count, 1, 1, 1, generator=source)
    noise = torch.randn(count, 1, 1, 1, generator=source)
    for level in (0.1, 0.5, 0.9):
        t = torch.full((count,), level)
        loss = loss_of(flow, ideal(flow)(flow.add_noise(image, noise, t), t), image, noise, t).mean()
        assert loss == pytest.approx(DEVIATION**2 / ((1 - level) ** 2 * DEVIATION**2 + level**2), rel=0.03)


def test_make_objective():
    assert make_objective("flow", "epsilon", None, 1.1).logit_mean == 1.1
    assert make_objective("ddpm", "epsilon", 5.0).snr_gamma == 5.0
    assert make_objective("flow", "epsilon").prediction_type == "flow_prediction"


def test_apply_cfg():
    conditional, unconditional = torch.tensor(2.0), torch.tensor(1.0)
    assert apply_cfg(conditional, unconditional, 1.0) == 2
    assert apply_cfg(conditional, unconditional, 3.0) == 4
