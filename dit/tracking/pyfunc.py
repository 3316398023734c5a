"""The trained model as MLflow loads it. MLflow runs this file from the copy of `dit` that it keeps beside the model.

model = mlflow.pyfunc.load_model("models:/dit-shapes/1")
images = model.predict(pandas.DataFrame({"prompt": ["a red circle"]}), params={"seed": 7})
"""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from dit.pipeline.generate import generate_images, load_pipeline
from dit.pipeline.schedulers import make_scheduler

BATCH_SIZE = 16


class TextToImage(PythonModel):
    """Generates an image for each row of a table, which is a prompt."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the pipeline; MLflow calls this once."""
        self.pipeline = load_pipeline(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Image.Image]:
        """Generate an image for each text in the column `prompt`.

        Args:
            context: unused.
            model_input: one row per image; its column `prompt` holds the captions.
            params: `num_inference_steps`, `guidance_scale`, `scheduler` and `seed` (of the first image; the next has the
                next one), as the model's signature lists them.
        """
        settings = params or {}
        self.pipeline.scheduler = make_scheduler(settings["scheduler"], self.pipeline.config.prediction_type)
        how = {name: settings[name] for name in ("num_inference_steps", "guidance_scale")}
        prompts, seed = list(model_input["prompt"]), settings["seed"]
        return list(generate_images(self.pipeline, prompts, range(seed, seed + len(prompts)), BATCH_SIZE, **how))


mlflow.models.set_model(TextToImage())
