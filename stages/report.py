"""Stage 6: all figures and pictures in one page that GitHub shows, metrics/report.md.

A stage of its own: DVC keeps no stage in its run cache whose outs are in git, and so nothing but this is done again after a
switch to another recipe and back.
"""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.report.report import Results, write_report
from stages import run_stage

REPORT, PICTURES = Path("metrics/report.md"), Path("metrics/report")


def main(params: Params) -> None:
    write_report(Results.read(Path("metrics")), params, Path("samples"), REPORT, PICTURES)
    print(f"{REPORT}: what the model draws, and how good that is")


if __name__ == "__main__":
    run_stage("report", main, metrics=[str(REPORT), str(PICTURES)])
