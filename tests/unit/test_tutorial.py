"""The tutorial: both languages say the same things in the same order, and the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import REPO

DOCS = REPO / "docs"
CHAPTERS = [DOCS / "index.md", *sorted(path for path in (DOCS / "tutorial").glob("*.md") if ".zh" not in path.suffixes)]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def in_chinese(page: Path) -> Path:
    return page.with_suffix(".zh.md")


def outline(page: Path) -> list[str]:
    """What both languages share, in its order: levels of headings, commands, rows of tables, names in code, links and metrics."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found.append(re.sub(r"\s+#.*", "", line.strip()))  # comments are translated
            continue
        if line.startswith("#"):
            found.append(line.split(" ")[0])
        if line.startswith("|"):
            found.append(f"row of {line.count('|')}")
        if line.startswith(("- ", "1. ", "2. ", "3. ", "4. ")):
            found.append("item")
    return found


def named(page: Path) -> set[str]:
    """Names in code, links without their language and anchors, and metrics; where in a sentence they stand differs."""
    text = page.read_text(encoding="utf-8")
    code = set(re.findall(r"`([^`\n]+)`", text))
    links = {target.split("#")[0].replace(".zh.md", ".md") for target in re.findall(r"\]\(([^)\s]+)\)", text)}
    return code | links | set(re.findall(r"<!-- metric: (.*?) -->", text))


def test_every_chapter_is_there_in_both_languages():
    assert len(CHAPTERS) == 14
    assert {in_chinese(page) for page in CHAPTERS} == {*DOCS.rglob("*.zh.md")}


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_both_languages_are_in_step(page):
    assert outline(in_chinese(page)) == outline(page)
    assert named(in_chinese(page)) == named(page)


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_each_language_keeps_to_itself(page):
    assert not CHINESE.search(page.read_text(encoding="utf-8"))
    prose = re.sub(r"`[^`\n]*`|^    .*$|\]\([^)]*\)|<!--.*?-->", "", in_chinese(page).read_text(encoding="utf-8"), flags=re.M)
    assert len(CHINESE.findall(prose)) > len(re.findall(r"[A-Za-z]+", prose))


def test_every_chapter_is_in_the_navigation_and_listed_on_the_first_page():
    navigation = (REPO / "mkdocs.yml").read_text(encoding="utf-8")
    first = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in CHAPTERS[1:]:
        path = page.relative_to(DOCS).as_posix()
        assert f"- {path}\n" in navigation and f"({path})" in first
    assert set(re.findall(r"- ([\w-]+\.md)", navigation)) == {
        page.name for page in DOCS.glob("*.md") if ".zh" not in page.suffixes
    }


def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    chapter = (tmp_path / "site" / "zh" / "tutorial" / "06-training" / "index.html").read_text(encoding="utf-8")
    assert "梯度裁剪" in chapter
    for page in (tmp_path / "site").rglob("*.html"):
        for image in re.findall(r'<img[^>]* src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / image).is_file() or (tmp_path / "site" / image.lstrip("/")).is_file(), f"{page}: {image}"
