"""The fit of the bundled VAE, in a few steps; how good the bundled one is, is in test_encoders.py and test_detector.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Object, Scene
from tools.fit_encoders.fit import main, render_scenes
from tools.fit_encoders.scene_labels import CODE, scene_code
from tools.fit_encoders.vae import CELLS, drawing_error, fit_vae, pixels_to_tensor


@pytest.fixture(scope="module")
def examples() -> tuple[np.ndarray, torch.Tensor]:
    images, _, scenes = render_scenes(48, 4444)
    return images, torch.from_numpy(np.stack([scene_code(scene, CELLS) for scene in scenes]))


def test_scene_code_tells_the_same_of_an_object_from_each_of_its_places():
    heart = Scene((Object("pink", "heart"),), ((0.3, 0.6),), (0.2,), "white to cream", (10.0,))
    code = scene_code(heart, CELLS)
    centres = (np.arange(CELLS) + 0.5) / CELLS
    rows, columns = np.nonzero(code[SHAPES.index("heart")])
    assert sorted({*rows}) == [3, 4, 5] and sorted({*columns}) == [1, 2, 3]  # those with their centre in the bounding box
    assert not code[[k for k in range(len(SHAPES)) if SHAPES[k] != "heart"]].any()
    inside = code[:, rows, columns]
    assert np.allclose(centres[columns] + inside[9] / 4, 0.3) and np.allclose(centres[rows] + inside[10] / 4, 0.6)
    assert np.allclose(inside[6:9].T, np.array(COLOURS["pink"]) / 127.5 - 1) and np.allclose(inside[12], 0.5)
    top, bottom = (np.array(colour) / 127.5 - 1 for colour in BACKGROUNDS["white to cream"])
    assert np.allclose(code[13:, 0].T, top) and np.allclose(code[13:, -1].T, bottom)
    outside = np.ones((CELLS, CELLS), bool)
    outside[rows, columns] = False
    assert not code[:13, outside].any()


def test_fit_vae_learns_and_has_one_posterior_variance(examples):
    images, codes = examples
    vae = fit_vae(images, codes, np.linspace(0, 1, len(images)), encoder_steps=12, decoder_steps=2, steps=2)
    with torch.no_grad():
        posterior = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist
        means = vae.encode(pixels_to_tensor(images)).latent_dist.mean
    assert posterior.logvar.unique().numel() == 1 and posterior.mean.shape == (1, CODE, CELLS, CELLS)
    assert vae.config.scaling_factor == 1 and not vae.training
    codes = (codes - codes.mean((0, 2, 3), keepdim=True)) / codes.std((0, 2, 3), keepdim=True)
    assert (means - codes).square().mean() < 0.95  # 1 for latents of 0


def test_drawing_error_counts_edges():
    flat, shifted, soft = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)
    soft[..., 2] = 1
    assert drawing_error(shifted, flat) == 0.25  # no edge is wrong
    assert drawing_error(soft, flat) == 0.25 + 2 / 3


def test_fit_refuses_an_encoder_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit", "t5"])
    with pytest.raises(SystemExit):
        main()
    assert "no such encoder: t5; clip and vae are there" in capsys.readouterr().err
