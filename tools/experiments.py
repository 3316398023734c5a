"""Print the experiments as a narrow table: the metrics that tell them apart, and the settings in which they differ.

    python tools/experiments.py [options of `dvc exp show`, such as --all-commits or --num 3]

It is `dvc exp show`, whose hundreds of columns are picked by the two expressions below. DVC tries both at the beginning of a
column's name, and what --keep matches is neither dropped by --drop nor by --only-changed.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys

METRICS = {  # name in metrics/*.json: heading
    "prompt_accuracy": "prompt_accuracy",
    "prompt_accuracy_unseen": "prompt_accuracy_unseen",
    "clip_score": "clip_score",
    "memorised": "memorised",
    "metrics/evaluate.json:val_loss": "val_loss",  # metrics/train.json has one, too, of fewer images
    "seconds": "training_seconds",
    "images_per_second": "images_per_second",
}
ABOUT = ("Experiment", "rev", "Created", "State")
KEEP = f"({'|'.join([*ABOUT, *map(re.escape, METRICS)])})$"
DROP = r"(?!recipe$|[a-z]+\.)"  # all but the settings: the other metrics, and the hashes of the deps
SHOW = ["exp", "show", "--csv", "--precision", "4", "--only-changed", "--keep", KEEP, "--drop", DROP]
RESULTS = ["metrics", "params.yaml"]


def main() -> None:
    as_committed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *RESULTS]).returncode == 0
    workspace = ["--hide-workspace"] if as_committed else []  # it would be the last commit's row once more
    shown = subprocess.run([sys.executable, "-m", "dvc", *SHOW, *workspace, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
    if shown.returncode:
        sys.exit(shown.returncode)
    rows = [readable(row) for row in csv.DictReader(shown.stdout.splitlines())]
    print("\n".join(table(rows)) if rows else "no commit has metrics yet; run `dvc repro` and commit")


def readable(row: dict[str, str]) -> dict[str, str]:
    """A row of DVC's under our headings; an experiment is indented below the commit that it varies."""
    row = dict(row)
    name, rev, created, state = (row.pop(column, "") for column in ABOUT)
    about = {"experiment": f"  {name or rev}" if name or state else rev, "created": created[5:16].replace("T", " ")}
    about["state"] = "" if state == "Success" else state
    metrics = {heading: row.pop(name, "") for name, heading in METRICS.items()}
    return about | metrics | row


def table(rows: list[dict[str, str]]) -> list[str]:
    """Lines of text. A heading is broken after its dots and underscores, so that no column is wider than what is in it."""
    columns = []
    for heading in rows[0]:
        values = [row[heading] for row in rows]
        if not any(values):
            continue
        parts = re.findall(r"[^._]+[._]?", heading)
        width = max(map(len, [*values, *parts]))
        lines = [""]
        for part in parts:
            fits = len(lines[-1]) + len(part) <= width
            lines[-1:] = [lines[-1] + part] if fits else [lines[-1], part]
        columns.append((width, lines, values))
    height = max(len(lines) for _, lines, _ in columns)
    columns = [(width, [*lines, *[""] * (height - len(lines)), "-" * width, *values]) for width, lines, values in columns]
    return ["  ".join(cells[k].ljust(width) for width, cells in columns).rstrip() for k in range(len(columns[0][1]))]


if __name__ == "__main__":
    main()
