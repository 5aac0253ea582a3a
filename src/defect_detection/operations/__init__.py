"""What a team runs beside the pipeline: a tracking server with its database, backups."""

from defect_detection import registry  # noqa: F401  (before MLflow, for its settings)
