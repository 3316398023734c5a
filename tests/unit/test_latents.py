"""The latent cache gives back what was written, and says so when it cannot."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dit.encode.cache_writer import channel_sums, mean_std
from dit.errors import UserError
from dit.latents.cache import LatentCache, sample_posterior
from helpers.cache import write_cache


def test_cache_numbers_images_through_shards(cache):
    assert len(cache) == 24
    assert cache.val.tolist() == [0, 1, 2, 3, 4, 5]
    assert cache.train.tolist() == list(range(6, 24))
    assert cache.latent_shape == (4, 8, 8)
    assert cache.max_tokens == 16  # the longest has 9


def test_cache_pads_text_when_read(cache):
    assert cache.index["tokens"] == sum(3 + k % 7 for k in range(48))
    batch = cache.read(np.array([6, 20]), np.array([0.0, 0.99]), np.array([False, False]))
    assert batch.mask.sum(1).tolist() == [3 + 12 % 7, 3 + 41 % 7]
    assert not batch.tokens[~batch.mask].any()
    assert cache.captions(np.array([20, 3]))[0][1]["text"] == "caption 1 of image 20, top"


def test_cache_never_mirrors_no_flip_captions(cache):
    images, captions = np.array([9, 8]), np.array([0.0, 0.0])  # image 8's first caption says left
    plain = cache.read(images, captions, np.array([False, False])).moments
    mirrored = cache.read(images, captions, np.array([True, True])).moments
    assert not torch.equal(plain[0], mirrored[0])
    assert torch.equal(plain[1], mirrored[1])


def test_cache_read_does_not_depend_on_sharding(tmp_path):
    one, three = write_cache(tmp_path / "one", shards=1), write_cache(tmp_path / "three", shards=3)
    for a, b in zip(
        vars(one.read(np.arange(24), np.full(24, 0.6), np.arange(24) % 2 == 0)).values(),
        vars(three.read(np.arange(24), np.full(24, 0.6), np.arange(24) % 2 == 0)).values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_cache_text_statistics(cache):
    for name in ("tokens", "pooled"):
        rows = torch.cat([load_file(path)[name] for path in sorted(cache.folder.glob("shard-*"))]).float()
        assert torch.allclose(cache.text_statistics[f"{name}_mean"], rows.mean(0), atol=1e-5)
        assert torch.allclose(cache.text_statistics[f"{name}_std"], rows.std(0, correction=0), atol=1e-5)


def test_mean_std_of_constant_channel():
    mean, std = mean_std([channel_sums(torch.full((5, 2), 3.0)), channel_sums(torch.full((7, 2), 3.0))])
    assert mean.tolist() == [3, 3] and std.tolist() == [1, 1]


def test_sample_posterior():
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * float(np.log(0.5)))], dim=1)
    latents = sample_posterior(moments, torch.ones(1, 4, 2, 2), scaling=2.0, shift=1.0)
    assert torch.allclose(latents, torch.full((1, 4, 2, 2), (3 + 0.5 - 1) * 2.0))


def damage_index(folder, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


DAMAGE = {
    "no index": (lambda folder: (folder / "index.json").unlink(), "index.json is missing"),
    "no JSON": (lambda folder: (folder / "index.json").write_text("{"), "not a readable latent cache"),
    "another format": (lambda folder: damage_index(folder, format=1), "index.json: format: Input should be 3"),
    "a wrong sum": (lambda folder: damage_index(folder, images=25), "index.json: the shards hold 24 images, not 25"),
    "no shard": (lambda folder: (folder / "shard-00001.safetensors").unlink(), "shard-00001.safetensors is missing"),
    "half a shard": (lambda folder: os.truncate(folder / "shard-00001.safetensors", 1000), "1000 bytes, not"),
    "other encoders": (lambda folder: damage_index(folder, fingerprint="others"), "made by other encoders or settings"),
    "no text": (lambda folder: (folder / "text.safetensors").unlink(), "text.safetensors is missing"),
    "half a text": (lambda folder: os.truncate(folder / "text.safetensors", 100), "not a readable latent cache"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_cache_names_damage(tmp_path, name):
    write_cache(tmp_path)
    damage, says = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        LatentCache(tmp_path)
    message = str(error.value)
    assert says in message and str(tmp_path) in message and "dvc repro encode" in message and "\n" not in message


def test_cache_names_foreign_shard(tmp_path):
    write_cache(tmp_path / "mine")
    write_cache(tmp_path / "other", fingerprint="his tests")
    name = "shard-00001.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "mine" / name)
    damage_index(tmp_path / "mine", shards=json.loads((tmp_path / "other" / "index.json").read_text())["shards"])
    with pytest.raises(UserError, match=f"{name}: made by other encoders or settings than index.json names"):
        LatentCache(tmp_path / "mine")


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00001.safetensors", "captions.jsonl", "text.safetensors"])
def test_verify_finds_flipped_bit(tmp_path, name):
    cache = write_cache(tmp_path)
    cache.verify()
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        LatentCache(tmp_path).verify()


def test_shard_read_equals_written(tmp_path):
    cache = write_cache(tmp_path, augmentations=4)
    tensors = [load_file(path) for path in sorted(tmp_path.glob("shard-*"))]
    moments = torch.cat([tensor["moments"] for tensor in tensors])
    images = np.array([3, 13, 23])  # their first captions have no side
    batch = cache.read(images, np.zeros(3), np.array([False, True, True]), np.array([0.0, 0.4, 0.6]))
    assert torch.equal(batch.moments, moments[images, [0, 1, 3]])
    second = cache.read(images, np.full(3, 0.5), np.zeros(3, dtype=bool))
    assert torch.equal(second.pooled, torch.cat([tensor["pooled"] for tensor in tensors])[2 * images + 1])
    starts = torch.cat([tensors[0]["offsets"][:-1], tensors[1]["offsets"] + len(tensors[0]["tokens"])])
    rows = torch.cat([tensor["tokens"] for tensor in tensors])
    for k, caption in enumerate(2 * images + 1):
        assert torch.equal(second.tokens[k][second.mask[k]], rows[starts[caption] : starts[caption + 1]])


def test_assemble_cache_writes_index_last(tmp_path):
    write_cache(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["captions"] == 48
    assert not list(tmp_path.glob("*.part"))
