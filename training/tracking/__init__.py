"""MLflow: tracked runs, and the registry of model versions."""
