"""The steps of the scripts: compute, record in MLflow, tell on the terminal."""

from defect_detection import registry  # noqa: F401  (before MLflow, for its settings)
