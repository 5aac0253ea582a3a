"""The model as MLflow's `python_function`: encoded images in, verdicts out.

`mlflow models serve`, `mlflow.pyfunc.load_model` and everything else that MLflow deploys to call
`_load_pyfunc`. This package is saved with each model, so it runs where this project is not.
"""

from pathlib import Path
from typing import Any

from defect_detection.runtime.classifier import Classifier, VerdictDict

COLUMN = "picture"  # of the input: the bytes of an image file; base64 in JSON


def _load_pyfunc(folder: str) -> "PyfuncModel":
    """Load a model; MLflow calls this function by its name."""
    return PyfuncModel(Classifier.load(Path(folder)))


class PyfuncModel:
    """Answers MLflow's calls for predictions."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier

    def predict(self, table: Any, params: dict[str, Any] | None = None) -> list[VerdictDict]:
        """Judge the images in a table's column; one that cannot be decoded gets "error"."""
        verdicts = self._classifier.classify_all([bytes(one) for one in table[COLUMN]])
        return [verdict.as_dict() for verdict in verdicts]
