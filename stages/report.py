"""Stage 6: all metrics and images on one page that GitHub shows, metrics/report.md.

A stage of its own: DVC keeps no stage in its run cache whose outs are in git, and so nothing but this is done again after a
switch to another recipe and back.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from dit.config import Params
from dit.report.report import Results, write_report
from stages import run_stage

REPORT, IMAGES = Path("metrics/report.md"), Path("metrics/report")


def main(params: Params) -> None:
    """Write the page and its images, and put them in the place of the earlier ones when they are complete."""
    with TemporaryDirectory(prefix=".report-", dir="metrics") as folder:
        new = Path(folder)
        write_report(Results.read(Path("metrics")), params, Path("samples"), new / REPORT.name, new / IMAGES.name)
        shutil.rmtree(IMAGES, ignore_errors=True)
        (new / IMAGES.name).replace(IMAGES)
        (new / REPORT.name).replace(REPORT)
    print(f"{REPORT}: what the model generates, and how good that is")


if __name__ == "__main__":
    run_stage("report", main, metrics=[])
