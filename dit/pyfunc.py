"""The trained model as MLflow loads it. MLflow runs this file from the copy of `dit` that it keeps beside the model.

    model = mlflow.pyfunc.load_model("models:/dit-shapes/1")
    pictures = model.predict(pandas.DataFrame({"prompt": ["a red circle"]}), params={"seed": 7})
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from dit.pipeline import load_pipeline


class TextToImage(PythonModel):
    """A row of the table is a prompt, and becomes a picture."""

    def load_context(self, context: PythonModelContext) -> None:
        self.folder = context.artifacts["model"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Image.Image]:
        """Draw the column `prompt`.

        Args:
            context: unused.
            model_input: one row per picture; its column `prompt` holds the captions.
            params: `num_inference_steps`, `guidance_scale`, `scheduler` and `seed` (of the first picture; the next has the
                next one), as the model's signature lists them.
        """
        settings = params or {}
        pipeline = load_pipeline(self.folder, settings["scheduler"])
        pipeline.set_progress_bar_config(disable=True)
        prompts = list(model_input["prompt"])
        return pipeline(
            prompts,
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            generator=[torch.Generator().manual_seed(settings["seed"] + k) for k in range(len(prompts))],
        ).images


mlflow.models.set_model(TextToImage())
