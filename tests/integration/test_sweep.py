"""A sweep over two machines: each runs its own experiment; git, a bucket and MLflow's server are what they share."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from helpers.clones import environment
from helpers.remotes import s3_storage
from helpers.team import Team, clone_of, files, form_team, set_own
from helpers.tracking_server import mlflow_server

WIDTHS = {"narrow": 16, "wide": 48}


def run_experiment(team: Team, name: str, width: int, server: str, printed: dict[str, str]) -> None:
    """What docs/scaling.md says that each machine types, in a clone that has no data."""
    machine = clone_of(team.hub, team.place / name)
    set_own(machine, team.storage)
    setting = f"shapes.model.hidden_size={width}"
    for command in (["run", "--pull", "--allow-missing", "-n", name, "-S", setting], ["push", "origin", name]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "exp", *command],
            cwd=machine.root,
            env=environment(machine.root) | {"MLFLOW_TRACKING_URI": server},
            capture_output=True,
            text=True,
        )
        printed[name] = printed.get(name, "") + done.stdout
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_sweep_over_two_machines(clone, tmp_path):
    with s3_storage(tmp_path) as storage, mlflow_server(tmp_path / "server") as server:
        team = form_team(clone, tmp_path, storage)
        team.owner.dvc("push")
        printed: dict[str, str] = {}
        machines = [
            threading.Thread(target=run_experiment, args=(team, name, width, server.address, printed))
            for name, width in WIDTHS.items()
        ]
        for machine in machines:
            machine.start()
        for machine in machines:
            machine.join()
        assert all("Running stage 'train'" in printed[name] for name in WIDTHS)
        assert not any("Running stage 'encode'" in printed[name] for name in WIDTHS)
        looker = team.colleague()
        for name, width in WIDTHS.items():
            looker.dvc("exp", "pull", "origin", name)
            looker.dvc("exp", "apply", name)
            assert f"hidden_size: {width}" in (looker.root / "params.yaml").read_text()
            assert files(looker.root / "models" / "dit") == files(team.place / name / "project" / "models" / "dit")
        compared = subprocess.run(
            [sys.executable, "-m", "dit.cli", "compare", "narrow", "wide", "--output", str(tmp_path / "compare.png")],
            cwd=looker.root,
            env=environment(looker.root) | {"MLFLOW_TRACKING_URI": server.address},
            capture_output=True,
            text=True,
        )
        assert compared.returncode == 0, compared.stderr
        assert "narrow" in compared.stdout and "wide" in compared.stdout and "model.hidden_size" in compared.stdout
        assert (tmp_path / "compare.png").stat().st_size > 10_000
