"""What users of diffusers' pipelines expect: schedules, rescaled guidance, offloading, tiling, the order of arguments."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import PixArtSigmaPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from dit.errors import UserError
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.shapes.render import render
from dit.shapes.scene import Object, Scene
from helpers import REPO
from helpers.small_models import CHANNELS, euler_pipeline, generate_latents


@pytest.fixture(scope="module")
def pipeline(model) -> DiTTextToImagePipeline:
    return euler_pipeline(model)


# Schedules of one's own


def levels_seen(pipeline, **settings) -> list[float]:
    seen = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[1][0].item()))
    try:
        generate_latents(pipeline, "a red circle", **settings)
    finally:
        handle.remove()
    return [round(level, 3) for level in seen]


@pytest.mark.parametrize(
    ("scheduler", "schedule", "expected"),
    [
        ("euler", {"sigmas": [1.0, 0.7, 0.1]}, [1.0, 0.7, 0.1]),
        ("euler", {"sigmas": np.array([1.0, 0.7])}, [1.0, 0.7]),
        ("euler", {"sigmas": torch.tensor([0.9, 0.5])}, [0.9, 0.5]),
        ("euler", {"timesteps": [1000, 700, 100]}, [1.0, 0.7, 0.1]),
        ("unipc", {"sigmas": [1.0, 0.7, 0.1]}, [1.0, 0.7, 0.1]),
        ("stochastic", {"sigmas": [1.0, 0.5]}, [1.0, 0.667]),  # which shifts them by 2, as it does its own
        ("stochastic", {"timesteps": [1000, 500]}, [1.0, 0.667]),
    ],
)
def test_schedule_of_a_flow(pipeline, monkeypatch, scheduler, schedule, expected):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(scheduler, "flow_prediction"))
    assert levels_seen(pipeline, **schedule, num_inference_steps=50) == expected


def test_schedule_equals_that_of_the_scheduler(pipeline):
    expected = generate_latents(pipeline, "a red circle", num_inference_steps=4)
    assert torch.equal(generate_latents(pipeline, "a red circle", sigmas=[1.0, 0.75, 0.5, 0.25]), expected)


def test_schedule_and_strength(pipeline):
    image = torch.zeros(3, 64, 64)
    assert levels_seen(pipeline, sigmas=[1.0, 0.6, 0.4, 0.2], image=image, strength=0.5) == [0.4, 0.2]


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory) -> DiTTextToImagePipeline:
    from helpers.small_models import save

    folder = tmp_path_factory.mktemp("ddpm")
    save(folder, objective="ddpm", prediction_type="epsilon")
    pipeline = DiTTextToImagePipeline.from_pretrained(folder / "dit")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("scheduler", "schedule", "expected"),
    [
        ("euler", {"timesteps": [999, 500, 0]}, [0.999, 0.5, 0.0]),
        ("dpm++", {"timesteps": [999, 500, 100]}, [0.999, 0.5, 0.1]),
        ("heun", {"timesteps": [999, 500]}, [0.999, 0.5, 0.5]),  # two evaluations for each step but the last
        ("stochastic", {"timesteps": [999, 499]}, [0.999, 0.499]),
    ],
)
def test_schedule_of_a_ddpm(ddpm, monkeypatch, scheduler, schedule, expected):
    monkeypatch.setattr(ddpm, "scheduler", make_scheduler(scheduler, "epsilon"))
    assert levels_seen(ddpm, **schedule) == expected


def test_sigmas_of_a_ddpm(ddpm, monkeypatch):
    """In the scale of EulerDiscreteScheduler: noise over image, and the last one is where the last step ends."""
    monkeypatch.setattr(ddpm, "scheduler", make_scheduler("euler", "epsilon"))
    levels = levels_seen(ddpm, sigmas=[100.0, 1.0, 0.0])
    alphas = ddpm.scheduler.alphas_cumprod
    expected = [float(((1 - alphas) / alphas).sqrt().sub(sigma).abs().argmin()) / 1000 for sigma in (100.0, 1.0)]
    assert levels == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("scheduler", "schedule", "message"),
    [
        ("euler", {"sigmas": [1.0], "timesteps": [1000]}, "timesteps, sigmas: both are given"),
        ("euler", {"sigmas": []}, "numbers that fall from 1 at most to above 0"),
        ("euler", {"sigmas": [0.5, 0.7]}, "numbers that fall from 1"),
        ("euler", {"sigmas": [0.5, 0.5]}, "numbers that fall from 1"),
        ("euler", {"sigmas": [1.0, 0.0]}, "to above 0 would be right"),
        ("euler", {"sigmas": [float("nan"), 0.5]}, "numbers that fall from 1"),
        ("euler", {"sigmas": ["a"]}, "numbers that fall from 1"),
        ("euler", {"sigmas": 3}, "sigmas: 3; numbers that fall from 1"),
        ("euler", {"timesteps": [1001, 5]}, "numbers that fall from 1000 at most"),
        ("heun", {"sigmas": [1.0, 0.5]}, "FlowMatchHeunDiscreteScheduler takes no schedule in them; it has one of its own"),
        ("dpm++", {"timesteps": [900, 500]}, "DPMSolverMultistepScheduler takes no schedule in them; it has one of its own"),
        ("unipc", {"timesteps": [900, 500]}, "UniPCMultistepScheduler takes no schedule in them; sigmas would be right, or the"),
    ],
)
def test_schedule_of_a_flow_is_refused(pipeline, monkeypatch, scheduler, schedule, message):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(scheduler, "flow_prediction"))
    with pytest.raises(UserError, match=message) as caught:
        generate_latents(pipeline, "a red circle", **schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "schedule", "message"),
    [
        ("ddim", {"timesteps": [900, 500]}, "DDIMScheduler takes no schedule in them"),
        (
            "unipc",
            {"sigmas": [10.0, 1.0]},
            "sigmas: UniPCMultistepScheduler refuses them .* only supported when `use_flow_sigmas",
        ),
        ("euler", {"timesteps": [1000]}, "numbers that fall from 999 at most to 0 at least"),
        ("euler", {"sigmas": [100.0]}, r"sigmas: \[100.0\] are no step; EulerDiscreteScheduler goes from each to the next"),
    ],
)
def test_schedule_of_a_ddpm_is_refused(ddpm, monkeypatch, scheduler, schedule, message):
    monkeypatch.setattr(ddpm, "scheduler", make_scheduler(scheduler, "epsilon"))
    with pytest.raises(UserError, match=message):
        generate_latents(ddpm, "a red circle", **schedule)


# Guidance that keeps the contrast


def test_guidance_rescale(pipeline):
    """At 1 the guided prediction has the standard deviation of the one with the caption (Lin et al. 2023, equations 15, 16)."""
    from dit.model.objectives import apply_cfg

    noise = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"sigmas": [1.0], "latents": noise}  # a step from 1 to 0: the prediction is noise - latents
    plain, none, full, half = (
        noise - generate_latents(pipeline, "a red circle", **settings, guidance_rescale=r) for r in (0.0, 0, 1.0, 0.5)
    )
    conditional = noise - generate_latents(pipeline, "a red circle", **settings, guidance_scale=1.0)
    empty = noise - generate_latents(pipeline, "", **settings, guidance_scale=1.0)
    assert torch.equal(plain, none) and torch.allclose(plain, apply_cfg(conditional, empty, 4.0), atol=1e-4)
    assert torch.allclose(full, plain * conditional.std() / plain.std(), atol=1e-4)
    assert torch.allclose(half, (plain + full) / 2, atol=1e-4)
    assert not torch.allclose(plain, full, atol=1e-2)


# Memory


def test_model_cpu_offload_generates_the_same(model):
    """With accelerate's real hooks and the CPU as the device; tests/integration/test_gpu.py has a GPU."""
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(64, 64)
    mask[20:40] = 1
    calls = [{}, {"image": image, "strength": 0.7}, {"image": image, "mask_image": mask}]
    expected = [generate_latents(pipeline, "a red circle", output_type="pt", **settings) for settings in calls]
    pipeline.enable_model_cpu_offload(device="cpu")
    for settings, image in zip(calls * 2, expected * 2, strict=True):
        assert torch.equal(generate_latents(pipeline, "a red circle", output_type="pt", **settings), image)
    assert all(hasattr(pipeline.components[name], "_hf_hook") for name in pipeline.model_cpu_offload_seq.split("->"))


def test_model_cpu_offload_brings_each_network_before_its_use(model, monkeypatch):
    """Also where a method other than `forward` is called, which accelerate's hooks do not see."""
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.enable_model_cpu_offload(device="cpu")
    events, bring = [], CpuOffload.pre_forward

    def pre_forward(hook, module, *args, **kwargs):
        events.append(("brought", module))
        return bring(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", pre_forward)
    uses = {
        pipeline.text_encoder: [pipeline.text_encoder.text_projection],
        pipeline.transformer: [pipeline.transformer.blocks[0].cross_attn.kv, pipeline.transformer.x_embedder],
        pipeline.vae: [pipeline.vae.encoder, pipeline.vae.decoder],
    }
    for network, parts in uses.items():
        for part in parts:
            part.register_forward_pre_hook(lambda *given, network=network: events.append(("used", network)))
    generate_latents(pipeline, "a red circle", image=torch.zeros(3, 64, 64), strength=1.0, output_type="pt")
    for network, parts in uses.items():
        own = [event for event, module in events if module is network]
        assert own[0] == "brought" and own.count("used") >= len(parts)


def test_vae_tiling(pipeline):
    """Tiles of 64 pixels, the VAE's own size: an image of that size is one tile; a larger one differs by some grey levels."""
    scene = render(Scene((Object("red", "circle", "large"),), ((0.25, 0.75),), (0.2025,), "cream"))
    four = Image.new("RGB", (128, 128))
    for corner in ((0, 0), (0, 64), (64, 0), (64, 64)):
        four.paste(scene, corner)
    settings = [
        {"image": image, "height": image.height, "width": image.width, "strength": 0.0, "output_type": "pt"}
        for image in (scene, four)
    ]
    before = [generate_latents(pipeline, "a red circle", **each) for each in settings]
    pipeline.enable_vae_tiling()
    tiled = [generate_latents(pipeline, "a red circle", **each) for each in settings]
    pipeline.disable_vae_tiling()
    after = [generate_latents(pipeline, "a red circle", **each) for each in settings]
    assert torch.equal(tiled[0], before[0]) and all(map(torch.equal, before, after))
    pixels = torch.from_numpy(np.array(four)).permute(2, 0, 1) / 255
    assert 0 < (tiled[1] - before[1]).abs().mean() < 0.03 and (tiled[1] - pixels).abs().mean() < 0.03


# The order of arguments, and the table in docs/generation.md

OURS, SD, SD3, PIXART = (
    list(inspect.signature(kind.__call__).parameters)[1:]
    for kind in (DiTTextToImagePipeline, StableDiffusionPipeline, StableDiffusion3Pipeline, PixArtSigmaPipeline)
)


def test_height_is_the_second_argument(pipeline):
    assert OURS[:4] == SD[:4] == ["prompt", "height", "width", "num_inference_steps"]
    assert torch.equal(
        generate_latents(pipeline, "a red circle", 96, 64), generate_latents(pipeline, "a red circle", height=96, width=64)
    )


@pytest.mark.parametrize("theirs", [SD, SD3])
def test_shared_arguments_have_one_order(theirs):
    parameters = inspect.signature(DiTTextToImagePipeline.__call__).parameters
    shared = [name for name in OURS if name in theirs and parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if theirs is SD:  # it has `output_type, return_dict, cross_attention_kwargs, guidance_rescale, …`: all are in that order
        assert "guidance_rescale" in shared
    assert shared == [name for name in theirs if name in shared] and len(shared) >= 16


def table() -> list[list[str]]:
    """Rows of the table of arguments: name, PixArt, SD3, here, remark."""
    page = (REPO / "docs" / "generation.md").read_text(encoding="utf-8")
    section = page.split("\n## Arguments beside PixArt's and SD3's\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*$", section, re.MULTILINE)]


def test_table_of_arguments_is_that_of_the_installed_diffusers():
    named = [(re.findall(r"`(\w+)`", row[0]), row[1:]) for row in table()]
    for column, arguments in enumerate((PIXART, SD3, OURS)):
        listed = [name for names, cells in named for name in names if cells[column] == "yes"]
        assert sorted(listed) == sorted(arguments), f"column {column + 2}"
    assert all(cell in ("yes", "") for _, cells in named for cell in cells[:3])


def test_table_gives_a_reason_for_each_argument_that_is_missing_here():
    assert [row[0] for row in table() if not row[3] and len(row[4].split()) < 3] == []
