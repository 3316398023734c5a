"""Fixtures that several test files use: a latent cache, a model folder, and a miniature of the project that has been run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit.latents.cache import LatentCache
from helpers.cache import write_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> LatentCache:
    return write_cache(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A folder as the train stage writes it: a small transformer of random weights, for the bundled encoders."""
    from helpers.small_models import save  # which imports this file

    folder = tmp_path_factory.mktemp("model")
    save(folder)
    return folder / "dit"


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """A `Clone` in which the pipeline has been run and the run committed. Who changes it puts it back as it was."""
    from helpers.clones import Clone  # here, since it imports MLflow, which takes seconds that only these tests need

    clone = Clone(tmp_path_factory.mktemp("clone") / "project")
    clone.dvc("repro")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "first run")
    return clone
