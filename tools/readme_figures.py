"""Bring the metrics in README.md and docs/*.md up to date with metrics/, or check that they are.

    python tools/readme_figures.py            rewrite the marked places
    python tools/readme_figures.py --check    name each place that differs, with file and line, and exit with 1

A marked place is invisible on GitHub but for its value:

    <!-- metric: evaluate.prompt_accuracy .3f -->0.978<!-- /metric -->
    <!-- metric: 100*accuracy_by_number[val,2].accuracy .0f -->96<!-- /metric -->

It names a key of metrics/evaluate.json, or a row (by its first cells) and a column of metrics/accuracy_by_number.csv; then how to
write it: a format specification of Python, or `duration`. `100*` makes percent of a share.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"(<!-- metric: (?P<what>\S+) (?P<spec>\S+) -->)(?P<value>[^<]*)(<!-- /metric -->)")
WHAT = re.compile(r"(?P<percent>100\*)?(?P<file>\w+)(\[(?P<row>[^\]]+)\])?\.(?P<key>\w+)$")
MARK = re.compile(r"<!-- /?metric")


def pages(root: Path) -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def look_up(what: str, metrics: Path) -> float:
    """Return the number that `what` names; raises `ValueError` with the reason if there is none."""
    parts = WHAT.match(what)
    if not parts:
        raise ValueError(f"{what}: not of the form file.key or file[row].column")
    try:
        if parts["row"]:
            with (metrics / f"{parts['file']}.csv").open(encoding="utf-8", newline="") as lines:
                rows = list(csv.DictReader(lines))
            cells = parts["row"].split(",")
            values = next(row for row in rows if list(row.values())[: len(cells)] == cells)
        else:
            values = json.loads((metrics / f"{parts['file']}.json").read_text(encoding="utf-8"))
        return float(values[parts["key"]]) * (100 if parts["percent"] else 1)
    except (OSError, KeyError, StopIteration) as error:
        raise ValueError(f"{what}: not in {metrics.name}/ ({type(error).__name__})") from None


def write_value(value: float, spec: str) -> str:
    """Return `value` as `spec` says: "249 s" or "4 min 9 s" for `duration`; thousands with `,d` are rounded first."""
    if spec == "duration":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return format(round(value) if spec.endswith("d") else value, spec)


def refresh(text: str, metrics: Path) -> tuple[str, list[tuple[int, str]]]:
    """Return `text` with all marked places up to date, and (line, what was wrong) for each place that was not."""
    problems: list[tuple[int, str]] = []

    def replace(place: re.Match[str]) -> str:
        line = text.count("\n", 0, place.start()) + 1
        try:
            value = write_value(look_up(place["what"], metrics), place["spec"])
        except ValueError as error:
            problems.append((line, str(error)))
            return place[0]
        if value != place["value"]:
            problems.append((line, f"{place['what']} is {value}, not {place['value']}"))
        return f"{place[1]}{value}{place[5]}"

    refreshed = PLACE.sub(replace, text)
    for stray in MARK.finditer(PLACE.sub(lambda place: "\n" * place[0].count("\n"), text)):
        problems.append((text.count("\n", 0, stray.start()) + 1, "a mark that is not of the form of the others"))
    return refreshed, problems


def check(root: Path) -> Iterator[str]:
    """Yield "file:line: problem" for each marked place that differs from the metrics."""
    for page in pages(root):
        _, problems = refresh(page.read_text(encoding="utf-8"), root / "metrics")
        yield from (f"{page.relative_to(root).as_posix()}:{line}: {problem}" for line, problem in problems)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrite or check all pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a place differs")
    if not parser.parse_args(argv).check:
        for page in pages(root):
            text = page.read_text(encoding="utf-8")
            refreshed, _ = refresh(text, root / "metrics")
            if refreshed != text:
                page.write_text(refreshed, encoding="utf-8", newline="\n")
                print(page.relative_to(root).as_posix())
    found = list(check(root))  # after a rewrite: what has no metric any more
    print("\n".join(found), file=sys.stderr) if found else None
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
