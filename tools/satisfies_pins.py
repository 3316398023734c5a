"""Exit with 0 if this Python's packages satisfy constraints.txt, else with a line that names the first one that does not.

    python tools/satisfies_pins.py [EXTRA ...]

Only what pyproject.toml asks for counts, with these extras, and what that needs in turn. Needs the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def normalise(name: str) -> str:
    """Spell a distribution's name as PEP 503 compares it: `Flask_Cors` is `flask-cors`."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def read_pins() -> dict[str, str]:
    """Return the version that constraints.txt gives each distribution."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalise(name): version for name, version in pairs}


def first_unmet(wanted: list[str], pins: dict[str, str]) -> str | None:
    """Name the first of the wanted distributions, or of those that they need, which is absent or not at its pin.

    A requirement with a marker (a platform, a version of Python) may be absent; if it is there, it has to be at its pin.
    A build label does not count: 2.13.0+cpu satisfies 2.13.0.
    """
    queue, seen = list(wanted), set()
    while queue:
        requirement, _, marker = queue.pop().partition(";")
        name = normalise(re.match(r"[\w.-]+", requirement.strip()).group())
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


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.12")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *(name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra])]
    sys.exit(first_unmet(needed, read_pins()))  # None is success
