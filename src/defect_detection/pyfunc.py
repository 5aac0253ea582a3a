"""The model as MLflow's `python_function`: encoded pictures in, verdicts out.

`mlflow models serve`, `mlflow.pyfunc.load_model` and whatever else MLflow deploys to call it. The
modules that it needs are saved with the model, so it runs where this project is not.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defect_detection.classifier import Classifier

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import Model, ModelSignature

COLUMN = "picture"  # the bytes of a JPEG or PNG file; base64 in JSON
NEEDED = ("ai-edge-litert", "numpy", "pillow", "pyyaml")
CODE = "code"
MODULES = (
    "__init__",
    "images",
    "metrics",
    "native_output",
    "scope",
    "classifier",
    "pyfunc",
)


def signature() -> "ModelSignature":
    """Return what goes in and what comes out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    outputs = [
        ColSpec(DataType.string, "verdict"),
        ColSpec(DataType.double, "probability", required=False),
        ColSpec(DataType.boolean, "review"),
        ColSpec(DataType.string, "reason"),
    ]
    return ModelSignature(Schema([ColSpec(DataType.binary, COLUMN)]), Schema(outputs))


def table(pictures: list[bytes]) -> "pd.DataFrame":
    """Lay pictures out as the model takes them."""
    import pandas as pd

    return pd.DataFrame({COLUMN: pictures})


def add(model: "Model", folder: Path) -> None:
    """Make a model that is being saved answer as this module says, whatever did so before."""
    from mlflow import pyfunc

    model.signature = signature()
    package = Path(__file__).parent
    (folder / CODE / package.name).mkdir(parents=True)
    for name in MODULES:
        shutil.copy(package / f"{name}.py", folder / CODE / package.name)
    pyfunc.add_to_model(
        model,
        loader_module=__name__,
        code=CODE,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )


def _load_pyfunc(folder: str) -> "Served":
    """Load a model; MLflow calls this by its name."""
    return Served(Classifier.load(Path(folder)))


class Served:
    """What MLflow asks for verdicts."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier

    def predict(self, pictures: "pd.DataFrame", params: dict[str, Any] | None = None) -> list[dict]:
        """Judge the pictures of a table's column; one that cannot be decoded gets "error"."""
        verdicts = self._classifier.classify_all([bytes(one) for one in pictures[COLUMN]])
        return [verdict.as_dict() for verdict in verdicts]
