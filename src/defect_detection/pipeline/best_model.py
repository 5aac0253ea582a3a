"""Which model the evaluation takes: the file `best_model.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from defect_detection import PipelineError
from defect_detection.atomic import replace_atomically
from defect_detection.registry import store


@dataclass(frozen=True)
class BestModel:
    """The best model of a training.

    Attributes:
        run_id: the training run.
        model_uri: the logged model, as MLflow loads it.
        val_accuracy: on held-out photographs, in [0, 1].
        data_digest: of the training images.
        created_at: when the last set of the training was fitted, ISO 8601, UTC.
    """

    run_id: str
    model_uri: str
    val_accuracy: float
    data_digest: str
    created_at: str

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        with replace_atomically(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def time_of(cls, path: Path) -> str:
        """Return `created_at` of a file, "" if there is none that can be read."""
        try:
            return cls(**json.loads(path.read_text())).created_at
        except (OSError, ValueError, TypeError):
            return ""

    @classmethod
    def read(cls, path: Path, training: str) -> "BestModel":
        """Read the file.

        Args:
            path: of the file.
            training: the call that writes it, for messages.

        Raises:
            PipelineError: it is missing or damaged, or its run was deleted.
        """
        again = f"Run '{training}'"
        try:
            best = cls(**json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise PipelineError(f"{path} does not exist. {again} first") from error
        except (ValueError, TypeError) as error:
            raise PipelineError(f"{path} is damaged ({error}). {again} again") from error
        try:
            run = mlflow.get_run(best.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            raise PipelineError(
                f"{path} names the run {best.run_id}, which is not in the tracking store "
                f"{store.without_password(mlflow.get_tracking_uri())}. {again} again"
            )
        return best
