"""MLflow: runs, what its server did not take, the model registry."""
