"""The model card of an export: the facts of its training, how to load the folder, and what the evaluation found."""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dit import __version__
from dit.commands.find_metrics import Evaluation
from dit.errors import UserError, without_password
from dit.report.tables import headlines, metrics_table
from dit.training.export import METADATA, render_card

EVALUATION, IMAGE = "evaluation.json", "samples.png"
PATH = re.compile(r"file:|/\w|~\w*[/\\]|\\\\|[A-Za-z]:[/\\](?!/)")  # how those begin that say something of a machine
HERE = "path/to/this/folder"
USE = """## Use

The {place} holds all of it, VAE, text encoder and tokenizer, too, in safetensors and JSON{alone}. What it needs beside it is the
Python package `latent-dit` {version}, the code that trained it. In a copy of that project:

    pip install -c constraints.txt .
    dit generate {flag} {here} --prompt "{prompt}"

The pipeline above samples with the scheduler `{scheduler}`, which is saved here; `dit.pipeline.schedulers.make_scheduler` makes
others. {diffusers}"""
FOLDER = {
    "place": "folder",
    "alone": " alone",
    "flag": "--checkpoint",
    "diffusers": "diffusers' own `DiffusionPipeline.from_pretrained` does not know its class.",
}
REPOSITORY = {
    "place": "repository",
    "alone": "",
    "flag": "--model",
    "diffusers": """With diffusers' own class, the two Python files in this repository import the package's, and do nothing else:

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("{here}", custom_pipeline="pipeline", trust_remote_code=True)""",
}
UNKNOWN = "# A text-to-image Diffusion Transformer\n\nWhat it was trained on is not recorded.\n\n"


def read_facts(folder: Path, name: str) -> dict[str, Any] | None:
    """Read training.json or evaluation.json of a model folder; None where it has none (version 0.1 wrote none).

    Raises:
        UserError: it is not readable.
    """
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{folder / name}: not readable; `dvc checkout models/dit` brings it back") from None


def evaluation_facts(evaluation: Evaluation) -> dict[str, Any]:
    """Return what an export keeps of an evaluation: the metrics, and how they were measured."""
    params = evaluation.params
    how = {key: getattr(params.sample, key) for key in ("scheduler", "num_inference_steps", "guidance_scale")}
    facts = {"recipe": params.recipe, "confidence": params.evaluate.confidence, "sample": how, "metrics": evaluation.metrics}
    return facts | ({"image": IMAGE} if evaluation.image else {})


def without_paths(facts: Any) -> Any:
    """Return `facts`, of JSON, with the last part of each path that begins at a root or a home; no address has its password.

    An encoder, or the model that a training began from, may be a folder of the machine it was trained on: who runs that machine
    is nobody's business who reads the card.
    """
    if isinstance(facts, dict):
        return {name: without_paths(value) for name, value in facts.items()}
    if isinstance(facts, list):
        return [without_paths(value) for value in facts]
    if isinstance(facts, str) and PATH.match(facts):
        return PureWindowsPath(facts).name  # whose separators are / and \
    return without_password(facts) if isinstance(facts, str) else facts


def export_card(
    training: dict[str, Any] | None, evaluation: dict[str, Any] | None, scheduler: str, repository: str | None = None
) -> str:
    """Render the whole README.md of an export.

    Args:
        training: training.json of the model, if it has one.
        evaluation: what `evaluation_facts` returned, if the evaluation is of this model.
        scheduler: name of the scheduler in the export.
        repository: its id on the Hub; None if it is a folder.
    """
    here, words = (repository, REPOSITORY) if repository else (HERE, FOLDER)
    words = words | {"diffusers": words["diffusers"].format(here=here)}
    prompt = training["prompt"] if training else "a red circle"
    sections = [USE.format(version=__version__, here=here, prompt=prompt, scheduler=scheduler, **words)]
    data = ModelCardData(license=METADATA["license"], library_name=METADATA["library_name"])
    data.pipeline_tag = METADATA["pipeline_tag"]
    if evaluation:
        sections.append(evaluation_section(evaluation))
        recipe, metrics = evaluation["recipe"], evaluation["metrics"]
        data.model_name = f"dit-{recipe}"
        data.eval_results = [
            EvalResult(
                task_type="text-to-image",
                dataset_type=recipe,
                dataset_name=f"validation and other prompts of the recipe {recipe}",
                metric_type=name,
                metric_name=name,
                metric_value=metrics[name],
            )
            for name in headlines(metrics)
        ]
    body = render_card(training, here, sections) if training else UNKNOWN + "\n\n".join(sections) + "\n"
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n{body}"


def evaluation_section(evaluation: dict[str, Any]) -> str:
    """Render the metrics as a table, with their intervals, what they were measured with, and the samples."""
    how = evaluation["sample"]
    text = (
        f"## Evaluation\n\nSampled with `{how['scheduler']}` in {how['num_inference_steps']} evaluations of the transformer, at "
        f"a guidance scale of {how['guidance_scale']:g}:\n\n{metrics_table(evaluation['metrics'], evaluation['confidence'])}"
    )
    image = f"\n\n![Captions and the images generated for them]({evaluation['image']})" if "image" in evaluation else ""
    return text + image
