"""Embeddings of prompts instead of texts, and callbacks that are given them."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SD3CFGCutoffCallback, SDCFGCutoffCallback

from dit.errors import UserError
from dit.pipeline.conditioning import PromptEmbeds
from dit.pipeline.pipeline import DiTTextToImagePipeline
from helpers.small_models import euler_pipeline, generate_latents

PROMPTS, NEGATIVES = ["a red circle", "a blue star above a large pink heart"], ["a green cross", ""]


@pytest.fixture(scope="module")
def pipeline(model) -> DiTTextToImagePipeline:
    return euler_pipeline(model)


@pytest.mark.parametrize("negative", [None, "a green cross", NEGATIVES])
@pytest.mark.parametrize("times", [1, 2])
def test_embeddings_generate_as_their_texts(pipeline, negative, times):
    """Encoded once and used twice: the same bits."""
    embeds = pipeline.encode_prompt(PROMPTS, negative_prompt=negative)._asdict()
    settings = {"num_images_per_prompt": times}
    first, second = (generate_latents(pipeline, **embeds, **settings) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, generate_latents(pipeline, PROMPTS, negative_prompt=negative, **settings))


def test_encode_prompt_returns_what_a_call_takes(pipeline):
    embeds = pipeline.encode_prompt("a red circle")
    assert [tuple(tensor.shape) for tensor in embeds] == [(1, 5, 128), (1, 5, 128), (1, 128), (1, 128), (1, 5), (1, 5)]
    assert embeds.negative_prompt_attention_mask.tolist() == [[True, True, False, False, False]]
    taken = list(inspect.signature(pipeline.__call__).parameters)
    assert [name for name in taken if name in embeds._fields] == list(embeds._fields)
    without = pipeline.encode_prompt("a red circle", do_classifier_free_guidance=False)
    assert torch.equal(
        generate_latents(pipeline, **without._asdict(), guidance_scale=1.0),
        generate_latents(pipeline, "a red circle", guidance_scale=1.0),
    )


def test_embeddings_of_the_prompt_alone(pipeline):
    """The negative prompt may still be a text, of another length; and the other way round."""
    prompt, negative = "a red circle", "a small green cross above a large pink heart"
    expected = generate_latents(pipeline, prompt, negative_prompt=negative)
    alone = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)._asdict()
    assert torch.allclose(generate_latents(pipeline, **alone, negative_prompt=negative), expected, atol=1e-4)
    both = pipeline.encode_prompt(prompt, negative_prompt=negative)._asdict()
    negatives = {name: tensor for name, tensor in both.items() if name.startswith("negative")}
    assert torch.allclose(generate_latents(pipeline, prompt, **negatives), expected, atol=1e-4)
    assert not torch.allclose(generate_latents(pipeline, prompt), expected, atol=1e-2)


def test_a_mixture_of_embeddings_generates_something_else(pipeline):
    """Why one passes embeddings at all."""
    a, b = (pipeline.encode_prompt(text)._asdict() for text in ("a red circle", "a blue circle"))
    mixed = {name: (a[name] + b[name]) / 2 if a[name].is_floating_point() else a[name] for name in a}
    generated = [generate_latents(pipeline, **embeds) for embeds in (a, mixed, b)]
    assert not any(torch.allclose(generated[1], other, atol=1e-3) for other in (generated[0], generated[2]))


def test_masks_may_be_integers(pipeline):
    embeds = pipeline.encode_prompt(PROMPTS)._asdict()
    integers = {name: tensor.long() if "mask" in name else tensor for name, tensor in embeds.items()}
    assert torch.equal(generate_latents(pipeline, **integers), generate_latents(pipeline, **embeds))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a red circle"}, "prompt, prompt_embeds: both are given; one of them"),
        ({"negative_prompt": "a red circle"}, "negative_prompt, negative_prompt_embeds: both are given"),
        ({"pooled_prompt_embeds": None}, "pooled_prompt_embeds: needed, too, where one of prompt_embeds, pooled_"),
        ({"prompt_attention_mask": None}, "prompt_attention_mask: needed, too"),
        ({"negative_prompt_embeds": None}, "negative_prompt_embeds: needed, too, where one of negative_prompt_embeds, neg"),
        ({"prompt_embeds": torch.zeros(1, 5, 64)}, r"prompt_embeds: \(1, 5, 64\); a tensor \(N, L, 128\) as encode_prompt"),
        ({"prompt_embeds": [1.0]}, r"prompt_embeds: list; a tensor \(N, L, 128\)"),
        ({"prompt_embeds": torch.zeros(1, 4, 128)}, r"prompt_attention_mask: \(1, 5\); a tensor \(N, L\)"),
        ({"pooled_prompt_embeds": torch.zeros(2, 128)}, r"pooled_prompt_embeds: \(2, 128\); a tensor \(N, 128\)"),
        ({"prompt_attention_mask": torch.zeros(1, 5)}, "prompt_attention_mask: True nowhere in a row"),
        (
            {
                name: torch.ones(shape)
                for name, shape in zip(PromptEmbeds._fields[1::2], [(3, 5, 128), (3, 128), (3, 5)], strict=True)
            },
            "negative_prompt_embeds: one for all, or one for each of 1 prompts",
        ),
    ],
)
def test_call_refuses_embeddings(pipeline, changes, message):
    embeds = pipeline.encode_prompt("a red circle")._asdict()
    with pytest.raises(UserError, match=message) as caught:
        generate_latents(pipeline, **(embeds | changes))
    assert "\n" not in str(caught.value)


def test_callback_is_given_embeddings(pipeline):
    seen = []
    names = ["latents", *PromptEmbeds._fields]

    def watch(pipe, step, timestep, tensors):
        seen.append(tensors)
        return tensors

    settings = {"num_images_per_prompt": 2, "callback_on_step_end_tensor_inputs": names}
    generated = generate_latents(pipeline, PROMPTS, callback_on_step_end=watch, **settings)
    assert [list(tensors) for tensors in seen] == [names] * 3
    embeds = pipeline.encode_prompt(PROMPTS, negative_prompt=[""] * 2)._asdict()
    for name, tensor in embeds.items():
        assert torch.equal(seen[0][name], tensor.repeat_interleave(2, 0)), name
    assert torch.equal(
        generated, generate_latents(pipeline, PROMPTS, num_images_per_prompt=2)
    )  # what comes back unchanged changes nothing
    generate_latents(pipeline, PROMPTS, callback_on_step_end=watch, **settings, guidance_scale=1.0)
    assert seen[-1]["negative_prompt_embeds"] is None and seen[-1]["prompt_embeds"].shape == (4, 10, 128)


@pytest.mark.parametrize("in_place", [False, True])
def test_callback_replaces_embeddings(pipeline, in_place):
    """From the next step on, as if the steps that are left were a call of their own with another prompt."""
    other = pipeline.encode_prompt("a blue star", negative_prompt="a green cross")._asdict()

    def change(pipe, step, timestep, tensors):
        if in_place:
            for name, tensor in other.items():
                tensors[name].copy_(tensor)
        return tensors if in_place else other

    names = list(other)
    changed = generate_latents(
        pipeline, "a red circle", callback_on_step_end=change, callback_on_step_end_tensor_inputs=names, sigmas=[1.0, 0.5]
    )
    start = []
    generate_latents(
        pipeline,
        "a red circle",
        sigmas=[1.0, 0.5],
        callback_on_step_end=lambda pipe, k, t, tensors: start.append(tensors["latents"]),
    )
    step = generate_latents(pipeline, **other, sigmas=[0.5], latents=start[0])
    assert torch.allclose(changed, step, atol=1e-4)
    assert not torch.allclose(changed, generate_latents(pipeline, "a red circle", sigmas=[1.0, 0.5]), atol=1e-2)


@pytest.mark.parametrize(
    ("returned", "guidance_scale", "message"),
    [
        (
            {"prompt_embeds": torch.zeros(1, 3, 128)},
            4.0,
            r"it returned prompt_embeds of \(1, 3, 128\); \(1, 5, 128\) would be right",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(1, 5, 128)},
            1.0,
            "negative_prompt_embeds .* nothing, since this call is without guid",
        ),
    ],
)
def test_callback_returns_another_shape(pipeline, returned, guidance_scale, message):
    with pytest.raises(UserError, match=message):
        generate_latents(pipeline, "a red circle", guidance_scale=guidance_scale, callback_on_step_end=lambda *given: returned)


@pytest.mark.parametrize("callback", [SDCFGCutoffCallback, SD3CFGCutoffCallback])
@pytest.mark.parametrize("several", [False, True])
def test_callbacks_of_diffusers(pipeline, callback, several):
    """They bring the list of what they need, and end guidance after a step."""
    cutoff = callback(cutoff_step_ratio=None, cutoff_step_index=0)
    cut = generate_latents(pipeline, "a red circle", callback_on_step_end=MultiPipelineCallbacks([cutoff]) if several else cutoff)
    first = generate_latents(pipeline, "a red circle", guidance_interval=(0.9, 1.0))  # the first of three steps alone is guided
    assert torch.equal(cut, first) and not torch.equal(cut, generate_latents(pipeline, "a red circle"))
