"""Every command of README.md and docs/ is run, page by page, in a clone with small settings, or the reason against it is given.

The Chinese pages have the same commands (tests/unit/test_tutorial.py).
"""

from __future__ import annotations

import re
import subprocess
import time

import pytest

from helpers import REPO
from helpers.clones import Clone, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCS = sorted(path for path in (REPO / "docs").rglob("*.md") if ".zh" not in path.suffixes)
PAGES = ["README.md", *(path.relative_to(REPO).as_posix() for path in DOCS)]
PROGRAMS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:git|make|dvc|dit|python|pip|mlflow|accelerate|docker|export|printf|ln|\.) ")
# What is not run here, and why, or which test does it.
ELSEWHERE = {
    r"git clone <this repository>": "what the clones of these tests stand for",
    r"make (PYTHON=\S+ )?repro|python -m venv|^\. |pip (install|wheel)": "an environment: tests/integration/test_install.py",
    r"python -m pytest": "is this",
    r"recipe=(coco|folder|hub|webdataset)": "needs the Hub; test_docs.py checks the settings, test_coco_source.py runs a recipe",
    r"evaluate.features=facebook": "needs the Hub: tests/unit/test_image_features.py",
    r"examples/first_hour.py": "the last test of this file",
    r"^dit push (?!.*--dry-run)|--model anna/": "the Hub: tests/integration/test_push.py and test_hub_models.py",
    r"examples/new_colour.py": "tests/integration/test_new_colour.py",
    r"init_from=models|--lora": "another model to begin with, adapters: test_going_on.py, test_lora_commands.py",
    r"^docker": "needs Docker",
    r"^mlflow (ui|server)|MLFLOW_TRACKING": "a server: tests/integration/test_tracking.py and test_sweep.py",
    r"^dit demo": "a server: tests/integration/test_demo.py",
    r"^dit benchmark": "up to a quarter of an hour: tests/integration/test_benchmarks.py runs small ones",
    r"dvc (remote|push|pull|get|import|exp push|exp list|exp pull)|Storage": "a storage: tests/integration/test_sharing.py",
    r"allow-missing|exp apply wide": "several machines: tests/integration/test_sweep.py",
    r"accelerate launch|num_processes=4|dvc commit -f train|^ln ": "several processes: test_kill_training.py, test_hosts.py",
    r"stages.encode --part": "several machines: test_encode_processes.py",
    r"--checkpoint latest": "a training that still runs: tests/integration/test_generate.py",
    r"stages.train --resume": "tests/integration/test_project.py",
}


def commands(page: str) -> list[str]:
    lines = re.findall(r"^    (\S.*)$", (REPO / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines if PROGRAMS.match(line)]


def elsewhere(command: str) -> bool:
    return any(re.search(pattern, command) for pattern in ELSEWHERE)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    clone = Clone(tmp_path_factory.mktemp("docs") / "project")
    clone.dvc("repro")
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "first run")
    return clone


def test_every_reason_is_of_a_command():
    everything = [command for page in PAGES for command in commands(page)]
    assert len(everything) > 120 and sum(not elsewhere(command) for command in everything) > 50
    assert [pattern for pattern in ELSEWHERE if not any(re.search(pattern, command) for command in everything)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if not all(map(elsewhere, commands(page)))])
def test_commands_run(clone, page):
    for command in commands(page):
        if elsewhere(command):
            continue
        done = subprocess.run(
            ["bash", "-c", command], cwd=clone.root, env=environment(clone.root), input="y\n", capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        while command == "dvc queue start" and re.search("Queued|Running", clone.dvc("queue", "status").stdout):
            time.sleep(2)
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("exp", "remove", "--all-commits", check=False)  # there may be none; another page uses the same names
    (clone.root / ".dvc" / "config.local").unlink(missing_ok=True)
    clone.dvc("checkout", "--force")


def test_the_first_hour_runs_and_is_not_repeated(clone):
    before = (clone.root / "params.yaml").read_text(), clone.run("git", "status", "--porcelain", "-uno").stdout
    done = clone.run("python", "examples/first_hour.py")
    assert "seed-1" in done.stdout
    for name in ("drawn", "changed", "lavender", "compared"):
        assert (clone.root / "first_hour" / f"{name}.png").is_file()
    again = clone.run("python", "examples/first_hour.py")
    assert "guided is there already" in again.stdout and "new_colour/ is there already" in again.stdout
    assert "Running stage 'train'" not in again.stdout
    assert ((clone.root / "params.yaml").read_text(), clone.run("git", "status", "--porcelain", "-uno").stdout) == before
