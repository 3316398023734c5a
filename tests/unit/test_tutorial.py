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


# Under which heading of the questions, which tests cause the problem and see what the answer says.
CAUSED_BY = {
    "Out of memory": [
        "unit/test_training.py::test_trainer_out_of_memory_names_what_fits",
        "unit/test_encode.py::test_encode_out_of_memory_names_a_batch_size",
    ],
    "Training is slow": ["integration/test_benchmarks.py::test_training_measures_this_model_its_peers_and_encoding_first"],
    "The loss does not fall": ["unit/test_training.py::test_trainer_ends_after_max_nonfinite_steps"],
    "Images are poor": [
        "integration/test_demo.py::test_says_which_words_the_model_does_not_know",
        "unit/test_encode.py::test_encode_warns_where_the_bundled_vae_does_not_fit",
        "unit/test_memorization.py::test_measure_memorization_finds_the_planted_share",
    ],
    "A checkpoint does not load": [
        "unit/test_checkpoint.py::test_newest_skips_damaged_checkpoint",
        "integration/test_project.py::test_resume_from_other_settings_is_kept_apart",
        "integration/test_generate.py::test_generate_with_latest_checkpoint",
    ],
    "There is no network": [
        "integration/test_hub_encoders.py::test_load_problem_is_one_line",
        "integration/test_cli.py::test_check_names_missing_weights",
    ],
    "A download breaks off": ["integration/test_coco_source.py::test_fetch_resumes_truncated_bodies"],
    "The results are gone": ["integration/test_project.py::test_failed_stage_is_one_line_and_loses_nothing"],
    ".dvc/cache grows": ["integration/test_docs_commands.py::test_commands_run"],
    "MLflow shows nothing": [
        "integration/test_cli.py::test_where_names_the_way_to_mlflow",
        "integration/test_tracking.py::test_sync_runs_after_server_was_away",
    ],
    "Another machine gives other numbers": ["unit/test_training.py::test_trainer_same_seed_same_weights"],
    "May I use what I train?": ["integration/test_export.py::test_export_card"],
}  # fmt: skip


def test_every_question_has_a_test_that_causes_it():
    headings = re.findall(r"^## (.*)$", (DOCS / "tutorial" / "12-faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == list(CAUSED_BY)
    for file, name in (test.split("::") for tests in CAUSED_BY.values() for test in tests):
        assert f"def {name}(" in (REPO / "tests" / file).read_text(encoding="utf-8"), f"{file}: {name}"
