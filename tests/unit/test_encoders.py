"""The bundled encoders and how any others are loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dit.encode.moments import encode_moments
from dit.encoders.loading import BUILTIN, EncoderSource, copy_folders, find_encoder, load_clip, load_text_encoder, load_vae
from dit.encoders.text import TextEncoder, embed_captions
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
    assert isinstance(vae, AutoencoderKL) and vae.config.latent_channels == 16
    assert len(vae.config.block_out_channels) == 4  # 8x down
    weights = (BUILTIN / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert source.resolved == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    # It was chosen by what a transformer learns from it, not by its PSNR (docs/performance.md); see test_detector.py, too.
    assert reconstruction_psnr(vae, fresh[0]) >= 34


@pytest.mark.slow
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
    (alone, _, _), alone_pooled = encoder.encode(["a red circle", "a red circle", "word " * 40])
    assert torch.equal(short, alone) and torch.equal(short_pooled[0], alone_pooled[0])


@pytest.mark.parametrize("words", [0, 1, 14, 15, 30, 61, 62, 63, 75])  # a multiple of 16 is where 14, 30 and 62 end
def test_text_encoder_has_the_numbers_of_full_padding(words):
    model, tokenizer, _ = load_text_encoder(EncoderSource("builtin"))
    caption = " ".join(["red", "circle", "blue"][k % 3] for k in range(words))
    inputs = tokenizer([caption], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        full = model(input_ids=inputs.input_ids)
    (tokens, *_), pooled = embed_captions(model, tokenizer, [caption, "a star", "word " * 90])
    assert len(tokens) == words + 2
    assert torch.allclose(tokens, full.last_hidden_state[0, : words + 2], atol=1e-5)
    assert torch.allclose(pooled[0], full.text_embeds[0], atol=1e-5)


@pytest.mark.parametrize("caption", ["a red circle", "a small blue star to the left of a large green cross", "word " * 200])
def test_text_encoder_counts_its_tokens(caption):
    encoder = TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"))
    (tokens,), _ = encoder.encode([caption])
    (count,), (read,) = encoder.count_tokens([caption])
    assert len(tokens) == read == min(count, encoder.longest) and (count > 77) == (len(caption) > 100)


@pytest.mark.parametrize("words", [1, 75, 76, 150, 200])
def test_text_encoder_reads_long_captions_in_chunks(words):
    cut, whole = (TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"), how) for how in ("cut", "chunks"))
    colours = ["red", "blue", "green", "pink"]
    texts = [colours[k % 4 if k < 75 else k % 3] for k in range(words)]
    parts = [" ".join(texts[start : start + 75]) for start in range(0, words, 75)]
    (tokens,), pooled = whole.encode([" ".join(texts)])
    expected, of_first = cut.encode(parts)
    assert torch.allclose(tokens.float(), torch.cat(expected).float(), atol=1e-3)
    assert torch.allclose(pooled[0].float(), of_first[0].float(), atol=1e-3)
    assert whole.count_tokens([" ".join(texts)])[1] == [len(tokens)] == [words + 2 * len(parts)]


def test_text_encoder_chunks_change_no_short_caption():
    cut, whole = (TextEncoder(EncoderSource("builtin"), torch.float32, torch.device("cpu"), how) for how in ("cut", "chunks"))
    captions = ["a red circle", "", "a small blue star to the left of a large green cross"]
    for one, other in zip(cut.encode(captions)[0], whole.encode(captions)[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cut.encode(captions)[1], whole.encode(captions)[1])


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
        (
            "other class",
            "is of class 'UNet2DModel', and AutoencoderKL or AutoencoderKLFlux2 or AutoencoderTiny or AutoencoderDC is needed",
        ),
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


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with a VAE in `encoders/my-vae`; the working directory is elsewhere, and nothing reaches a network."""
    shutil.copytree(BUILTIN / "vae", tmp_path / "project" / "encoders" / "my-vae")
    (tmp_path / "project" / "dvc.yaml").touch()
    (tmp_path / "project" / "models" / "dit").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the environment was read when it was imported
    return tmp_path / "project"


def recorded(project: Path) -> EncoderSource:
    """The VAE as the model of the project records it."""
    _, resolved = find_encoder("vae", EncoderSource(str(project / "encoders" / "my-vae")))
    return EncoderSource("encoders/my-vae", None, resolved, project / "models" / "dit")


def test_find_encoder_in_the_project_of_a_copy(project, monkeypatch):
    """`dvc exp run --temp` runs in a folder without what git does not know, and names the project in DVC_ROOT."""
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert find_encoder("vae", EncoderSource("encoders/my-vae"))[0] == project / "encoders" / "my-vae"


def test_find_encoder_in_the_project_of_a_model(project):
    _, source = load_vae(recorded(project))
    assert source == EncoderSource("encoders/my-vae", None, recorded(project).resolved)
    assert recorded(project).to_dict() == {"name": "encoders/my-vae", "revision": None, "resolved": source.resolved}


def test_find_encoder_prefers_the_recorded_weights(project):
    here = Path("encoders/my-vae")
    shutil.copytree(project / here, here)
    weights = next(here.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert find_encoder("vae", recorded(project))[0] == project / here
    assert find_encoder("vae", EncoderSource(str(here)))[0] == here.absolute()


def test_find_encoder_copied_into_the_model(project, tmp_path):
    source = recorded(project)
    model = shutil.copytree(project / "models" / "dit", tmp_path / "copy")
    copy_folders(model, {"vae": source, "clip": EncoderSource("builtin", None, "sha256:0")})
    assert [path.name for path in (model / "encoders").iterdir()] == ["vae"]
    (project / "encoders").rename(project / "moved")
    folder, resolved = find_encoder("vae", EncoderSource(source.name, None, source.resolved, model))
    assert (folder, resolved) == (model / "encoders" / "vae", source.resolved)


def test_find_encoder_in_the_home_folder(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.setenv("USERPROFILE", str(project))  # of Windows
    _, source = load_vae(EncoderSource("~/encoders/my-vae"))
    assert source.name == "~/encoders/my-vae"  # without the user's name


@pytest.mark.parametrize(
    "name",
    ["./my-vae", "../my-vae", "/nowhere", "~/my-vae", "~nobody-of-that-name/vae", "my\\vae", "encoders/my-va", "encoders/a/b/c"]
    + ["/" + "a" * 300, "~\0", "./\0"],
)
def test_find_encoder_says_first_that_there_is_no_folder(project, monkeypatch, name):
    monkeypatch.chdir(project)
    with pytest.raises(UserError) as error:
        find_encoder("vae", EncoderSource(name), weights=False)
    assert f"encode.vae: {name!r} is no folder, there is no " in str(error.value) and "\n" not in str(error.value)


def test_find_encoder_that_was_recorded_is_not_taken_for_another_kind(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match="'encoders/my-vae' is not in the cache"):  # of the Hub: the model has its commit
        find_encoder("vae", EncoderSource("encoders/my-vae", None, "0123456789abcdef0123456789abcdef01234567"))
    shutil.rmtree("encoders")
    with pytest.raises(UserError, match="'encoders/my-vae' is no folder, there is no "):
        find_encoder("vae", EncoderSource("encoders/my-vae", None, "sha256:0"))


def test_bundled_encoders_are_small():
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*") if path.is_file()) < 8.7e6
