"""Every scheduler solves what is known in closed form, wastes no step, and is known by its name."""

from __future__ import annotations

import pytest
import torch

from dit.errors import UserError
from dit.model.objectives import make_objective
from dit.pipeline.schedulers import make_scheduler, scheduler_name, set_timesteps, timesteps_to_sigmas
from helpers.gaussian import DEVIATION, MEAN, ideal

SOLVERS = ["euler", "heun", "dpm++", "unipc"]
PAIRS = [(name, "flow_prediction") for name in SOLVERS] + [
    (name, kind) for name in [*SOLVERS, "ddim"] for kind in ("epsilon", "v_prediction")
]


@pytest.mark.parametrize(
    ("name", "steps", "says"),
    [
        ("stochastic", 1001, "1001 is more than the 1000 noise levels that there are"),
        ("dpm++", 1200, "1200 is more than the 1000 noise levels"),
        ("ddim", 300, "300 steps do not reach the image; 333 would, and euler takes any number"),
        ("ddim", 600, "600 steps do not reach the image; 1000 would"),
    ],
)
def test_steps_that_a_ddpm_cannot_take_are_refused(name, steps, says):
    with pytest.raises(UserError, match=says):
        set_timesteps(make_scheduler(name, "v_prediction"), steps)


@pytest.mark.parametrize("steps", [10, 30, 50, 60, 100, 250, 333, 500, 1000])
def test_the_steps_that_ddim_may_take_reach_the_image(steps):
    objective, scheduler = make_objective("ddpm", "v_prediction"), make_scheduler("ddim", "v_prediction")
    set_timesteps(scheduler, steps)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise
    for timestep, t in zip(scheduler.timesteps, timesteps_to_sigmas(scheduler), strict=True):
        x = scheduler.step(ideal(objective)(x, t[None]), timestep, x, return_dict=False)[0]
    assert (x - (MEAN + DEVIATION * noise)).abs().max() < (0.12 if steps >= 50 else 0.6)


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_every_solver_solves_what_is_known_in_closed_form(name, prediction_type):
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
def test_a_saved_scheduler_is_known_by_its_name(name, prediction_type, tmp_path):
    make_scheduler(name, prediction_type).save_pretrained(tmp_path)
    loaded = type(make_scheduler(name, prediction_type)).from_pretrained(tmp_path)
    assert scheduler_name(loaded) == name
    other = type(loaded).from_config(loaded.config, num_train_timesteps=500)
    assert scheduler_name(other) == type(loaded).__name__


@pytest.mark.parametrize("name", [*SOLVERS, "stochastic"])
@pytest.mark.parametrize("evaluations", [1, 2, 9, 30])
def test_no_step_is_spent_where_there_is_no_noise_left(name, evaluations):
    scheduler = make_scheduler(name, "flow_prediction")
    set_timesteps(scheduler, evaluations)
    times = timesteps_to_sigmas(scheduler)
    assert len(times) == ((evaluations + 1) // 2 * 2 - 1 if name == "heun" else evaluations)
    assert times[0] >= 0.999 and times[-1] > 0.8 / evaluations


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_a_flows_timesteps_are_the_noise_levels_and_not_rounded(name):
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
def test_the_stochastic_scheduler_of_ddpm_forgets_the_first_noise_too(prediction_type):
    objective, scheduler = make_objective("ddpm", prediction_type), make_scheduler("stochastic", prediction_type)
    set_timesteps(scheduler, 60)
    generator = torch.Generator().manual_seed(0)
    x = noise = torch.randn(1, 4, 32, 32, generator=generator)
    times = timesteps_to_sigmas(scheduler)
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(ideal(objective)(x, t[None]), timestep, x, return_dict=False, generator=generator)[0]
    variance = 1.0
    for t, following in zip(times, [*times[1:], None], strict=True):
        kept, added = objective.alpha_sigma(t[None])
        guess = (kept * DEVIATION**2 / (kept**2 * DEVIATION**2 + added**2)) ** 2 * variance
        variance = guess
        if following is not None:
            kept, added = objective.alpha_sigma(following[None])
            variance = kept**2 * guess + added**2
    assert abs(x.mean() - MEAN) < 0.03 and abs(x.std() / variance.sqrt() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.1


def test_the_stochastic_scheduler_draws_what_can_be_said_in_closed_form():
    """The same images: at each step the best guess of the image, whose variance is known, and fresh noise on it."""
    mean, deviation = 2.0, 0.5
    scheduler = make_scheduler("stochastic", "flow_prediction")
    set_timesteps(scheduler, 60)
    generator = torch.Generator().manual_seed(0)
    x = noise = torch.randn(1, 4, 32, 32, generator=generator)
    variance = 1.0
    for timestep, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:] / 1000, 0.0], strict=True):
        t = timestep / 1000
        surprise = (x - (1 - t) * mean) / ((1 - t) ** 2 * deviation**2 + t**2)
        v = t * surprise - (mean + (1 - t) * deviation**2 * surprise)
        x = scheduler.step(v, timestep, x, return_dict=False, generator=generator)[0]
        guess = ((1 - t) * deviation**2 / ((1 - t) ** 2 * deviation**2 + t**2)) ** 2 * variance
        variance = (1 - following) ** 2 * guess + following**2
    assert abs(x.mean() - mean) < 0.03 and abs(x.std() / variance**0.5 - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.1  # the first noise is forgotten


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(UserError, match="euler, heun"):
        make_scheduler("plms", "epsilon")
    with pytest.raises(UserError, match="ddim is for train.objective ddpm"):
        make_scheduler("ddim", "flow_prediction")
