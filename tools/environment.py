"""Print the folder of executables of an environment that satisfies constraints.txt; make `.venv` if there is none.

    python3 tools/environment.py [--extra test]

The Python that runs this comes first: if its packages satisfy the pins, it is used as it is. Then .venv. Then .venv is made,
or brought up to date. It needs the standard library alone, and installs nothing outside .venv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml that is needed, too")
    parser.add_argument("--check", action="store_true", help="only say what this Python lacks; exit 1 if it lacks anything")
    options = parser.parse_args()

    lacking = first_unmet(*requirements(options.extra))
    if options.check:
        sys.exit(lacking)  # None is success
    if not lacking and Path(sys.executable).with_name("python").exists():  # dvc.yaml's commands say `python`
        say(f"environment: {Path(sys.executable).parent}, which satisfies constraints.txt")
        print(Path(sys.executable).parent)
        return
    if not venv_is_ready(options.extra):
        install(options.extra)
    say("environment: .venv")
    print(VENV / "bin")


def requirements(extras: list[str]) -> tuple[list[str], dict[str, str]]:
    """What pyproject.toml asks for, and the version that constraints.txt gives each distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[normalised(name)] = version
    return wanted, pins


def first_unmet(wanted: list[str], pins: dict[str, str]) -> str | None:
    """The first of the wanted distributions, or of those that they need in turn, which is absent or not at its pin.

    A requirement with a marker (a platform, a version of Python) may be absent; if it is there, it has to be at its pin.
    A build label does not count: 2.13.0+cpu satisfies 2.13.0.
    """
    queue, seen = list(wanted), set()
    while queue:
        requirement, _, marker = queue.pop().partition(";")
        name = normalised(re.match(r"[\w.-]+", requirement.strip()).group())
        if name in seen or "extra" in marker:
            continue
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if marker:
                continue
            return f"{name} is not installed"
        if name in pins and installed.version.partition("+")[0] != pins[name]:
            return f"{name} is {installed.version}, constraints.txt says {pins[name]}"
        seen.add(name)
        queue += installed.requires or []
    return None


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it: `Flask_Cors` is `flask-cors`."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def venv_is_ready(extras: list[str]) -> bool:
    """Whether .venv satisfies the pins; pip installs the project last, so that is there only after a whole installation."""
    python = VENV / "bin" / "python"
    if not python.exists() or not list(VENV.glob("lib/python*/site-packages/latent_dit-*.dist-info")):
        return False
    arguments = [argument for extra in extras for argument in ("--extra", extra)]
    check = subprocess.run([python, __file__, "--check", *arguments], capture_output=True, text=True)
    if check.returncode:
        say(f".venv is out of date: {check.stderr.strip()}")
    return check.returncode == 0


def install(extras: list[str]) -> None:
    """Make .venv where it is missing, and install the project with its pinned dependencies there."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say("making .venv")
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], stdout=sys.stderr)
        if made.returncode:
            sys.exit(f"{sys.executable} cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv")
    say("installing the pinned packages into .venv: a few minutes, about 2 GB (7 GB with a CUDA build of torch)")
    project = f".[{','.join(extras)}]" if extras else "."
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", "constraints.txt", "-e", project]
    installed = subprocess.run(pip, cwd=ROOT, stdout=sys.stderr)
    if installed.returncode:
        sys.exit("pip could not install the pinned packages: see above; run the same command again to continue")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
