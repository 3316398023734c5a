"""What a clean clone promises: pinned dependencies, exact stages, and files that are the same bytes everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tools.environment import first_unmet, normalised

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def all_requirements() -> list[str]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return PROJECT["build-system"]["requires"] + project["dependencies"] + [name for extra in extras for name in extra]


def test_every_dependency_is_pinned():
    pinned = {normalised(name) for name in constraints()}
    names = {normalised(re.match(r"[\w.-]+", requirement).group()) for requirement in all_requirements()}
    assert len(names) >= 20
    assert names <= pinned


def test_a_version_that_pyproject_names_is_the_pinned_one():
    pins = {normalised(name): version for name, version in constraints().items()}
    named = [requirement.split("==") for requirement in all_requirements() if "==" in requirement]
    assert {name for name, _ in named} >= {"torch", "setuptools"}
    assert all(pins[name] == version for name, version in named)


def test_constraints_are_exact_versions_and_nothing_else():
    pins = constraints()
    assert len(pins) > 100
    for name, version in pins.items():
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*", name), name
        assert re.fullmatch(r"\d+(\.\w+)*", version), f"{name}: {version}: a build label or an address"
    assert not re.search(r"://|@|/work|/home|/opt", (ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_every_dependency_says_what_it_is_for():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for requirement in all_requirements():
        line = next(line for line in lines if f'"{requirement}"' in line)
        assert re.search(r"#\s+\S+ \S+", line), f"{requirement}: no reason given"


def test_a_pin_that_is_not_met_is_named():
    assert first_unmet(["pyyaml"], {"pyyaml": "0.1"}).endswith("constraints.txt says 0.1")
    assert first_unmet(["no-such-distribution >=1"], {}) == "no-such-distribution is not installed"
    assert first_unmet(["no-such-distribution; sys_platform == 'plan9'"], {}) is None


def test_what_a_dependency_needs_counts_too():
    assert first_unmet(["pytest"], {"pluggy": "0.1"}).startswith("pluggy is ")


def test_this_environment_satisfies_the_pins():
    check = subprocess.run(
        [sys.executable, ROOT / "tools" / "environment.py", "--check", "--extra", "test"], capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize(
    ("stage", "blocks"),
    [
        ("download", ["recipe", "${recipe}.data"]),
        ("encode", ["recipe", "${recipe}.encode"]),
        ("train", ["recipe", "${recipe}.model", "${recipe}.optim", "train"]),
        ("sample", ["recipe", "sample"]),
        ("evaluate", ["recipe", "evaluate"]),
    ],
)
def test_a_stage_tracks_the_settings_it_uses(stage, blocks):
    assert STAGES[stage]["params"] == blocks


def test_the_stages_are_six_and_run_as_modules():
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {
        name: f"python -m stages.{name}" for name in ("download", "encode", "train", "sample", "evaluate", "report")
    }


def test_editing_the_sampler_does_not_retrain():
    upstream = {dep for name in ("download", "encode", "train") for dep in STAGES[name]["deps"]}
    assert "dit/pipeline.py" in STAGES["sample"]["deps"]
    assert upstream.isdisjoint({"dit/pipeline.py", "stages/sample.py", "dit", "dit/encoders", "stages"})


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, "not executable"
    assert "make test" in script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")


def test_make_says_what_it_can_do():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"repro", "test", "test-all", "clean", "help"} <= {line.split()[0] for line in shown.splitlines() if line}


def test_text_files_have_no_carriage_returns():
    # -z: names with any character; eol in the index, and in the working tree
    listed = subprocess.run(["git", "ls-files", "-z", "--eol"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    entries = [entry for entry in listed.stdout.split("\0") if entry]
    assert entries
    assert [entry for entry in entries if re.search(r"[iw]/(crlf|mixed)", entry.partition("\t")[0])] == []


def test_the_encoders_in_the_box_are_small():
    weights = list((ROOT / "dit" / "encoders" / "builtin").rglob("*.safetensors"))
    assert len(weights) >= 2  # a VAE and a CLIP
    assert sum(path.stat().st_size for path in weights) < 8e6
