"""The bundled encoders and how any others are loaded."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dit.encode.moments import encode_moments
from dit.encoders.loading import BUILTIN, EncoderSource, load_clip, load_text_encoder, load_vae
from dit.encoders.text import TextEncoder
from dit.errors import UserError
from dit.shapes.captions import describe
from dit.shapes.prompts import TRAIN_STREAM, UNSEEN_STREAM
from dit.shapes.scene import UNSEEN_PAIRS
from helpers.encoding import SETTINGS
from tools.fit_encoders.alternatives import alternatives
from tools.fit_encoders.clip import choice_accuracy, embed_images, embed_texts
from tools.fit_encoders.fit import CLIP_STREAM, MEASURE_STREAM, VAE_STREAM, render_scenes
from tools.fit_encoders.vae import reconstruction_psnr

FRESH = 300


@pytest.fixture(scope="module")
def fresh():
    return render_scenes(FRESH, 4242)


def test_bundled_vae_reconstructs_new_scenes(fresh):
    vae, source = load_vae(EncoderSource("builtin"))
    assert isinstance(vae, AutoencoderKL) and vae.config.latent_channels == 4
    assert len(vae.config.block_out_channels) == 4  # 8x down
    weights = (BUILTIN / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert source.resolved == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert reconstruction_psnr(vae, fresh[0]) >= 36


def test_bundled_clip_picks_the_right_caption_among_32():
    images, descriptions, _ = render_scenes(1700, 4343)
    clip, processor = load_clip(EncoderSource("builtin"))
    share, count = choice_accuracy(clip, processor.tokenizer, images, descriptions)
    assert count >= 150 and share >= 0.85


@torch.no_grad()
def test_bundled_clip_knows_every_attribute():
    images, descriptions, _ = render_scenes(200, 4343)
    clip, processor = load_clip(EncoderSource("builtin"))
    right: dict[str, list[float]] = {}
    for image, description in zip(images, descriptions, strict=True):
        for attribute, others in alternatives(description).items():
            captions = [describe(other, np.random.default_rng(0)) for other in (description, *others)]
            own, *similar = (embed_texts(clip, processor.tokenizer, captions) @ embed_images(clip, image[None])[0]).tolist()
            right.setdefault(attribute, []).extend(own > other for other in similar)
    shares = {attribute: np.mean(values) for attribute, values in right.items()}
    assert set(shares) == {"colour", "shape", "size", "background", "relation"}
    assert all(share >= 0.96 for share in shares.values()), shares


def test_fit_encoders_leaves_out_unseen_pairs():
    assert len({TRAIN_STREAM, UNSEEN_STREAM, CLIP_STREAM, VAE_STREAM, MEASURE_STREAM}) == 5
    for stream in (CLIP_STREAM, VAE_STREAM):
        _, descriptions, scenes = render_scenes(1000, stream)
        for description, scene in zip(descriptions, scenes, strict=True):
            assert not {each.pair for each in (*description.objects, *scene.objects)} & UNSEEN_PAIRS


def test_bundled_tokenizer_of_any_text():
    _, tokenizer, _ = load_text_encoder(EncoderSource("builtin"))
    text = "a man riding a wave, 7 €!"
    ids = tokenizer(text).input_ids
    assert tokenizer.bos_token_id == ids[0] and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_text_encoder_does_not_depend_on_neighbours():
    encoder = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"))
    longer = ["a red circle", "a small blue star to the left of a large green cross"]
    (short, _), short_pooled = encoder.encode(["a red circle", "a star"])
    among, among_pooled = encoder.encode(longer)
    assert torch.equal(short, among[0]) and torch.equal(short_pooled[0], among_pooled[0])  # in batches of one size
    assert len(among[0]) < len(among[1]) < 77


@pytest.mark.parametrize("caption", ["a red circle", "a small blue star to the left of a large green cross", "word " * 200])
def test_text_encoder_counts_its_tokens(caption):
    encoder = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"))
    (tokens,), _ = encoder.encode([caption])
    (count,) = encoder.count_tokens([caption])
    assert len(tokens) == min(count, encoder.longest) and (count > 77) == (len(caption) > 100)


def test_encode_moments_of_the_mirror_image(fresh):
    vae, _ = load_vae(EncoderSource("builtin"))
    pixels = torch.from_numpy(fresh[0][:2])[:, None]  # (B, 1, H, W, 3)
    assert torch.equal(encode_moments(vae, pixels, SETTINGS)[:, 1], encode_moments(vae, pixels.flip(-2), SETTINGS)[:, 0])


def test_load_vae_from_a_folder(tmp_path):
    vae, _ = load_vae(EncoderSource("builtin"))
    vae.half().save_pretrained(tmp_path)
    again, again_source = load_vae(EncoderSource(str(tmp_path)))
    assert torch.equal(again.encoder.conv_in.weight, vae.float().encoder.conv_in.weight)
    assert again_source.resolved.startswith("sha256:")


def test_load_vae_rejects_changed_weights(tmp_path):
    vae, _ = load_vae(EncoderSource("builtin"))
    vae.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the weights have changed"):
        load_vae(EncoderSource(str(tmp_path), None, "sha256:0000"))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("missing", "is no folder"),
        ("empty", "has no config.json"),
        ("other class", "is of class 'UNet2DModel', and AutoencoderKL is needed"),
    ],
)
def test_load_vae_problem_is_one_line(tmp_path, damage, problem):
    folder = tmp_path / "vae"
    if damage != "missing":
        folder.mkdir()
    if damage == "other class":
        (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError) as error:
        load_vae(EncoderSource(str(folder)))
    assert f"encode.vae: '{folder}' {problem}" in str(error.value) and "\n" not in str(error.value)


def test_bundled_encoders_are_small():
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()) < 8e6
