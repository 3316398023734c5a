"""The model card of an export: the one that the train stage wrote, how to load the folder, and what the evaluation found."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from dit import __version__
from dit.config import Params
from dit.errors import UserError, one_line
from dit.report.tables import figures_table, headlines

SETTINGS = "\nSettings:\n"  # the end of the train stage's card, long and for the few
USE = """
## Use

The folder holds all of it, VAE, text encoder and tokenizer, too, in safetensors and JSON alone. What it needs beside it is the
Python package `latent-dit` {version}, the code that trained it. In a copy of that project:

    pip install -c constraints.txt .
    dit generate --checkpoint {here} --prompt "{prompt}"

The pipeline above {draws}; `dit.pipeline.schedulers.make_scheduler` makes others. diffusers' own
`DiffusionPipeline.from_pretrained` does not know its class.
"""
DRAWS = "draws with the scheduler `{}`, which is saved here"
HERE = "path/to/this/folder"


def read_card(path: Path) -> str:
    """Return the text of the card at `path`.

    Raises:
        UserError: it is no card that a new one could be made from; somebody has edited it, most likely.
    """
    try:
        text = path.read_text(encoding="utf-8")
        ModelCard(text, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path}: not a model card ({one_line(error)}); mend what is between its lines of ---") from None
    return text


def with_scheduler(card: str, scheduler: str) -> str:
    """Return the card of an export with `scheduler`, a name as `make_scheduler` takes it, in place of the one that it names."""
    return re.sub(re.escape(DRAWS).replace(re.escape("{}"), "[^`]+"), DRAWS.format(scheduler), card)


def export_card(
    trained: str, scheduler: str, figures: dict[str, float] | None, params: Params | None, picture: str | None
) -> str:
    """Return the whole README.md of an export.

    Args:
        trained: the card of `models/dit`.
        scheduler: name of the scheduler in the export.
        figures: what metrics/evaluate.json says of this model, if it does.
        params: the settings that the figures were measured with.
        image: name of a file in the folder that shows what the model draws, if there is one.
    """
    card = ModelCard(trained, ignore_metadata_errors=True)
    data = ModelCardData(**card.data.to_dict())
    text, settings, rest = card.text.replace('"models/dit"', f'"{HERE}"').partition(SETTINGS)
    prompt = text.partition('pipeline("')[2].partition('")')[0] or "a red circle"
    text += USE.format(version=__version__, here=HERE, prompt=prompt, draws=DRAWS.format(scheduler))
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
                metric_value=figures[name],
            )
            for name in headlines(figures)
        ]
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{text}{settings}{rest}"


def evaluation_section(figures: dict[str, float], params: Params) -> str:
    """Return the figures as a table, with their intervals, and what they were measured with."""
    how = params.sample
    lines = [
        "",
        "## Evaluation",
        "",
        f"Drawn with `{how.scheduler}` in {how.num_inference_steps} evaluations of the transformer, at a guidance scale of "
        f"{how.guidance_scale:g}:",
        "",
        figures_table(figures, params.evaluate.confidence),
    ]
    return "\n".join(lines) + "\n"
