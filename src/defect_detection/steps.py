"""The steps that the scripts are made of: fit, evaluate, register. Each logs in the active run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np

from defect_detection import dataset, metrics, registry, report, tracking
from defect_detection.classifier import Classifier
from defect_detection.dataset import Dataset
from defect_detection.metrics import Scores
from defect_detection.registry import Version
from defect_detection.settings import InferenceExamples, MLflowNames, Schedule

if TYPE_CHECKING:
    import keras

Rows = tuple[np.ndarray, np.ndarray]  # indices of the training and of the validation pictures


@dataclass(frozen=True)
class Fitted:
    """A model that was fitted and logged; accuracy and loss are the best epoch's, on validation."""

    name: str
    best_epoch: int
    val_accuracy: float
    val_loss: float
    seconds: float
    run_id: str
    model_uri: str


def fit(
    name: str,
    make_model: "Callable[[], keras.Model]",
    data: Dataset,
    rows: Rows,
    schedule: Schedule,
    verbose: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fitted:
    """Make a model, fit it and log parameters, metrics per epoch, curves and the model.

    Args:
        name: what the fit is called in tables and pictures.
        make_model: is called after the seed is set.
        data: the training pictures.
        rows: which of them to learn from and which to validate on.
        schedule: learning rate, batch size, epochs, patience, seed.
        verbose: Keras's: 0 silent, 1 bar, 2 one line an epoch.
        on_epoch: is called with the number of each epoch that has ended, from 1.

    Raises:
        PipelineError: the fit diverged.
    """
    # TensorFlow takes 4 s to import: not before the options, the data and the store are good.
    from defect_detection import training

    def log_epoch(epoch: int, values: dict[str, float]) -> None:
        mlflow.log_metrics(values, step=epoch)
        on_epoch(epoch)

    mlflow.log_params(
        asdict(schedule)
        | {"image_size": list(data.images.shape[1:3])}
        | {"training_pictures": len(rows[0]), "validation_pictures": len(rows[1])}
    )
    training.make_deterministic(schedule.seed)
    result = training.fit(
        make_model(),
        data.images,
        data.labels,
        *rows,
        schedule,
        on_epoch=log_epoch,
        verbose=verbose,
    )
    mlflow.log_metrics(
        {"best_epoch": result.best_epoch, "fit_seconds": result.seconds}
        | {f"best_{key}": value for key, value in result.best.items()}
    )
    curves = report.learning_curves(name, result.history, result.best_epoch)
    mlflow.log_figure(curves, "learning_curves.png")
    return Fitted(
        name=name,
        best_epoch=result.best_epoch,
        val_accuracy=result.best["val_accuracy"],
        val_loss=result.best["val_loss"],
        seconds=result.seconds,
        run_id=mlflow.active_run().info.run_id,
        model_uri=tracking.log_model(result.model, data.images[:1]),
    )


def evaluate(classifier: Classifier, data: Dataset, folder: Path, prefix: str = "") -> Scores:
    """Score a model on the test pictures and log figures and confusion matrix.

    `prefix` stands before the figures' names, for a run that has training figures too.
    """
    scores = metrics.score(data.labels, classifier.probabilities(data.images), classifier.threshold)
    tracking.log_dataset(data, folder, "testing")
    mlflow.log_metrics({prefix + name: value for name, value in scores.as_dict().items()})
    mlflow.log_dict(scores.counts(), "confusion_matrix.json")
    title = f"Test accuracy {scores.accuracy:.2%}"
    mlflow.log_figure(report.confusion_matrix(title, scores), "confusion_matrix.png")
    return scores


def register(
    model_uri: str, run_id: str, scores: Scores, val_accuracy: float, names: MLflowNames
) -> tuple[Version, str]:
    """Register a logged model under the name that its test accuracy earns; decide the alias.

    Returns:
        The version, and a sentence that says what was done.
    """
    description = (
        f"Test accuracy {scores.accuracy:.4f} on {scores.pictures} pictures: "
        f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts rejected. "
        f"Validation accuracy {val_accuracy:.4f}."
    )
    name = registry.gate(scores.accuracy, names)
    version = registry.register(model_uri, run_id, scores.accuracy, description, name)
    mlflow.set_tag("registered_version", version.uri)
    done = f"Registered as {version.name} version {version.number}"
    if name == names.testing_model_name:
        queued = registry.queue_for_retraining(names)
        return version, (
            f"{done}, below the threshold of {names.evaluation_threshold:.0%}; "
            f"{names.testing_model_alias} is version {queued.number}"
        )
    first = registry.promote(names)
    return version, (
        f"{done}; {registry.PRODUCTION_ALIAS} is version {first.number} with a test accuracy of "
        f"{first.acc:.4f}"
    )


def example_pictures(
    data: Path, configured: InferenceExamples, say: Callable[[str], None]
) -> list[Path]:
    """Return a defective and a good example, the first of its class where one is not there.

    Args:
        data: the data folder.
        configured: the examples, relative to it.
        say: is told of each example that is not there.

    Raises:
        PipelineError: nor is any other picture of the class.
    """
    found = []
    for name, class_name in (
        (configured.defective_image, "def_front"),
        (configured.ok_image, "ok_front"),
    ):
        example = data / name
        if not example.is_file():
            instead = dataset.first_picture(data, "test", class_name)
            say(f"{example} is not there, running {instead} instead")
            example = instead
        found.append(example)
    return found
