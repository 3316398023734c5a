"""From text to pictures with the encoders in the box and a small random transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit.diffusion import make_objective
from dit.encoders import EncoderSource
from dit.errors import UserError
from dit.files import file_hash
from dit.pipeline import DiTTextToImagePipeline
from dit.schedulers import make_scheduler, model_times, scheduler_steps
from small_models import save
from test_diffusion import DEVIATION, MEAN, ideal

SOLVERS = ["euler", "heun", "dpm++", "unipc"]
PAIRS = [(name, "flow_prediction") for name in SOLVERS] + [
    (name, kind) for name in [*SOLVERS, "ddim"] for kind in ("epsilon", "v_prediction")
]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> DiTTextToImagePipeline:
    folder = tmp_path_factory.mktemp("model")
    save(folder)
    pipeline = DiTTextToImagePipeline.from_pretrained(folder / "dit")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, seeds, **settings) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in pipeline(prompts, generator=generators, num_inference_steps=4, **settings).images]


@pytest.mark.parametrize("scheduler", ["euler", "stochastic"])
def test_a_picture_depends_on_prompt_and_seed_and_not_on_its_neighbours(pipeline, scheduler, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(scheduler, "flow_prediction"))
    a, b, c = draw(pipeline, ["a red circle", "a red circle", "a blue star"], [1, 2, 1])
    assert a.shape == (64, 64, 3)
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    (alone,) = draw(pipeline, ["a red circle"], [1])
    assert np.abs(alone.astype(int) - a).max() <= 1  # the last bit of a matrix product may depend on the batch


def test_other_sizes_can_be_drawn_if_the_patches_divide_them(pipeline):
    assert draw(pipeline, ["a red circle"], [1], height=96, width=64)[0].shape == (96, 64, 3)
    with pytest.raises(UserError, match="multiples of 16"):
        draw(pipeline, ["a red circle"], [1], height=60)


def test_guidance_changes_the_picture_and_one_is_without(pipeline):
    with_guidance, without = (draw(pipeline, ["a red circle"], [1], guidance_scale=g)[0] for g in (4.0, 1.0))
    assert not np.array_equal(with_guidance, without)


@pytest.mark.parametrize(("name", "prediction_type"), PAIRS)
def test_every_solver_solves_what_is_known_in_closed_form(name, prediction_type):
    """Images from N(m, s^2): the ideal prediction carries noise z to m + s z, unless it is taken for something else."""
    flow = prediction_type == "flow_prediction"
    objective = make_objective("flow" if flow else "ddpm", prediction_type)
    scheduler = make_scheduler(name, prediction_type)
    scheduler.set_timesteps(scheduler_steps(scheduler, 60))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, evaluations = noise * getattr(scheduler, "init_noise_sigma", 1.0), 0
    for timestep, t in zip(scheduler.timesteps, model_times(scheduler), strict=True):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(ideal(objective)(seen, t[None]), timestep, x, return_dict=False)[0]
        evaluations += 1
    assert (x - (MEAN + DEVIATION * noise)).abs().max() < 0.12
    assert evaluations in (59, 60)


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_a_flows_timesteps_are_the_noise_levels_and_not_rounded(name):
    scheduler = make_scheduler(name, "flow_prediction")
    scheduler.set_timesteps(7)
    assert torch.allclose(model_times(scheduler), scheduler.sigmas[:7].float())
    assert (model_times(scheduler) * 1000 - scheduler.timesteps).abs().max() > 0.1  # diffusers' own are


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_stochastic_scheduler_of_ddpm_forgets_the_first_noise_too(prediction_type):
    objective, scheduler = make_objective("ddpm", prediction_type), make_scheduler("stochastic", prediction_type)
    scheduler.set_timesteps(60)
    generator = torch.Generator().manual_seed(0)
    x = noise = torch.randn(1, 4, 32, 32, generator=generator)
    times = model_times(scheduler)
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(ideal(objective)(x, t[None]), timestep, x, return_dict=False, generator=generator)[0]
    variance = 1.0
    for t, following in zip(times, [*times[1:], None], strict=True):
        kept, added = objective.path(t[None])
        guess = (kept * DEVIATION**2 / (kept**2 * DEVIATION**2 + added**2)) ** 2 * variance
        variance = guess
        if following is not None:
            kept, added = objective.path(following[None])
            variance = kept**2 * guess + added**2
    assert abs(x.mean() - MEAN) < 0.03 and abs(x.std() / variance.sqrt() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.1


def test_a_scheduler_that_takes_the_prediction_for_another_is_refused(pipeline, monkeypatch):
    from diffusers import DPMSolverMultistepScheduler

    monkeypatch.setattr(pipeline, "scheduler", DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config))
    with pytest.raises(UserError, match="trained for flow_prediction, and this DPMSolverMultistepScheduler takes .* epsilon"):
        pipeline("a red circle", num_inference_steps=2)


def test_the_stochastic_scheduler_draws_what_can_be_said_in_closed_form():
    """The same images: at each step the best guess of the image, whose variance is known, and fresh noise on it."""
    mean, deviation = 2.0, 0.5
    scheduler = make_scheduler("stochastic", "flow_prediction")
    scheduler.set_timesteps(60)
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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_model_of_ddpm_is_saved_loaded_and_drawn_with_as_one(tmp_path, prediction_type):
    save(tmp_path, objective="ddpm", prediction_type=prediction_type)
    pipeline = DiTTextToImagePipeline.from_pretrained(tmp_path / "dit")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.prediction_type == pipeline.scheduler.config.prediction_type == prediction_type
    (picture,) = draw(pipeline, ["a red circle"], [1])
    assert picture.shape == (64, 64, 3)
    assert "DDPM" in (tmp_path / "dit" / "README.md").read_text()


def test_the_model_folder_holds_no_pickle_and_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "dit").rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    for path in files:
        assert file_hash(tmp_path / "a" / path) == file_hash(tmp_path / "b" / path)


def test_a_folder_that_is_no_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="not a trained model"):
        DiTTextToImagePipeline.from_pretrained(tmp_path)


def test_the_pipeline_embeds_text_as_the_cache_does(pipeline):
    from dit.encoders.text import TextEncoder

    tokens, mask, pooled = pipeline.encode_prompt(["a red circle above a blue star"])
    encoder = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"))
    (row,), (vector,) = encoder.encode(["a red circle above a blue star"])
    assert torch.allclose(tokens[0][mask[0]].half(), row, atol=1e-3) and torch.allclose(pooled[0].half(), vector, atol=1e-3)
