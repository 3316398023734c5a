"""The race: its loop is the trainer's, and its networks are called alike."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dit.benchmark import race
from dit.benchmark.peers import PEERS
from dit.benchmark.speedrun import Point
from helpers.cache import write_cache
from helpers.training import MODEL, OPTIM, TRAIN, run, same


@pytest.fixture
def cache(tmp_path):
    return write_cache(tmp_path / "latents")


def settings(**train) -> SimpleNamespace:
    return SimpleNamespace(train=replace(TRAIN, **train), active=SimpleNamespace(model=MODEL, optim=OPTIM))


def test_loop_trains_as_the_trainer(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "STOPS", 3)
    network = PEERS["this-model"](cache, settings())
    stops = list(race.train_in_stops(network, cache, settings()))
    assert [step for step, _, _ in stops] == [3, 6, 9]
    assert stops[0][1] < stops[1][1] < stops[2][1]
    trained, _ = run(cache, tmp_path / "state")
    assert same(stops[-1][2], trained) and not same(stops[0][2], trained)


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_the_same_arguments_and_learn(cache, name):
    torch.manual_seed(0)
    network = PEERS[name](cache, settings())
    latents, timesteps = torch.randn(2, *cache.latent_shape), torch.rand(2)
    text, pooled = torch.randn(2, 9, cache.cross_attention_dim), torch.randn(2, cache.pooled_projection_dim)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append((network(latents, timesteps, text, mask, pooled) - latents).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        out = network(latents, timesteps, text, mask, pooled)
        assert out.shape == latents.shape
        padded = torch.where(mask[:, :, None], text, 50.0)
        assert torch.allclose(out, network(latents, timesteps, padded, mask, pooled), atol=1e-4)
        assert not torch.allclose(out, network(latents, timesteps, text.flip(1), mask, pooled), atol=1e-4)
        assert not torch.allclose(out, network(latents, timesteps / 2, text, mask, pooled), atol=1e-4)


def test_row_names_the_first_stop_at_each_goal():
    points = [Point(10, 1.0, 0.4, 9), Point(20, 2.0, 0.85, 9), Point(30, 3.0, 0.7, 9)]
    row = race.race_row("sit", 2_490_000, points)
    reached = "2 s, 20 steps"
    assert row == ("sit", "2.49 M", reached, reached, "not reached", "not reached", "0.700 after 3 s, 30 steps")
