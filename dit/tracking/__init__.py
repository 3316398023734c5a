"""MLflow: runs, what its server did not take, the model registry."""

import os

# MLflow would report what it is used for. It reads this when it is imported, which is after this package.
NO_TELEMETRY = os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
