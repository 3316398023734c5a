"""The latent cache gives back what was written, and says so when it cannot."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import write_cache

from dit.errors import UserError
from dit.latents import LatentCache, sample_posterior
from dit.shards import channel_sums, mean_std


def test_images_are_numbered_through_all_shards_and_split(cache):
    assert len(cache) == 24
    assert cache.val.tolist() == [0, 1, 2, 3, 4, 5]
    assert cache.train.tolist() == list(range(6, 24))
    assert cache.latent_shape == (4, 8, 8)
    assert cache.max_tokens == 16  # the longest has 9


def test_text_is_ragged_on_disk_and_padded_only_when_read(cache):
    stored = sum(len(shard["tokens"]) for shard in cache._shards)
    assert stored == sum(3 + k % 7 for k in range(48))
    batch = cache.read(np.array([6, 20]), np.array([0.0, 0.99]), np.array([False, False]))
    assert batch.mask.sum(1).tolist() == [3 + 12 % 7, 3 + 41 % 7]
    assert not batch.tokens[~batch.mask].any()
    assert cache.captions(np.array([20, 3]))[0][1]["text"] == "caption 1 of image 20, top"


def test_a_mirrored_image_has_other_moments_unless_its_caption_has_a_side(cache):
    images, captions = np.array([9, 8]), np.array([0.0, 0.0])  # image 8's first caption says left
    plain = cache.read(images, captions, np.array([False, False])).moments
    mirrored = cache.read(images, captions, np.array([True, True])).moments
    assert not torch.equal(plain[0], mirrored[0])
    assert torch.equal(plain[1], mirrored[1])


def test_reading_is_the_same_however_images_are_sharded(tmp_path):
    one, three = write_cache(tmp_path / "one", shards=1), write_cache(tmp_path / "three", shards=3)
    for a, b in zip(
        vars(one.read(np.arange(24), np.full(24, 0.6), np.arange(24) % 2 == 0)).values(),
        vars(three.read(np.arange(24), np.full(24, 0.6), np.arange(24) % 2 == 0)).values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_texts_statistics_are_those_of_all_captions_in_all_shards(cache):
    for name in ("tokens", "pooled"):
        rows = torch.cat([shard[name] for shard in cache._shards]).float()
        assert torch.allclose(cache.text_statistics[f"{name}_mean"], rows.mean(0), atol=1e-5)
        assert torch.allclose(cache.text_statistics[f"{name}_std"], rows.std(0, correction=0), atol=1e-5)


def test_a_channel_that_never_changes_is_not_divided_by_nothing():
    mean, std = mean_std([channel_sums(torch.full((5, 2), 3.0)), channel_sums(torch.full((7, 2), 3.0))])
    assert mean.tolist() == [3, 3] and std.tolist() == [1, 1]


def test_the_posterior_is_sampled_scaled_and_shifted():
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * float(np.log(0.5)))], dim=1)
    latents = sample_posterior(moments, torch.ones(1, 4, 2, 2), scaling=2.0, shift=1.0)
    assert torch.allclose(latents, torch.full((1, 4, 2, 2), (3 + 0.5 - 1) * 2.0))


@pytest.mark.parametrize("damage", ["index", "no index", "shard", "no shard", "no text"])
def test_a_damaged_cache_is_named_in_one_line(tmp_path, damage):
    write_cache(tmp_path)
    shard, index = tmp_path / "shard-00001.safetensors", tmp_path / "index.json"
    if damage == "index":
        index.write_text("{")
    elif damage == "no index":
        index.unlink()
    elif damage == "no text":
        (tmp_path / "text.safetensors").unlink()
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        shard.unlink()
    with pytest.raises(UserError) as error:
        LatentCache(tmp_path)
    assert str(tmp_path) in str(error.value) and "dvc repro encode" in str(error.value) and "\n" not in str(error.value)


def test_the_index_comes_last_and_nothing_half_written_stays(tmp_path):
    write_cache(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["captions"] == 48
    assert not list(tmp_path.glob("*.part"))
