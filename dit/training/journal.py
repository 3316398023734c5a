"""What a training leaves beside its weights: curves, a log, previews. A checkpoint holds it, so that it goes on seamlessly."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image


class Journal:
    """Keeps curves, log and previews, and passes them on to who wants to know; the loop itself knows no tracker.

    Args:
        log: the text file with a line per event.
        previews: the folder of the pictures.
        kept: a folder that outlives a killed run, for copies of the pictures; None to keep none.
        on_metrics: called with (step, {name: value}).
        on_preview: called with (step, picture).
        say: prints a line to the user.
    """

    def __init__(
        self,
        log: Path,
        previews: Path,
        kept: Path | None = None,
        on_metrics: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        on_preview: Callable[[int, Image.Image], None] = lambda step, picture: None,
        say: Callable[[str], None] = print,
    ):
        self._log, self._previews, self._kept = log, previews, kept
        self._on_metrics, self._on_preview, self._say = on_metrics, on_preview, say
        self.curves: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        log.parent.mkdir(parents=True, exist_ok=True)
        previews.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Note `values` at `step`; what is no number (a bin without images) is left out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self.curves.setdefault(step, {}).update(values)
        self._on_metrics(step, values)

    def preview(self, step: int, picture: Image.Image) -> None:
        path = self._previews / f"step-{step:06d}.png"
        picture.save(path)
        if self._kept:
            self._kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._kept / path.name)
        self._on_preview(step, picture)

    def log(self, line: str, say: bool = True) -> None:
        """Write a line, the first one in place of an earlier training's log; `say` prints it, too."""
        mode = "a" if self.lines else "w"
        self.lines.append(line)
        with self._log.open(mode, encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
        if say:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line, without noting it."""
        self._say(line)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"curves": [[step, values] for step, values in self.curves.items()], "lines": self.lines}

    def restore(self, state: dict, step: int) -> None:
        """Go on with what was noted up to `step`."""
        self.curves = dict(state["curves"])
        self.lines = list(state["lines"])
        self._log.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8", newline="\n")
        for path in sorted(self._kept.glob("step-*.png")) if self._kept else []:
            if int(path.stem.removeprefix("step-")) <= step:
                shutil.copyfile(path, self._previews / path.name)

    def write_curves(self, path: Path) -> None:
        """The curves as a table with a row per step."""
        table = pd.DataFrame.from_dict(self.curves, orient="index").rename_axis("step").sort_index()
        table.to_csv(path, float_format="%.6g", lineterminator="\n")


class Silent(Journal):
    """The journal of every process but the first: it notes nothing."""

    def __init__(self):
        self.curves, self.lines = {}, []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def preview(self, step: int, picture: Image.Image) -> None:
        pass

    def log(self, line: str, say: bool = True) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def restore(self, state: dict, step: int) -> None:
        pass
