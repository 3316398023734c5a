"""What mkdocs.yml adds to mkdocs: the pages of docs/ also link to, and show, files of the project that lie elsewhere."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!\w+:)([^)\s#]+)(#[^)]*)?\)")


def _outside(source: str, target: str) -> str | None:
    """Return the path from the project's folder of what a page of docs/ links to; None if it lies in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), target))
    return None if path.startswith("docs/") or not (ROOT / path).is_file() else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the images above docs/ that its pages show, such as ../metrics/report/val.webp."""
    for page in list(files.documentation_pages()):
        for is_image, _, target, _ in LINK.findall(page.content_string):
            path = _outside(page.src_uri, target)
            if path and is_image and not files.get_file_from_path(path):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let images above docs/ be found, and name other files there, which are no pages of the site."""

    def moved(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[3])
        if path is None:
            return match[0]
        if not match[1]:
            return f"{match[2]} (`{path}`)"
        return f"![{match[2]}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(moved, markdown)
