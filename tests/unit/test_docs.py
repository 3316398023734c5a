"""The pages of README.md and docs/ agree with the code, the settings and the metrics that they speak of."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from dit.cli import build_parser
from helpers import REPO
from tools.readme_figures import check, main, pages, refresh, write_value

PAGES = [*pages(REPO), REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md"]
TEXTS = {page.relative_to(REPO).as_posix(): page.read_text(encoding="utf-8") for page in PAGES if page.is_file()}
CURRENT = {name: text for name, text in TEXTS.items() if name != "CHANGELOG.md"}  # which may speak of what was
CODE = re.compile(r"`([^`\n]+)`|^(?: {4}|\t)(\S.*)$", re.MULTILINE)  # inline, or a line of a block
PATH_LIKE = re.compile(r"(?<![\w/.-])((?:dit|stages|tools|tests|docs|metrics)/[\w./-]*\w/?)(?![\w<*{…])")
NOT_IN_GIT = ("metrics/mlflow.json",)


def code_of(text: str) -> Iterator[str]:
    """The commands and names of a page: what stands in backticks, and the lines of indented and fenced blocks."""
    for fenced in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from fenced.splitlines()
    for inline, line in CODE.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        yield inline or line


@pytest.mark.parametrize("name", TEXTS)
def test_no_line_begins_with_a_comment(name):
    """The site's Markdown takes such a line for HTML, and ends the paragraph or the list that it stands in."""
    assert not re.findall(r"^ *<!--.*-->.*\w.*$", TEXTS[name], re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((dict(action.choices) for action in actions), {})


def test_metrics_on_pages_are_those_of_the_committed_run():
    assert list(check(REPO)) == []


def test_readme_has_at_most_150_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (REPO / page).parent / path if path else REPO / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", CURRENT)
def test_paths_on_pages_exist(page):
    named = {path for code in code_of(CURRENT[page]) for path in PATH_LIKE.findall(code)}
    assert sorted(path for path in named if not (REPO / path).exists() and path not in NOT_IN_GIT) == []


def test_every_path_of_the_library_on_pages_is_found_by_the_check():
    assert sum(path.endswith(".py") for code in code_of(TEXTS["docs/architecture.md"]) for path in PATH_LIKE.findall(code)) > 40


@pytest.mark.parametrize("page", CURRENT)
def test_commands_of_dit_on_pages_exist(page):
    known = subcommands(build_parser())
    for code in code_of(CURRENT[page]):
        for command, rest in re.findall(r"(?:^|[\s`$&|(])dit ([a-z][\w-]*)(.*)", code):
            assert command in known, f"{page}: dit {command}"
            below = subcommands(known[command])
            word = re.match(r" +([a-z]\w*)", rest)
            assert not (below and word) or word[1] in below, f"{page}: dit {command} {word[1]}"


@pytest.mark.parametrize("page", CURRENT)
def test_make_targets_on_pages_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {target for code in code_of(CURRENT[page]) for target in re.findall(r"\bmake (?:\w+=\S+ )*([a-z][a-z-]*)", code)}
    assert named <= targets


@pytest.mark.parametrize("page", CURRENT)
def test_settings_on_pages_are_keys_of_params_yaml(page):
    params = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
    for code in code_of(CURRENT[page]):
        for setting in re.findall(r"-S '?([\w.]+)=", code):
            block = params
            for key in setting.split("."):
                assert key in block, f"{page}: {setting}"
                block = block[key]


def rows_of_path() -> list[tuple[str, str, str]]:
    """(number, file, names) of the table in docs/architecture.md that follows one image and one caption."""
    return re.findall(r"^\| (\d+) \| `(\S+?\.py)` \| (.*?) \|", TEXTS["docs/architecture.md"], re.MULTILINE)


def test_path_of_an_image_counts_its_files():
    rows = rows_of_path()
    assert [int(number) for number, _, _ in rows] == list(range(1, len(rows) + 1))
    assert len({file for _, file, _ in rows}) == len(rows)
    assert f"**{len(rows)} files**" in TEXTS["docs/architecture.md"]


@pytest.mark.parametrize(("file", "names"), [(file, names) for _, file, names in rows_of_path()])
def test_path_of_an_image_names_what_the_files_define(file, names):
    source = (REPO / file).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.]+)`", names):
        for part in name.split("."):
            assert re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.* = ", source, re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("name", re.findall(r"`(dit(?:\.\w+)+)", TEXTS["docs/architecture.md"]))
def test_modules_in_architecture_exist(name):
    parts = name.split(".")
    files = [REPO.joinpath(*parts[:k]) for k in range(len(parts), 0, -1)]
    assert any(file.with_suffix(".py").exists() or (file / "__init__.py").exists() for file in files[:2]), name


def test_refresh_writes_values_and_says_what_differed(tmp_path):
    (tmp_path / "train.json").write_text('{"seconds": 249.45, "share": 0.9644}')
    (tmp_path / "table.csv").write_text("group,things,accuracy\nval,1,1.0\nval,2,0.9644\n")
    text = (
        "one\n<!-- metric: train.seconds duration -->1 s<!-- /metric -->\n"
        "<!-- metric: 100*table[val,2].accuracy .0f -->96<!-- /metric -->\n"
    )
    refreshed, problems = refresh(text, tmp_path)
    assert "-->4 min 9 s<!--" in refreshed and "-->96<!--" in refreshed
    assert problems == [(2, "train.seconds is 4 min 9 s, not 1 s")]
    assert refresh(refreshed, tmp_path) == (refreshed, [])


@pytest.mark.parametrize(
    "place",
    [
        "<!-- metric: train.missing d -->1<!-- /metric -->",
        "<!-- metric: nofile.seconds d -->1<!-- /metric -->",
        "<!-- metric: table[val,9].accuracy d -->1<!-- /metric -->",
        "<!-- metric: train d -->1<!-- /metric -->",
        "<!-- metric: train.seconds -->1<!-- /metric -->",
        "<!-- metric: train.seconds d -->1",
    ],
)
def test_refresh_reports_places_that_it_cannot_fill(place, tmp_path):
    (tmp_path / "train.json").write_text('{"seconds": 1}')
    (tmp_path / "table.csv").write_text("group,things,accuracy\nval,1,1.0\n")
    refreshed, problems = refresh(place, tmp_path)
    assert refreshed == place and {line for line, _ in problems} == {1}


def test_check_names_file_and_line_and_fails(tmp_path, capsys):
    project(tmp_path)
    assert main(["--check"], tmp_path) == 1
    assert "README.md:3: train.steps is 4,030, not 12" in capsys.readouterr().err


def test_a_rewritten_page_passes_the_check(tmp_path):
    project(tmp_path)
    assert main([], tmp_path) == main(["--check"], tmp_path) == 0


def project(folder: Path) -> None:
    """A README.md with a number that is out of date."""
    (folder / "metrics").mkdir()
    (folder / "docs").mkdir()
    (folder / "metrics" / "train.json").write_text('{"steps": 4030}')
    (folder / "README.md").write_text("# T\n\nsteps: <!-- metric: train.steps ,d -->12<!-- /metric -->\n")


WRITTEN = [(0.978, ".3f", "0.978"), (4030, ",d", "4,030"), (59.6, "duration", "1 min 0 s")]


@pytest.mark.parametrize(("value", "spec", "written"), WRITTEN)
def test_values_are_written_as_asked(value, spec, written):
    assert write_value(value, spec) == written


def test_every_place_that_asks_for_a_gpu_is_listed():
    listed = set(
        re.findall(r"`((?:dit|stages)/[\w/.]+)`", TEXTS["docs/performance.md"].split("## What an RTX 4090")[1].split("\n## ")[0])
    )
    for folder in ("dit", "stages"):
        for path in (REPO / folder).rglob("*.py"):
            if re.search(r"torch\.cuda\.|\bis_cuda\b|== \"cuda\"", path.read_text(encoding="utf-8")):
                name = path.relative_to(REPO).as_posix()
                assert name in listed or f"{Path(name).parent.as_posix()}/" in listed, name
