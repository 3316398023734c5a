"""Every scheduler solves a problem with a known solution, wastes no step, and keeps its name."""

from __future__ import annotations

import pytest
import torch

from dit.errors import UserError
from dit.model.objectives import make_objective
from dit.pipeline.img2img import add_noise, get_timesteps
from dit.pipeline.schedulers import make_scheduler, scheduler_name, set_timesteps, timesteps_to_sigmas
from helpers.gaussian import DEVIATION, MEAN, ideal

SOLVERS = ["euler", "heun", "dpm++", "unipc"]
PAIRS = [(name, "flow_prediction") for name in SOLVERS] + [
    (name, kind) for name in [*SOLVERS, "ddim"] for kind in ("epsilon", "v_prediction")
]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("stochastic", 1001, "1001 is more than the 1000 noise levels that there are"),
        ("dpm++", 1200, "1200 is more than the 1000 noise levels"),
        ("ddim", 300, "300 steps do not reach the image; 333 would, and euler takes any number"),
        ("ddim", 600, "600 steps do not reach the image; 1000 would"),
    ],
)
def test_set_timesteps_refuses(name, steps, message):
    with pytest.raises(UserError, match=message):
        set_timesteps(make_scheduler(name, "v_prediction"), steps)


@pytest.mark.parametrize("steps", [10, 30, 50, 60, 100, 250, 333, 500, 1000])
def test_ddim_reaches_the_image(steps):
    objective, scheduler = make_objective("ddpm", "v_prediction"), make_scheduler("ddim", "v_prediction")
    set_timesteps(scheduler, steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise
    for timestep, t in zip(scheduler.timesteps, timesteps_to_sigmas(scheduler), strict=True):
        x = scheduler.step(ideal(objective)(x, t[None]), timestep, x, return_dict=False)[0]
    assert (x - (MEAN + DEVIATION * noise)).abs().max() < (0.12 if steps >= 50 else 0.6)


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_scheduler_solves_gaussian(name, prediction_type):
    """Images from N(m, s^2): the ideal prediction carries noise z to m + s z, unless it is taken for something else."""
    flow = prediction_type == "flow_prediction"
    objective = make_objective("flow" if flow else "ddpm", prediction_type)
    scheduler = make_scheduler(name, prediction_type)
    set_timesteps(scheduler, 60)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, evaluations = noise * getattr(scheduler, "init_noise_sigma", 1.0), 0
    for timestep, t in zip(scheduler.timesteps, timesteps_to_sigmas(scheduler), strict=True):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(ideal(objective)(seen, t[None]), timestep, x, return_dict=False)[0]
        evaluations += 1
    assert (x - (MEAN + DEVIATION * noise)).abs().max() < 0.12
    assert evaluations in (59, 60)


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_scheduler_solves_from_noisy_image(name, prediction_type):
    """Images from N(m, s^2): the ideal prediction carries x_t to m + s (x_t - a m) / sqrt(a^2 s^2 + b^2)."""
    objective = make_objective("flow" if prediction_type == "flow_prediction" else "ddpm", prediction_type)
    scheduler = make_scheduler(name, prediction_type)
    set_timesteps(scheduler, 80)
    times, first = timesteps_to_sigmas(scheduler), get_timesteps(scheduler, 0.6)
    assert 0.57 <= times[first] <= 0.6 + 1e-6
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    image, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = MEAN + DEVIATION * image
    x = add_noise(scheduler, image, noise, first)
    for k in range(first, len(times)):
        timestep = scheduler.timesteps[k]
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(ideal(objective)(seen, times[k][None]), timestep, x, return_dict=False)[0]
    kept, added = objective.alpha_sigma(times[first][None])
    expected = MEAN + DEVIATION * (added * noise + kept * (image - MEAN)) / (kept**2 * DEVIATION**2 + added**2).sqrt()
    assert (x - expected).abs().max() < 0.12
    assert torch.equal(add_noise(scheduler, image, noise, len(times)), image)


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_scheduler_name_survives_saving(name, prediction_type, tmp_path):
    scheduler = make_scheduler(name, prediction_type)
    scheduler.save_pretrained(tmp_path)
    assert scheduler_name(type(scheduler).from_pretrained(tmp_path)) == name


@pytest.mark.parametrize("name", [*SOLVERS, "stochastic"])
@pytest.mark.parametrize("evaluations", [1, 2, 9, 30])
def test_set_timesteps_spends_none_without_noise(name, evaluations):
    scheduler = make_scheduler(name, "flow_prediction")
    set_timesteps(scheduler, evaluations)
    times = timesteps_to_sigmas(scheduler)
    assert len(times) == ((evaluations + 1) // 2 * 2 - 1 if name == "heun" else evaluations)
    assert times[0] >= 0.999 and times[-1] > 0.8 / evaluations


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_timesteps_to_sigmas_of_flow_are_not_rounded(name):
    scheduler = make_scheduler(name, "flow_prediction")
    set_timesteps(scheduler, 7)
    assert torch.allclose(timesteps_to_sigmas(scheduler), scheduler.sigmas[:7].float())
    assert (timesteps_to_sigmas(scheduler) * 1000 - scheduler.timesteps).abs().max() > 0.1  # diffusers' own are


@pytest.mark.parametrize("name", [*SOLVERS, "stochastic"])
@pytest.mark.parametrize("evaluations", [5, 10, 30])
def test_flow_scheduler_ends_without_noise(name, evaluations):
    scheduler = make_scheduler(name, "flow_prediction")
    set_timesteps(scheduler, evaluations)
    assert scheduler.sigmas[-1] == 0 < scheduler.sigmas[-2]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stochastic_ddpm_forgets_the_first_noise(prediction_type):
    objective, scheduler = make_objective("ddpm", prediction_type), make_scheduler("stochastic", prediction_type)
    set_timesteps(scheduler, 60)
    generator = torch.Generator().manual_seed(0)
    x = noise = torch.randn(1, 4, 32, 32, generator=generator)
    times = timesteps_to_sigmas(scheduler)
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(ideal(objective)(x, t[None]), timestep, x, return_dict=False, generator=generator)[0]
    variance = 1.0
    for t, t_next in zip(times, [*times[1:], None], strict=True):
        kept, added = objective.alpha_sigma(t[None])
        guess = (kept * DEVIATION**2 / (kept**2 * DEVIATION**2 + added**2)) ** 2 * variance
        variance = guess
        if t_next is not None:
            kept, added = objective.alpha_sigma(t_next[None])
            variance = kept**2 * guess + added**2
    assert abs(x.mean() - MEAN) < 0.03 and abs(x.std() / variance.sqrt() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.1


def test_stochastic_flow_forgets_the_first_noise():
    """The same images: at each step the best guess of the image, whose variance is known, and fresh noise on it."""
    mean, deviation = 2.0, 0.5
    scheduler = make_scheduler("stochastic", "flow_prediction")
    set_timesteps(scheduler, 60)
    generator = torch.Generator().manual_seed(0)
    x = noise = torch.randn(1, 4, 32, 32, generator=generator)
    variance = 1.0
    for timestep, t_next in zip(scheduler.timesteps, [*scheduler.timesteps[1:] / 1000, 0.0], strict=True):
        t = timestep / 1000
        surprise = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
        v = t * surprise - (mean + (1 - t) * deviation**2 * surprise)
        x = scheduler.step(v, timestep, x, return_dict=False, generator=generator)[0]
        guess = ((1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)) ** 2 * variance
        variance = (1 - t_next) ** 2 * guess + t_next**2
    assert abs(x.mean() - mean) < 0.03 and abs(x.std() / variance**0.5 - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.1  # the first noise is forgotten


def test_make_scheduler_refuses():
    with pytest.raises(UserError, match="euler, heun"):
        make_scheduler("plms", "epsilon")
    with pytest.raises(UserError, match="ddim is for train.objective ddpm"):
        make_scheduler("ddim", "flow_prediction")
