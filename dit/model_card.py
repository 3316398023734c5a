"""The model card of an export: the one that the train stage wrote, how to load the folder, and what the evaluation found."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dit import __version__
from dit.config import Params

SETTINGS = "\nSettings:\n"  # the end of the train stage's card, long and for the few
USE = """
## Use

The folder holds all of it: transformer, scheduler, VAE, text encoder and tokenizer, in safetensors and JSON alone. What it needs
beside it is the Python package `latent-dit` {version}, the code that trained it. In a copy of that project:

    pip install -c constraints.txt .
    dit generate --checkpoint {here} --prompt "{prompt}"

The pipeline above draws with the `{scheduler}` that is saved here, `dit generate` with its own choice, `{better}`. For that
from Python:

    from dit.schedulers import make_scheduler

    pipeline.scheduler = make_scheduler("{better}", pipeline.config.prediction_type)
"""
HERE = "path/to/this/folder"


def export_card(
    trained: str, scheduler: str, better: str, figures: dict[str, float] | None, params: Params | None, picture: str | None
) -> str:
    """The whole README.md of an export.

    Args:
        trained: the card of `models/dit`.
        scheduler: name of the scheduler's class in the export.
        better: name of the scheduler that `dit generate` takes.
        figures: what metrics/evaluate.json says of this model, if it does.
        params: the settings that the figures were measured with.
        picture: name of a file in the folder that shows what the model draws, if there is one.
    """
    card = ModelCard(trained, ignore_metadata_errors=True)
    data: ModelCardData = card.data
    text, settings, rest = card.text.replace('"models/dit"', f'"{HERE}"').partition(SETTINGS)
    prompt = text.partition('pipeline("')[2].partition('")')[0] or "a red circle"
    text += USE.format(version=__version__, here=HERE, prompt=prompt, scheduler=scheduler, better=better)
    if figures and params:
        text += evaluation_section(figures, params)
        text += f"\n![Captions and what it drew for them]({picture})\n" if picture else ""
        data.model_name = f"dit-{params.recipe}"
        data.eval_results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type=params.recipe,
                dataset_name=f"validation and other prompts of the recipe {params.recipe}",
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value, _, _ in rows(figures)
        ]
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}{settings}{rest}"


def evaluation_section(figures: dict[str, float], params: Params) -> str:
    """The figures as a table, with their intervals, and what they were measured with."""
    how = params.sample
    lines = [
        "",
        "## Evaluation",
        "",
        f"Drawn with `{how.scheduler}` in {how.num_inference_steps} evaluations of the transformer, at a guidance scale of "
        f"{how.guidance_scale:g}:",
        "",
        f"| metric | value | {100 * params.evaluate.confidence:g} % interval | prompts |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {value:g} | {interval} | {prompts} |" for name, value, interval, prompts in rows(figures)]
    return "\n".join(lines) + "\n"


def rows(figures: dict[str, float]) -> list[tuple[str, float, str, str]]:
    """Each metric with its value, its interval and the number of its prompts, "" where there are none."""
    found = []
    for name, value in figures.items():
        base, _, part = name.rpartition("_")
        if (part in ("low", "high", "prompts") and base in figures) or not isinstance(value, int | float):
            continue
        low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
        interval = "" if low is None or high is None else f"{low:g} to {high:g}"
        found.append((name, value, interval, str(figures.get(f"{name}_prompts", ""))))
    return found
