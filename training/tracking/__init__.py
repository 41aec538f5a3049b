"""MLflow: runs, the journal that is sent to it, and the registry of versions."""
