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

ALL_STAGES = yaml.safe_load((REPO / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
# The watch stage has no deps: where its code can change its out it runs each time (tests/integration/test_watch_stage.py).
STAGES = {name: stage for name, stage in ALL_STAGES.items() if name != "watch"}
PACKAGES = ("dit", "stages")

# What changes no result of any stage, and why; what such a file imports does not count either.
NEUTRAL = {
    "stages/__init__.py": "reads params.yaml, starts the processes and words failures",
    "stages/dvc_files.py": "reads dvc.lock and what the watch stage has written, and brings metrics back after a failure",
    "stages/init_model.py": "finds the model to begin with; which weights it has is data/watch/init.json, a dep",
    "dit/config.py": "reads and checks the settings; those that a stage uses are its params",
    "dit/errors.py": "the class of errors",
    "dit/hub.py": "downloads from the Hub; which files, and of which commit, say those that call it",
    "stages/sleeping_threads.py": "how threads wait for each other; they compute the same",
    "dit/tracking": "reports to MLflow",
}
# What a stage imports and does not use for its result, and why.
UNUSED = {("train", "dit/encoders/builtin"): "data/latents names the hash of the weights, so it changes with them"}
READ = {"dit/encoders/loading.py": "dit/encoders/builtin"}  # files that are no modules
# Files in a room that a stage depends on as a whole and of which it uses less: editing them runs the stage once more, with the
# same result. The train stage has none.
SPARE = {
    "download": {
        "dit/dataset/aspect_ratios.py",
        "dit/dataset/image_io.py",
        "dit/dataset/reader.py",
        "dit/shapes/detector.py",
        "dit/shapes/scoring.py",
    },
    "encode": {"dit/latents/device_cache.py", "dit/utils/random.py"},
    "sample": {
        "dit/dataset/image_io.py",
        "dit/model/loss.py",
        "dit/shapes/detector.py",
        "dit/shapes/placement.py",
        "dit/shapes/render.py",
        "dit/shapes/scoring.py",
        "dit/utils/random.py",
    },
    "evaluate": {
        "dit/encoders/text.py",
        "dit/encoders/vocabulary.py",
        "dit/latents/device_cache.py",
        "dit/shapes/prompts.py",
    },
}


def module_path(name: str) -> str | None:
    """The file of a module of this project, relative to the project; None if there is no such module."""
    path = Path(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py") if path.parts[0] in PACKAGES else ()
    return next((found.as_posix() for found in candidates if (REPO / found).is_file()), None)


def is_dynamic_import(node: ast.AST) -> bool:
    """Whether `node` is import_module(f"package.{name}"); what dit/__init__.py loads lazily has other arguments."""
    name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
    return name == "import_module" and isinstance(node.args[0], ast.JoinedStr)


def imported(tree: ast.AST) -> Iterator[str]:
    """The files of this project that `tree` imports by name; the packages that they lie in are not named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif is_dynamic_import(node):
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


def is_neutral(path: str) -> bool:
    return path in NEUTRAL or str(Path(path).parent) in NEUTRAL


def needed(stage: str) -> set[str]:
    """What can change the result of `stage`: its own file, and all that this imports, directly or by way of others."""
    queue, found = [f"stages/{stage}.py"], set()
    while queue:
        path = queue.pop()
        if path not in found and not is_neutral(path) and (stage, path) not in UNUSED:
            found.add(path)
            queue += [*IMPORTS.get(path, ()), *([READ[path]] if path in READ else [])]
    return found


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in PACKAGES]


def problems(stage: str, deps: list[str], spare: set[str] = frozenset()) -> list[str]:
    """Which deps are missing or superfluous where `deps` are those of `stage`; files in `spare` may be so in a folder."""
    wanted = needed(stage)
    covered = {file: [file, *(parent.as_posix() for parent in Path(file).parents)] for file in IMPORTS | dict.fromkeys(wanted)}
    missing = [f"{file} is missing" for file in wanted if not set(covered[file]) & set(deps)]
    unused = [f"{dep} is superfluous" for dep in deps if not any(dep in covered[file] for file in wanted)]
    for folder in (dep for dep in deps if (REPO / dep).is_dir()):
        inside = {file for file in IMPORTS if folder in covered[file]} - {f"{folder}/__init__.py"}
        unused += [f"{file} in {folder} is superfluous" for file in inside - wanted - spare]
    return sorted(missing + unused)


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_what_the_stage_imports(stage):
    assert problems(stage, code_deps(stage), SPARE.get(stage, set())) == []


@pytest.mark.parametrize("stage", STAGES)
def test_deps_check_notices_a_missing_or_superfluous_one(stage):
    deps = code_deps(stage)
    for dep in deps:
        assert problems(stage, [other for other in deps if other != dep]), f"without {dep}"
    others = [file for file in IMPORTS if file not in needed(stage) and Path(file).name != "__init__.py"]
    for file in others:
        assert f"{file} is superfluous" in problems(stage, [*deps, file])
        assert f"{file} in dit is superfluous" in problems(stage, [*deps, "dit"]) or not file.startswith("dit/")


def test_deps_pipeline_is_of_the_sample_stage_alone():
    assert {stage for stage in STAGES if "dit/pipeline" in code_deps(stage)} == {"sample"}


def test_deps_are_folders():
    deps = [dep for stage in ALL_STAGES.values() for dep in stage.get("deps", []) if dep.split("/")[0] in PACKAGES]
    assert "deps" not in ALL_STAGES["watch"]
    assert len(deps) <= 35 and sum(dep.startswith("dit/") for dep in deps) <= 29


def test_deps_exceptions_are_used():
    """One that nothing imports any more goes."""
    reached = {file for stage in STAGES for path in needed(stage) for file in IMPORTS.get(path, ())}
    assert all(any(Path(file) == Path(name) or Path(name) in Path(file).parents for file in reached) for name in NEUTRAL)
    for stage, file in UNUSED:
        assert file in {other for path in needed(stage) for other in {*IMPORTS.get(path, ()), READ.get(path)}}
    for stage, files in SPARE.items():
        unused = {line.split()[0] for line in problems(stage, code_deps(stage))}
        assert files == unused


def test_deps_packages_only_define():
    """Whoever imports a module runs the __init__.py of its package, too, which is no dep: so that may only define and import."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for path in (file for file in IMPORTS if file.endswith("__init__.py")):
        for node in ast.parse((REPO / path).read_text(encoding="utf-8")).body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_types = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            assert is_text or is_types or isinstance(node, harmless), path
