"""The first hour, from a clean clone to experiments and a new colour: each command is printed with what it is for, and run.

    python examples/first_hour.py           in the project's folder, in its environment; a quarter of an hour for each training

It changes no setting: experiments run in copies (`dvc exp run --temp`), images go into first_hour/ and new_colour/. What is done
already is not done again, so it can be stopped at any time and started again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

FOLDER = Path("first_hour")
PROMPT, EDITED = "a large red circle above a small blue cross", "a large green circle above a small yellow cross"
STEPS = [
    ("Is everything there?", "before anything is computed: settings, disk space, data, weights", ["dit", "check"]),
    ("Train a model", "render, encode, train, sample, evaluate, report: the whole pipeline", ["dvc", "repro"]),
    (
        "Draw",
        "from a caption; the file remembers how",
        ["dit", "generate", "--prompt", PROMPT, "--output", f"{FOLDER}/drawn.png"],
    ),
    ("Look inside", "the prompt, the seed and the settings that the file holds", ["dit", "inspect", f"{FOLDER}/drawn.png"]),
    (
        "Change it",
        "things keep their places, and take the colours of the new caption",
        ["dit", "generate", "--prompt", EDITED, "--image", f"{FOLDER}/drawn.png", "--output", f"{FOLDER}/changed.png"],
    ),
    (
        "A first experiment",
        "stronger guidance: the model is there, so only sampling and evaluation run again",
        ["dvc", "exp", "run", "--temp", "-n", "guided", "-S", "sample.guidance_scale=3"],
    ),
    (
        "A second experiment",
        "another seed: how much of a difference is luck? It trains again, beside your own workspace",
        ["dvc", "exp", "run", "--temp", "-n", "seed-1", "-S", "train.seed=1"],
    ),
    (
        "Teach it a colour",
        "lavender, which it has never seen, by adapters (LoRA); the detector counts what it knows before and after",
        [sys.executable, "examples/new_colour.py"],
    ),
    (
        "Draw in it",
        "the same model, with the adapters",
        [
            "dit",
            "generate",
            "--prompt",
            "a large lavender circle",
            "--lora",
            "new_colour/lora",
            "--output",
            f"{FOLDER}/lavender.png",
        ],
    ),
    ("Compare the numbers", "one row for each: accuracy, loss, time, what differs", [sys.executable, "tools/experiments.py"]),
    ("Compare the images", "a row of samples for each training", ["dit", "compare", "--output", f"{FOLDER}/compared.png"]),
]


def main() -> int:
    """Run the steps in their order; stop at the first that fails, and say how to go on."""
    if not Path("dvc.yaml").is_file():
        print("first_hour: run it from the project's folder: python examples/first_hour.py", file=sys.stderr)
        return 1
    FOLDER.mkdir(exist_ok=True)
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # where dit and dvc are, too
    for number, (title, why, command) in enumerate(STEPS, 1):
        print(f"\n{number}. {title}: {why}\n   $ {shlex.join(command)}\n", flush=True)
        if command[:2] == ["dvc", "exp"] and command[5] in experiments():
            print(f"   {command[5]} is there already")
            continue
        if command[1:] == ["examples/new_colour.py"] and Path("new_colour/report.json").is_file():
            print("   new_colour/ is there already")
            continue
        if subprocess.run(command).returncode:
            print("\nfirst_hour: stopped here; the same command goes on from this step", file=sys.stderr)
            return 1
    print(
        f"\nThe images are in {FOLDER}/, the report in metrics/report.md. Next: `dvc exp apply guided` takes an experiment over."
    )
    return 0


def experiments() -> list[str]:
    """Return the names of the experiments that have been run."""
    listed = subprocess.run(["dvc", "exp", "list", "--name-only"], capture_output=True, text=True, check=False)
    return listed.stdout.split()


if __name__ == "__main__":
    sys.exit(main())
