"""From text to images with the bundled encoders and a small random transformer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from PIL import Image

import dit
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler, set_timesteps
from dit.utils.files import sha256_file
from helpers.small_models import CHANNELS, euler_pipeline, save

PLACES = [("a red circle", 0), ("a red circle", 1), ("a blue star", 2), ("a blue star", 3)]  # in a batch of two of each


@pytest.fixture(scope="module")
def pipeline(model) -> DiTTextToImagePipeline:
    return euler_pipeline(model)


def generate(pipeline, prompts, seeds, **settings) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in pipeline(prompts, generator=generators, num_inference_steps=4, **settings).images]


@pytest.mark.parametrize("scheduler", ["euler", "stochastic"])
def test_call_image_depends_on_prompt_and_seed_alone(pipeline, scheduler, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler(scheduler, "flow_prediction"))
    a, b, c = generate(pipeline, ["a red circle", "a red circle", "a blue star"], [1, 2, 1])
    assert a.shape == (64, 64, 3)
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    (alone,) = generate(pipeline, ["a red circle"], [1])
    assert np.abs(alone.astype(int) - a).max() <= 1  # the last bit of a matrix product may depend on the batch


def random_latents(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain_euler(pipeline, prompts, negatives, noise, levels, scale) -> torch.Tensor:
    """Euler's method as it is written down: each image by itself, both predictions one after the other, nothing kept."""
    generated = []
    for prompt, negative, x in zip(prompts, negatives, noise.split(1), strict=True):
        for t, t_next in zip(levels[:-1], levels[1:], strict=True):
            both = []
            for text in (prompt, negative):
                tokens, _, pooled, _, mask, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
                both.append(pipeline.transformer(x, t[None], tokens, mask, pooled))
            x = x + (t_next - t) * (both[1] + scale * (both[0] - both[1]))
        generated.append(x)
    return torch.cat(generated)


def test_call_equals_plain_euler(pipeline):
    prompts, negatives, noise = ["a red circle", "a blue star above a large pink heart"], ["", "a green cross"], random_latents(2)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    set_timesteps(scheduler, 5)
    generated = pipeline(
        prompts, negative_prompt=negatives, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
    ).images
    expected = plain_euler(pipeline, prompts, negatives, noise, scheduler.sigmas, 3.0)
    assert (generated - expected).abs().max() < 1e-4
    assert (generated - noise).abs().max() > 0.1


def test_call_encodes_each_text_once(pipeline):
    seen = []
    hook = pipeline.text_encoder.register_forward_pre_hook(
        lambda _, args, given: seen.append(pipeline.tokenizer.batch_decode(given["input_ids"], skip_special_tokens=True)),
        with_kwargs=True,
    )
    pipeline(["a red circle", "a blue star", "a red circle"], num_images_per_prompt=2, num_inference_steps=2)
    hook.remove()
    assert seen == [["a red circle", "a blue star", ""]]


def test_call_num_images_per_prompt(pipeline):
    noise = random_latents(4)
    generated = pipeline(["a red circle", "a blue star"], num_images_per_prompt=2, latents=noise, num_inference_steps=2)
    apart = [pipeline(prompt, latents=noise[k : k + 1], num_inference_steps=2).images[0] for prompt, k in PLACES]
    for a, b in zip(generated.images, apart, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_call_negative_prompt(pipeline):
    settings = {"latents": random_latents(1), "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    default, empty, other = (
        pipeline("a red circle", negative_prompt=negative, **settings).images for negative in (None, "", "a blue star")
    )
    assert torch.equal(default, empty) and not torch.equal(default, other)
    same = pipeline("a red circle", negative_prompt="a red circle", **settings).images
    without, off = (pipeline("a red circle", **{**settings, "guidance_scale": scale}).images for scale in (1.0, 0.0))
    assert torch.equal(without, off)  # as diffusers' pipelines have it
    assert torch.allclose(same, without, atol=1e-4)


def test_call_guidance_interval(pipeline):
    settings = {"latents": random_latents(1), "num_inference_steps": 4, "output_type": "latent"}
    calls = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, given: calls.append((len(given[0]), given[1][0].item())))
    part = pipeline("a red circle", guidance_scale=3.0, guidance_interval=(0.4, 0.8), **settings).images
    handle.remove()
    assert [(n, round(t, 2)) for n, t in calls] == [(2 if 0.4 <= t <= 0.8 else 1, round(t, 2)) for _, t in calls]
    assert {n for n, _ in calls} == {1, 2}
    whole, none = (pipeline("a red circle", guidance_scale=g, **settings).images for g in (3.0, 1.0))
    never = pipeline("a red circle", guidance_scale=3.0, guidance_interval=(0.0, 0.0), **settings).images
    assert torch.allclose(never, none, atol=1e-5)
    assert not torch.equal(part, whole) and not torch.equal(part, none)


def test_call_output_types(pipeline):
    settings = {"latents": random_latents(2), "num_inference_steps": 2}
    prompts = ["a red circle", "a blue star"]
    kinds = ("pil", "np", "pt", "latent")
    pil, array, tensor, latents = (pipeline(prompts, output_type=kind, **settings).images for kind in kinds)
    assert array.shape == (2, 64, 64, 3) and tensor.shape == (2, 3, 64, 64) and latents.shape == (2, CHANNELS, 8, 8)
    assert array.min() >= 0 and array.max() <= 1
    assert np.allclose(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(pil[1]), (array[1] * 255).round().astype(np.uint8))
    (images,) = pipeline(prompts, return_dict=False, **settings)
    assert [np.array_equal(a, b) for a, b in zip(images, pil, strict=True)] == [True, True]


CALLBACK = {"num_inference_steps": 3, "output_type": "latent"}


def test_callback_sees_every_step(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {}

    generated = pipeline("a red circle", latents=random_latents(1), callback_on_step_end=watch, **CALLBACK).images
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][1] == 1000 > seen[1][1] > seen[2][1]
    assert torch.equal(seen[-1][2], generated)


def test_callback_replaces_latents(pipeline):
    def clear(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not pipeline("a red circle", callback_on_step_end=clear, **CALLBACK).images.any()


def test_callback_interrupts(pipeline):
    seen = []

    def stop(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = True

    generated = pipeline("a red circle", callback_on_step_end=stop, **CALLBACK).images
    assert len(seen) == 1 and torch.equal(generated, seen[0])


def test_callback_ends_guidance(pipeline):
    def end(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0  # as diffusers' SDCFGCutoffCallback sets it

    settings = {"latents": random_latents(1), "num_inference_steps": 3, "output_type": "latent", "guidance_scale": 4.0}
    cut = pipeline("a red circle", callback_on_step_end=end, **settings).images
    first = pipeline.scheduler.sigmas[0].item()  # the first step alone is guided
    expected = pipeline("a red circle", guidance_interval=(first, 1.0), **settings).images
    assert torch.equal(cut, expected) and not torch.equal(cut, pipeline("a red circle", **settings).images)


def test_call_takes_tuples(pipeline):
    prompts, negatives = ["a red circle", "a blue star"], ["a green cross", ""]
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    settings = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0, "latents": random_latents(2)}
    expected = pipeline(prompts, negative_prompt=negatives, generator=generators, **settings).images
    generated = pipeline(tuple(prompts), negative_prompt=tuple(negatives), generator=tuple(generators), **settings).images
    assert torch.equal(generated, expected)


def test_call_refuses_infinite_latents(pipeline):
    with pytest.raises(UserError, match=r"no image came out: numbers grew beyond what torch.float32 holds"):
        pipeline("a red circle", guidance_scale=1e38, num_inference_steps=4)


def test_from_pipe_generates_the_same(pipeline):
    twin = DiTTextToImagePipeline.from_pipe(pipeline)
    twin.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(twin, ["a red circle"], [1]), generate(pipeline, ["a red circle"], [1]))


def test_pipeline_without_image_size_needs_height_and_width(pipeline):
    other = DiTTextToImagePipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="does not know the size of its training"):
        generate(other, ["a red circle"], [1])
    expected = generate(pipeline, ["a red circle"], [1])
    assert np.array_equal(generate(other, ["a red circle"], [1], height=64, width=64), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_safetensors": True}, "from_pretrained: use_safetensors is no part of this pipeline"),
        ({"torch_dtype": "float16"}, "from_pretrained: 'float16' is no torch.dtype"),
    ],
)
def test_from_pretrained_refuses(model, arguments, message):
    with pytest.raises(UserError, match=message):
        DiTTextToImagePipeline.from_pretrained(model, **arguments)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_call_mask_may_be_bool(pipeline, kind):
    black, lower = Image.new("RGB", (64, 64)), [[row >= 32] * 64 for row in range(64)]
    (generated,) = generate(pipeline, ["a red circle"], [1], image=black, mask_image=kind(lower))
    assert generated[:32].max() <= 1 < generated[32:].max()


def test_from_pretrained_takes_scheduler(model):
    scheduler = make_scheduler("heun", "flow_prediction")
    assert DiTTextToImagePipeline.from_pretrained(model, scheduler=scheduler).scheduler is scheduler


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [(FlowMatchLCMScheduler(), "something else"), (DPMSolverMultistepScheduler(), "epsilon")],
)
def test_call_refuses_misfitting_scheduler(pipeline, monkeypatch, scheduler, prediction):
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    name = type(scheduler).__name__
    with pytest.raises(UserError, match=f"trained for flow_prediction, and this {name} takes its output for {prediction}"):
        pipeline("a red circle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: at least one"),
        ({"num_inference_steps": 0}, "num_inference_steps: 0 is not a positive number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval"),
        ({"width": 60}, "multiples of 16, not 64 x 60"),
        ({"height": -64}, "multiples of 16, not -64 x 64"),
        ({"height": 0}, "multiples of 16, not 0 x 64"),
        ({"negative_prompt": ["", ""]}, "negative_prompt: one for all, or one for each of 1 prompts"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "generator: a list needs one for each of 1 images"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, rf"latents: must be of shape \(1, {CHANNELS}, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type: 'jpeg'; one of pil, np, pt, latent"),
        (
            {"callback_on_step_end_tensor_inputs": ["timesteps"]},
            "callback_on_step_end_tensor_inputs: 'timesteps' cannot be given",
        ),
        ({"strength": 0.5}, "strength, mask_image: they need an image"),
        ({"mask_image": Image.new("L", (64, 64))}, "strength, mask_image: they need an image"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 1.5}, "strength: 1.5 is not between 0 and 1"),
        ({"image": [Image.new("RGB", (64, 64))] * 2}, "image: 2 are given; one for all, or one for each of 1 prompts"),
        ({"image": (Image.new("RGB", (64, 64)),) * 2}, "image: 2 are given; one for all, or one for each of 1 prompts"),
        ({"image": [torch.zeros(3, 3, 64, 64)]}, "image: 3 are given; one for all, or one for each of 1 prompts"),
        ({"image": torch.zeros(1, 4, 8, 8)}, r"image: \(1, 4, 8, 8\) are no images of 3 x 64 x 64"),
        ({"image": np.zeros((3, 64, 64))}, r"image: \(3, 64, 64\) are no images of 3 x 64 x 64; an array has its channels last"),
        ({"image": np.full((64, 64, 3), 255.0)}, "image: float64 from 255 to 255; floats from 0"),
        ({"image": np.zeros((64, 64, 3)) - 1}, "image: float64 from -1 to -1; floats from 0"),
        ({"image": np.full((64, 64, 3), np.nan)}, "image: float64 from nan to nan; floats from 0"),
        ({"image": torch.full((3, 64, 64), 300)}, "image: int64 from 300 to 300; .* uint8 from 0 to 255, would be right"),
        ({"image": np.zeros((64, 64, 3), complex)}, "image: "),
        ({"image": np.zeros((0, 64, 64, 3))}, "image: not an image"),
        ({"image": []}, "image: not an image"),
        ({"image": Image.new("F", (64, 64), 2.0)}, "image: float32 from 2 to 2"),
        ({"image": Image.new("RGB", (64, 64)), "mask_image": np.full((64, 64), 255.0)}, "mask_image: float64 from 255"),
        ({"image": Image.new("RGB", (64, 64)), "mask_image": np.zeros((64, 64, 3))}, r"mask_image: \(64, 64, 3\) are no"),
        ({"image": "image.png"}, "image: not an image"),
        ({"image": Image.new("RGB", (64, 64)), "mask_image": torch.zeros(3, 64, 64)}, "mask_image: 3 are given; one for all"),
        ({"image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (100, 50))}, "mask_image: 100 x 50 pixels do not"),
        ({"image": np.zeros((64, 64, 3)), "mask_image": np.zeros((50, 100))}, "100 x 50 pixels do not lie over the image's 64"),
        ({"prompt": None}, "prompt: at least one is needed, or prompt_embeds"),
        ({"prompt": 5}, "prompt, negative_prompt: texts, or lists of texts"),
        (
            {"height": "a green cross", "width": 64},
            "height, width: 'a green cross' x 64 are not numbers of pixels; other arguments",
        ),
        ({"guidance_rescale": 1.5}, "guidance_rescale: 1.5 is not between 0 and 1"),
        ({"prompt": ["a", 5]}, "prompt, negative_prompt: texts, or lists of texts"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 0.2}, "strength: 0.2 is below 0.25, the least noise level of 4 steps"),
    ],
)
def test_call_refuses(pipeline, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline(**({"prompt": "a red circle", "num_inference_steps": 4} | arguments))
    assert "\n" not in str(caught.value)


def test_save_pretrained_round_trip(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", make_scheduler("dpm++", "flow_prediction"))
    pipeline.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}
    loaded = DiTTextToImagePipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is type(pipeline.scheduler) and loaded.scheduler.config.use_flow_sigmas
    assert loaded.config.image_size == 64 and loaded.config.prediction_type == "flow_prediction"
    (a,), (b,) = generate(pipeline, ["a red circle"], [1]), generate(loaded, ["a red circle"], [1])
    assert np.array_equal(a, b)


def test_save_pretrained_names_the_public_class(pipeline, tmp_path):
    """Not its module, and no folder of diffusers.pipelines: exports of every version load in every other."""
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == ["dit.model", "DiT"]
    assert dit.model.DiT is type(pipeline.transformer)


def test_call_in_bf16(pipeline, model):
    other = DiTTextToImagePipeline.from_pretrained(model, scheduler=pipeline.scheduler).to(torch.bfloat16)
    other.set_progress_bar_config(disable=True)
    assert {module.dtype for module in (other.vae, other.text_encoder)} == {torch.bfloat16}
    a, b = (generate(each, ["a red circle", "a blue star"], [1, 2]) for each in (pipeline, other))
    assert 0 < np.abs(np.subtract(a, b, dtype=float)).mean() < 30


def test_vae_slicing_changes_no_image(pipeline):
    expected = generate(pipeline, ["a red circle", "a blue star"], [1, 2])
    pipeline.enable_vae_slicing()
    sliced = generate(pipeline, ["a red circle", "a blue star"], [1, 2])
    pipeline.disable_vae_slicing()
    assert np.abs(np.subtract(expected, sliced, dtype=float)).max() <= 1


def test_encode_prompt_warns_of_long_prompt(pipeline, caplog):
    pipeline.encode_prompt(["a red circle " * 30])
    rest = ("a red circle " * 5).strip()  # 25 of 30 times three tokens, a beginning and an end are 77
    assert f"the prompt is longer than 77 tokens; not read: {rest!r}" in caplog.text
    caplog.clear()
    pipeline.encode_prompt(["a red circle"])
    assert not caplog.text


def test_call_other_size(pipeline):
    assert generate(pipeline, ["a red circle"], [1], height=96, width=64)[0].shape == (96, 64, 3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_from_pretrained_ddpm(tmp_path, prediction_type):
    save(tmp_path, objective="ddpm", prediction_type=prediction_type)
    pipeline = DiTTextToImagePipeline.from_pretrained(tmp_path / "dit")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.prediction_type == pipeline.scheduler.config.prediction_type == prediction_type
    (image,) = generate(pipeline, ["a red circle"], [1])
    assert image.shape == (64, 64, 3)
    assert "DDPM" in (tmp_path / "dit" / "README.md").read_text()


def test_save_model_is_reproducible(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "dit").rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    for path in files:
        assert sha256_file(tmp_path / "a" / path) == sha256_file(tmp_path / "b" / path)


def test_encode_prompt_equals_cache(pipeline):
    from dit.encoders.text import TextEncoder

    tokens, _, pooled, _, mask, _ = pipeline.encode_prompt(["a red circle above a blue star"])
    encoder = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"))
    (row,), (vector,) = encoder.encode(["a red circle above a blue star"])
    assert torch.allclose(tokens[0][mask[0]].half(), row, atol=1e-3) and torch.allclose(pooled[0].half(), vector, atol=1e-3)


@pytest.mark.parametrize("name", ["DiT", "DiTTextToImagePipeline", "load_pipeline"])
def test_top_level_imports(name):
    assert name in dit.__all__ and callable(getattr(dit, name))


def test_top_level_unknown_name():
    with pytest.raises(AttributeError, match="module 'dit' has no attribute 'nothing'"):
        getattr(dit, "no" + "thing")


def test_import_of_version_0_1():
    from dit.pipeline import DiTTextToImagePipeline as Before  # as its model cards say

    assert Before is DiTTextToImagePipeline
