"""What a clean clone promises: pinned dependencies, exact stages, and files that are the same bytes everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools.satisfies_pins import first_unmet, normalise, read_pins

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def all_requirements() -> list[str]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return PROJECT["build-system"]["requires"] + project["dependencies"] + [name for extra in extras for name in extra]


def test_constraints_pin_every_dependency():
    names = {normalise(re.match(r"[\w.-]+", requirement).group()) for requirement in all_requirements()}
    assert len(names) >= 20 and names <= set(read_pins())


def test_constraints_agree_with_versions_in_pyproject():
    pins, named = read_pins(), dict(requirement.split("==") for requirement in all_requirements() if "==" in requirement)
    assert set(named) >= {"torch", "setuptools"} and all(pins[name] == version for name, version in named.items())


def test_constraints_are_exact_versions_and_nothing_else():
    pins = read_pins()
    assert len(pins) > 100 and all(re.fullmatch(r"\d+(\.\w+)*", version) for version in pins.values())
    assert not re.search(r"://|@|/work|/home|/opt", (ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_pyproject_says_what_every_dependency_is_for():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    for requirement in all_requirements():
        line = next(line for line in lines if f'"{requirement}"' in line)
        assert re.search(r"#\s+\S+ \S+", line), f"{requirement}: no reason given"


@pytest.mark.parametrize(
    ("wanted", "pins", "says"),
    [
        ("pyyaml", {"pyyaml": "0.1"}, "constraints.txt says 0.1"),
        ("no-such-distribution >=1", {}, "no-such-distribution is not installed"),
        ("pytest", {"pluggy": "0.1"}, "pluggy is "),  # what a dependency needs counts, too
        ("no-such-distribution; sys_platform == 'plan9'", {}, None),
    ],
)
def test_pins_that_are_not_met_are_named(wanted, pins, says):
    problem = first_unmet([wanted], pins)
    assert problem is None if says is None else says in problem


def test_pins_are_met_by_this_environment():
    check = subprocess.run([sys.executable, ROOT / "tools" / "satisfies_pins.py", "test"], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_ci_script_is_executable():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"repro", "lint", "test", "test-all", "clean", "help"} <= {line.split()[0] for line in shown.splitlines() if line}


def test_text_files_have_no_carriage_returns():
    # -z: names with any character; eol in the index, and in the working tree
    listed = subprocess.run(["git", "ls-files", "-z", "--eol"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    entries = [entry for entry in listed.stdout.split("\0") if entry]
    assert entries
    assert [entry for entry in entries if re.search(r"[iw]/(crlf|mixed)", entry.partition("\t")[0])] == []


def test_bundled_encoders_are_small():
    weights = list((ROOT / "dit" / "encoders" / "builtin").rglob("*.safetensors"))
    assert len(weights) >= 2  # a VAE and a CLIP
    assert sum(path.stat().st_size for path in weights) < 8.7e6
