"""Distances on the features of another image model: a DINOv2 of the real class, with small random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BitImageProcessorPil, Dinov2Config, Dinov2Model

from dit.config import load_config
from dit.errors import UserError
from dit.evaluation.distribution import compare_sets
from dit.evaluation.image_features import ImageFeatures
from helpers import REPO
from helpers.scenes import descriptions, rendered

SETTINGS = replace(load_config(REPO / "params.yaml").evaluate, resamples=20)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("owner") / "DINOv2-tiny"
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8)
    ).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    BitImageProcessorPil(size={"shortest_edge": 64}, crop_size=size, do_convert_rgb=True).save_pretrained(folder)
    return folder


def scenes(seed: int, count: int = 24) -> list[Image.Image]:
    return list(rendered(descriptions(seed, count), seed))


def test_embed_images_is_the_class_token_of_each(dinov2):
    features, images = ImageFeatures(str(dinov2)), scenes(1, 3)
    assert features.name == "dinov2_tiny"
    found = features.embed_images(iter(images), 3, "test")
    assert found.shape == (3, 32) and found.dtype == torch.float32
    pixels = features.processor(images=images[1:2], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        alone = features.model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(alone[0], found[1], atol=1e-5)


def test_compare_sets_is_named_after_the_model(dinov2):
    features = ImageFeatures(str(dinov2))
    sets = [scenes(1), scenes(2), [Image.new("RGB", (64, 64), "navy")] * 24]
    real, good, plain = (features.embed_images(iter(images), 24, "test") for images in sets)
    metrics = {name: compare_sets(real, of, SETTINGS, features.name) for name, of in {"good": good, "plain": plain}.items()}
    names = [f"{name}_dinov2_tiny_n24" for name in ("frechet_distance", "kid", "precision", "recall")]
    assert list(metrics["good"]) == [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    for name in names[:2]:
        assert metrics["plain"][name] > 10 * max(metrics["good"][name], 0.1)
    assert metrics["plain"]["recall_dinov2_tiny_n24"] < 0.2 < 0.8 < metrics["good"]["recall_dinov2_tiny_n24"]


def test_features_of_a_text_model_are_refused(tmp_path):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"evaluate\.features: .* has no image processor"):
        ImageFeatures(str(tmp_path))


def test_features_of_half_a_model_are_refused(dinov2, tmp_path):
    for path in dinov2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"evaluate\.features: .*the weights lack layernorm\.weight.* or to clip"):
        ImageFeatures(str(tmp_path))


def test_features_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.features: .* is no folder"):
        ImageFeatures(str(tmp_path / "nowhere"))


def test_config_takes_any_model_for_features(tmp_path):
    text = (REPO / "params.yaml").read_text(encoding="utf-8").replace("features: clip ", "features: facebook/dinov2-large ")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "params.yaml").evaluate.features == "facebook/dinov2-large"
