"""dvc.yaml's deps are what each stage imports: editing a file runs again the stages whose result it can change, and no other.

Imports are read, not run, wherever in a file they stand. A folder that is a dep covers the files in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import REPO

STAGES = yaml.safe_load((REPO / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
PACKAGES = ("dit", "stages")

# What changes no result of any stage, and why; what such a file imports does not count either.
NEUTRAL = {
    "stages/__init__.py": "reads params.yaml, starts the processes, words failures and brings metrics back after one",
    "stages/runs.py": "reports a training to MLflow",
    "dit/config.py": "reads and checks the settings; those that a stage uses are its params",
    "dit/errors.py": "the class of errors",
    "dit/tracking.py": "reports to MLflow",
}
# What a stage imports and does not use for its result, and why.
UNUSED = {
    ("encode", "dit/sources/usable.py"): "dataset.py reads metadata.json with it, and refuses names that leave the folder",
    ("sample", "dit/sources/usable.py"): "as for encode",
    ("evaluate", "dit/sources/usable.py"): "as for encode",
    ("sample", "dit/sources/storage.py"): "dataset.py writes images with it; only metadata.json is read here",
    ("train", "dit/encoders/builtin"): "data/latents names the hash of the weights, so it changes with them",
}
READ = {"dit/encoders/repository.py": "dit/encoders/builtin"}  # files that are no modules


def module_path(name: str) -> str | None:
    """The file of a module of this project, relative to the project; None if there is no such module."""
    path = Path(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py") if path.parts[0] in PACKAGES else ()
    return next((found.as_posix() for found in candidates if (REPO / found).is_file()), None)


def imported(tree: ast.AST) -> Iterator[str]:
    """The files of this project that `tree` imports by name; the packages that they lie in are not named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            package = node.args[0].values[0].value.rstrip(".")  # of f"package.{name}"
            names = [(f"{package}.{path.stem}",) for path in (REPO / package.replace(".", "/")).glob("[!_]*.py")]
        else:
            continue
        for alternatives in names:
            yield from [path for name in alternatives if (path := module_path(name))][:1]


IMPORTS = {
    path.relative_to(REPO).as_posix(): set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    for package in PACKAGES
    for path in (REPO / package).rglob("*.py")
}


def needed(stage: str) -> set[str]:
    """What can change the result of `stage`: its own file, and all that this imports, directly or by way of others."""
    queue, found = [f"stages/{stage}.py"], set()
    while queue:
        path = queue.pop()
        if path not in found and path not in NEUTRAL and (stage, path) not in UNUSED:
            found.add(path)
            queue += [*IMPORTS.get(path, ()), *([READ[path]] if path in READ else [])]
    return found


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in PACKAGES]


def problems(stage: str, deps: list[str]) -> list[str]:
    """Which deps are missing or superfluous where `deps` are those of `stage`."""
    wanted = needed(stage)
    covered = {file: [file, *(parent.as_posix() for parent in Path(file).parents)] for file in IMPORTS | dict.fromkeys(wanted)}
    missing = [f"{file} is missing" for file in wanted if not set(covered[file]) & set(deps)]
    unused = [f"{dep} is superfluous" for dep in deps if not any(dep in covered[file] for file in wanted)]
    for folder in (dep for dep in deps if (REPO / dep).is_dir()):
        inside = {file for file in IMPORTS if folder in covered[file]} - {f"{folder}/__init__.py"}
        unused += [f"{file} in {folder} is superfluous" for file in inside - wanted]
    return sorted(missing + unused)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_it_imports_and_on_nothing_else(stage):
    assert problems(stage, code_deps(stage)) == []


@pytest.mark.parametrize("stage", STAGES)
def test_that_a_dep_is_missing_or_superfluous_would_be_noticed(stage):
    deps = code_deps(stage)
    for dep in deps:
        assert problems(stage, [other for other in deps if other != dep]), f"without {dep}"
    others = [file for file in IMPORTS if file not in needed(stage) and Path(file).name != "__init__.py"]
    for file in others:
        assert f"{file} is superfluous" in problems(stage, [*deps, file])
        assert f"{file} in dit is superfluous" in problems(stage, [*deps, "dit"]) or not file.startswith("dit/")


def test_the_pipeline_and_the_schedulers_draw_again_and_never_train_again():
    for file in ("dit/pipeline.py", "dit/schedulers.py"):
        assert {stage for stage in STAGES if file in code_deps(stage)} == {"sample"}
        assert file not in NEUTRAL and file not in needed("train")


def test_the_exceptions_are_used():
    """One that nothing imports any more goes."""
    reached = {file for stage in STAGES for path in needed(stage) for file in IMPORTS.get(path, ())}
    assert set(NEUTRAL) <= reached
    for stage, file in UNUSED:
        assert file in {other for path in needed(stage) for other in {*IMPORTS.get(path, ()), READ.get(path)}}


def test_a_package_only_defines():
    """Whoever imports a module runs the __init__.py of its package, too, which is no dep: so that may only define and import."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in (file for file in IMPORTS if file.endswith("__init__.py")):
        body = ast.parse((REPO / path).read_text(encoding="utf-8")).body
        done = [node for node in body if not isinstance(node, harmless)]
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in done), path
