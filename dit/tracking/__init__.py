"""MLflow: runs, what its server did not take, the model registry."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would report what it is used for; before it is imported
