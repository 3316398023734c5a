"""The encode stage: the same data set and settings give byte-identical shards, whatever was interrupted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.config import load_config
from dit.dataset.image_io import load_crops
from dit.dataset.reader import read_metadata
from dit.encode import encode as encode_module
from dit.encode import moments
from dit.encode.cache_writer import ShardBuffer
from dit.encoders import loading
from dit.encoders.loading import EncoderSource, load_vae
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.sources import fetch
from dit.sources.writer import DatasetWriter, FetchResult
from helpers import REPO, SHARED
from helpers.encoding import COUNT, RUNTIME, SETTINGS, SHARD_BYTES, contents, encode, image_names, write_raw
from helpers.sources import folder_data, noise_file

NO_MIRRORS = np.zeros(COUNT, dtype=bool)
CENTRAL = np.zeros(COUNT)  # the first caption of each image, or the central crop


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def own_raw(raw, tmp_path) -> Path:
    """A copy of the data set that the test may damage."""
    return shutil.copytree(raw, tmp_path / "raw")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The numbers of the shards that are written."""
    numbers: list[int] = []
    write = ShardBuffer.write

    def note(self, folder, number, *rest):
        write(self, folder, number, *rest)
        numbers.append(number)

    monkeypatch.setattr(ShardBuffer, "write", note)
    return numbers


@pytest.mark.usefixtures("small_shards")
def test_encode_makes_shards_of_whole_batches(raw, tmp_path):
    encode(raw, tmp_path / "latents")
    shards = LatentCache(tmp_path / "latents").index["shards"]
    sizes = [shard["images"] for shard in shards]
    assert len(sizes) > 2 and all(size % SETTINGS.batch_size == 0 for size in sizes[:-1])
    assert all(shard["bytes"] < SHARD_BYTES + 2**13 for shard in shards)  # the header is not counted


@pytest.mark.usefixtures("small_shards")
def test_encode_keeps_order_and_splits(raw, tmp_path):
    metrics = encode(raw, tmp_path / "latents")
    cache, entries = LatentCache(tmp_path / "latents"), list(read_metadata(raw))
    cache.verify()
    rows = [row for each in cache.captions(np.arange(COUNT)) for row in each]
    assert [(row["image"], row["text"], row["split"]) for row in rows] == [(e.image, e.text, e.split) for e in entries]
    assert (metrics["images"], metrics["captions"], len(cache.val)) == (COUNT, len(entries), 4)


def test_encode_leaves_no_state(raw, tmp_path):
    encode(raw, tmp_path / "latents")
    assert not list((tmp_path / ".state" / "encode").iterdir())


@pytest.mark.usefixtures("small_shards")
def test_encode_resumes_to_the_same_bytes(raw, tmp_path, monkeypatch, capsys, written):
    encode(raw, tmp_path / "undisturbed")
    shards = len(written)
    write = ShardBuffer.write

    def stop_at_the_third(self, folder, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        write(self, folder, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardBuffer, "write", stop_at_the_third)
        encode(raw, tmp_path / "stopped")
    encode(raw, tmp_path / "stopped")
    assert written[shards:] == list(range(shards))  # none twice
    assert "encode: resuming, 8 of 22 images are done" in capsys.readouterr().out
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["image", "damage"])
def test_encode_rewrites_shards_that_do_not_match(raw, own_raw, tmp_path, monkeypatch, written, change):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)  # as if it was killed at the end
        encode(own_raw, tmp_path / "first")
    (parts,) = (tmp_path / ".state" / "encode").iterdir()
    if change == "image":
        (own_raw / "images" / "0.jpg").write_bytes((raw / "images" / "1.jpg").read_bytes())
    else:
        shard = parts / "shard-00000.safetensors"
        shard.unlink()  # it is a hard link to the one in the cache
        shard.write_bytes(b"\0" * 1000)
    written.clear()
    encode(own_raw, tmp_path / "second")
    assert written == [0]
    encode(own_raw, tmp_path / "third")
    assert contents(tmp_path / "second") == contents(tmp_path / "third")


def test_encode_workers_and_layout_change_nothing(raw, tmp_path):
    encode(raw, tmp_path / "a")
    encode(write_raw(tmp_path / "shards", "shards"), tmp_path / "b", replace(RUNTIME, num_workers=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.usefixtures("small_shards")
def test_encode_counts_what_the_encoders_do_not_see(tmp_path, capsys, monkeypatch):
    writer = DatasetWriter(tmp_path / "raw", folder_data(tmp_path), 12)
    for k in range(12):
        captions = ["a red circle", "a walrus and a red circle" if k < 3 else "a blue star"]
        captions += ["a red circle and a blue star, " * 20] if k % 4 == 0 else []
        writer.add(f"images/{k}.png", noise_file(k, (32, 90) if k < 5 else (90, 70), "PNG"), captions)
    writer.close(FetchResult())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode_module, "assemble_cache", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        encode(tmp_path / "raw", tmp_path / "latents")  # all shards are written: the next run must count their images, too
    metrics = encode(tmp_path / "raw", tmp_path / "latents")
    counts = {"enlarged_images": 5, "truncated_captions": 3, "captions_with_unknown_words": 3}
    assert {name: metrics[name] for name in counts} == counts
    lines = capsys.readouterr().out
    assert "encode: 5 of 12 images are smaller than encode.image_size 64 asks for and were enlarged" in lines
    assert "encode: 3 of 27 captions are longer than CLIP's 77 tokens: cut off" in lines
    assert "3 of 27 captions have words that this CLIP was not fitted on, most often walrus (3); set encode.clip" in lines


def test_encode_adds_random_crops(raw, tmp_path):
    encode(raw, tmp_path / "plain")
    encode(raw, tmp_path / "cropped", crops=2)
    plain, cropped = LatentCache(tmp_path / "plain"), LatentCache(tmp_path / "cropped")
    assert (plain.crops, cropped.crops) == (0, 2)
    central = plain.read(np.arange(COUNT), CENTRAL, NO_MIRRORS).moments
    crops = [cropped.read(np.arange(COUNT), CENTRAL, NO_MIRRORS, np.full(COUNT, choice)).moments for choice in (0.3, 0.4, 0.99)]
    assert torch.equal(central, crops[0]) and not torch.equal(crops[1], central) and not torch.equal(crops[1], crops[2])
    name = "images/5.jpg"
    pixels, *_ = next(load_crops(raw, [[(name, name)]], [(64, 64)], crops=2))
    alone = moments.encode_moments(load_vae(EncoderSource("builtin"))[0], pixels, SETTINGS)[0, 4].float()
    assert torch.allclose(alone, crops[2][image_names(raw).index(name)].float(), atol=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_encode_unreadable_image_is_one_line(own_raw, tmp_path, workers):
    (own_raw / "images" / "9.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        encode(own_raw, tmp_path / "out", replace(RUNTIME, num_workers=workers))
    assert "9.jpg: not an image" in str(error.value) and "\n" not in str(error.value)


def test_encode_missing_image_is_one_line(own_raw, tmp_path):
    (own_raw / "images" / "9.jpg").unlink()
    with pytest.raises(UserError, match="9.jpg: missing or not readable"):
        encode(own_raw, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_encode_out_of_memory_names_a_batch_size(raw, tmp_path, monkeypatch):
    plain = moments._moments

    def only_three_fit(vae, pixels):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(vae, pixels)

    monkeypatch.setattr(moments, "_moments", only_three_fit)
    with pytest.raises(UserError) as error:
        encode(raw, tmp_path / "out")
    assert str(error.value) == (
        "encode.batch_size: 4 images of 64 pixels do not fit into memory; 2 would fit, or set encode.vae_slicing"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_encode_moments_out_of_gpu_memory_is_one_line():
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        pixels = torch.zeros(512, 1, 1024, 1024, 3, dtype=torch.uint8)
        vae, _ = load_vae(EncoderSource("builtin"), device="cuda")
        with pytest.raises(UserError, match=r"do not fit into memory; \d+ would fit"):
            moments.encode_moments(vae, pixels, replace(SETTINGS, batch_size=512, image_size=1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_encode_overflow_is_one_line(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_moments", lambda vae, pixels: torch.full((4, 2, 8, 8, 8), float("inf")).half())
    with pytest.raises(UserError, match="encode.precision: with fp32 the output of 'builtin' overflows; bf16 or fp32"):
        encode(raw, tmp_path / "out")


def test_encode_without_bf16_instructions_is_fp32(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda device: False)
    encode(raw, tmp_path / "bf16", precision="bf16")
    assert capsys.readouterr().out.count("no bf16 instructions: encoding in fp32\n") == 1
    encode(raw, tmp_path / "fp32")
    assert contents(tmp_path / "bf16") == contents(tmp_path / "fp32")


def test_encode_in_bf16_is_nearly_fp32(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda device: True)
    encode(raw, tmp_path / "bf16", precision="bf16")
    encode(raw, tmp_path / "fp32")
    rounded, exact = (LatentCache(tmp_path / name) for name in ("bf16", "fp32"))
    assert rounded.index["precision"] == "bf16"
    here, there = (cache.read(np.arange(COUNT), CENTRAL, NO_MIRRORS).moments.float() for cache in (rounded, exact))
    assert 0 < (here - there).abs().mean() < 0.02 * there.abs().mean()


def test_encode_warns_where_the_bundled_vae_does_not_fit(raw, tmp_path, capsys):
    encode(raw, tmp_path / "latents")
    assert "was fitted on rendered scenes and keeps little of these images" in capsys.readouterr().out


def test_encode_does_not_warn_of_rendered_scenes(tmp_path, capsys):
    data = load_config(REPO / "params.yaml").shapes.data
    fetch(replace(data, num_samples=20, image_size=64), tmp_path / "raw", RUNTIME)
    encode(tmp_path / "raw", tmp_path / "latents")
    assert "keeps little" not in capsys.readouterr().out


def test_encode_long_captions_in_chunks(tmp_path, capsys):
    writer = DatasetWriter(tmp_path / "raw", folder_data(tmp_path), 10)
    for k in range(10):
        writer.add(f"images/{k}.png", noise_file(k, (90, 70), "PNG"), ["a red circle " * (30 if k == 4 else 1)])
    writer.close(FetchResult())
    metrics = encode(tmp_path / "raw", tmp_path / "latents", long_captions="chunks")
    assert metrics["truncated_captions"] == 0 and "cut off" not in capsys.readouterr().out
    cache = LatentCache(tmp_path / "latents")
    assert cache.index["long_captions"] == "chunks" and cache.index["longest_caption"] == 90 + 2 * 2 and cache.max_tokens == 96
    batch = cache.read(np.arange(10), np.zeros(10), np.zeros(10, dtype=bool))
    assert sorted(batch.mask.sum(1).tolist()) == [5] * 9 + [94]


@pytest.mark.skipif(not (SHARED / "captioned-folder").is_dir(), reason="no folder of real captioned images")
def test_encode_photographs(tmp_path):
    fetch(folder_data(SHARED / "captioned-folder"), tmp_path / "raw", RUNTIME)
    metrics = encode(tmp_path / "raw", tmp_path / "latents")
    assert metrics["images"] == 100 and 5 < metrics["reconstruction_psnr"] < 30
    LatentCache(tmp_path / "latents").verify()
