"""The one place that says what is written into the active MLflow run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from defect_detection.dataset.split import Dataset, Split
from defect_detection.evaluation import figures, labels, report
from defect_detection.evaluation.labels import LabelError
from defect_detection.evaluation.metrics import Comparison, Scores
from defect_detection.evaluation.parity import Parity
from defect_detection.evaluation.result import Evaluation
from defect_detection.pipeline.fit import Fit, FitPlan, Fold
from defect_detection.pipeline.journal import Journal, RunInfo, log_data
from defect_detection.registry import runs, saved_model
from defect_detection.registry.versions import PARENT, TRAINED, Version
from defect_detection.runtime.decision import ACCURACY_THRESHOLD
from defect_detection.runtime.model_files import ServedModel

if TYPE_CHECKING:
    from defect_detection.training.devices import Device

TRAINING_TAG = "training"  # has the same value on the runs of one call of train.py

# The scores of a cross-validation that are logged, and their names in tables.
CROSS_VALIDATED = {
    "balanced_accuracy": "balanced accuracy",
    "recall_def_front": "recall def_front",
    "recall_ok_front": "recall ok_front",
    "roc_auc": "ROC AUC",
    "calibration_error": "calibration error",
}


@dataclass(frozen=True)
class Trained:
    """A model that was fitted and logged; accuracy and loss are on held-out photographs."""

    name: str
    best_epoch: int
    val_accuracy: float
    val_loss: float
    seconds: float
    run_id: str
    model_uri: str


# What a training found goes there: to the active run of MLflow, or to a journal of that run.
_sink: "ModuleType | Journal" = mlflow


@contextmanager
def run(
    experiment: str, name: str, description: str, tags: dict[str, str] | None = None
) -> Iterator[None]:
    """Open a run for the block, in the experiment with the id `experiment`."""
    with runs.opened(experiment, name, {**(tags or {}), MLFLOW_RUN_NOTE: description}):
        yield


@contextmanager
def kept_run(kept: Path, info: RunInfo) -> Iterator[Journal]:
    """Open a run for the block that is kept in a folder until MLflow has all of it."""
    global _sink
    journal = _sink = Journal(kept, info)
    status = "FAILED"
    try:
        yield journal
        status = "FINISHED"
    finally:
        _sink = mlflow
        journal.end(status)


@contextmanager
def gone_on(run_id: str) -> Iterator[None]:
    """Open a run that had ended again, for the block."""
    with runs.reopened(run_id):
        yield


def started_from(source: str, parent: str) -> None:
    """Log in words what a retraining starts from, and the URI of its model, "" if it is new."""
    _sink.set_tags({"started_from": source} | ({PARENT: parent} if parent else {}))


def dataset(data: Dataset, context: str) -> None:
    """Log the folder, the digest and the counts of a data set; `context` as in MLflow."""
    folder = data.folder.path
    of_data = list(data.format.shape), folder.as_uri(), folder.name, data.digest[:16], context
    if isinstance(_sink, Journal):
        _sink.log_data(*of_data)
    else:
        log_data(*of_data)
    _sink.log_params(
        {f"{context}_{name}": count for name, count in data.counts.items()}
        | {f"{context}_digest": data.digest, f"{context}_skipped": len(data.skipped)}
    )


def leakage(split: Split) -> None:
    """Log the share of the test images whose photograph is also in training."""
    _sink.log_metrics({"leaked_share": split.leaked_share})
    _sink.set_tags({"leaked_share": repr(split.leaked_share), "leakage": split.leakage})


def plan(planned: FitPlan, data: Dataset, **more: object) -> None:
    """Log how a model is going to be fitted, and more parameters by name."""
    _sink.log_params(
        more
        | dict(planned.layers)
        | asdict(planned.parameters)
        | {
            "image_size": [data.format.height, data.format.width],
            "channels": data.format.channels,
            "variants": planned.sampling.variants,
        }
    )


def device(chosen: "Device") -> None:
    """Log where a model is fitted, and why there."""
    _sink.set_tags(chosen.tags())


def epoch(number: int, values: dict[str, float]) -> None:
    """Log the metrics of an epoch, counted from 1."""
    _sink.log_metrics(values, step=number)


def fit(fitted: Fit) -> None:
    """Log the figures and the learning curves of a fit.

    The kept epoch's metrics are logged once more, one step after the last epoch, so that MLflow
    shows them as those of the run.
    """
    result, decisions = fitted.result, fitted.plan.decisions
    _sink.log_params(
        {
            "fits": result.fits,
            "validation_pictures": len(result.held_out.labels),
            "max_escape_rate": decisions.max_escape_rate,
            "review_share": decisions.review_share,
            "quantize": fitted.plan.quantize,
        }
    )
    _sink.log_metrics(
        {
            "best_epoch": result.best_epoch,
            "fit_seconds": result.seconds,
            "calibration_scale": result.calibration.scale,
            "calibration_shift": result.calibration.shift,
            "calibration_overall": result.calibration.overall,
        }
        | {f"best_{key}": value for key, value in result.best.items()}
        | asdict(fitted.point)
    )
    _sink.log_metrics(result.best, step=fitted.plan.parameters.epochs + 1)
    curves = figures.learning_curves(fitted.plan.name, result.history, result.best_epoch)
    _sink.log_figure(curves, "learning_curves.png")


def label_errors(found: list[LabelError]) -> None:
    """Log the images that are probably in the wrong class folder."""
    _sink.log_metrics({"likely_label_errors": len(found)})
    _sink.log_text(labels.table(found), labels.FILE)


def model(fitted: Fit, served: ServedModel, example: bytes) -> Trained:
    """Log a fitted model and its LiteRT form, with an example image file."""
    result = fitted.result
    if isinstance(_sink, Journal):
        uri = _sink.log_model(result.model, served, example)
    else:
        uri = saved_model.log(result.model, served, example)
    return Trained(
        name=fitted.plan.name,
        best_epoch=result.best_epoch,
        val_accuracy=result.best["val_accuracy"],
        val_loss=result.best["val_loss"],
        seconds=result.seconds,
        run_id=run_id(),
        model_uri=uri,
    )


def fold(scored: Fold) -> None:
    """Log the scores of a fold of a cross-validation."""
    for of, scores in (("pictures", scored.images), ("photographs", scored.photographs)):
        figures_of = {f"{of}_{key}": value for key, value in scores.as_dict().items()}
        mlflow.log_metrics(figures_of, step=scored.number)


def folds(scored: list[Fold]) -> None:
    """Log mean, lowest and highest of a cross-validation's scores."""
    for of, scores in (
        ("pictures", [one.images for one in scored]),
        ("photographs", [one.photographs for one in scored]),
    ):
        for figure in CROSS_VALIDATED:
            names = (f"{of}_{figure}_{what}" for what in ("mean", "lowest", "highest"))
            mlflow.log_metrics(dict(zip(names, over_folds(scores, figure), strict=True)))


def over_folds(scores: list[Scores], figure: str) -> tuple[float, float, float]:
    """Return mean, lowest and highest of a figure over the folds."""
    values = [getattr(one, figure) for one in scores]
    return float(np.mean(values)), min(values), max(values)


def evaluation(found: Evaluation, prefix: str) -> None:
    """Log an evaluation; `prefix` precedes the names of its figures."""
    scores = found.scores
    dataset(found.split.testing, "testing")
    mlflow.log_metrics({prefix + name: value for name, value in found.figures().items()})
    leakage(found.split)
    mlflow.set_tags({"unseen": str(found.unseen)} | found.sentences())
    mlflow.log_dict(scores.counts(), "confusion_matrix.json")
    title = f"Test accuracy {scores.accuracy:.2%}, threshold {ACCURACY_THRESHOLD}"
    matrix = figures.confusion_matrix(title, scores.matrix())
    mlflow.log_figure(matrix, "confusion_matrix.png")


def parity(found: Parity) -> None:
    """Log how closely the LiteRT model follows the Keras model."""
    mlflow.log_metrics(
        {"parity_largest_difference": found.largest, "parity_verdicts_flipped": found.flipped}
    )


def version(registered: Version, compared: str, comparison: Comparison | None) -> None:
    """Log which version was registered, and its comparison with the champion."""
    if comparison is not None:
        mlflow.log_metrics(comparison.as_dict())
    mlflow.set_tags({"registered_version": registered.uri, "comparison": compared})


def decision(said: str) -> None:
    """Log what was decided about the alias, in words."""
    mlflow.set_tag("decision", said)


def training(run_id: str) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Return the parameters of a training run, and its metrics per epoch."""
    run, names = mlflow.get_run(run_id), ("loss", "accuracy", "val_loss", "val_accuracy")
    curves = {name: history(run, name) for name in names}
    return run.data.params, curves if all(curves.values()) else {}


def lineage(run_id: str) -> dict[str, str]:
    """Return the tags of a version that say what its training run learned from."""
    run = mlflow.get_run(run_id)
    known = {TRAINED: run.data.params.get("training_digest"), PARENT: run.data.tags.get(PARENT)}
    return {tag: value for tag, value in known.items() if value}


def history(run: Run, metric: str) -> list[float]:
    """Return a metric's values, epoch by epoch."""
    values = MlflowClient().get_metric_history(run.info.run_id, metric)
    epochs = int(run.data.params.get("epochs", 0))
    return [one.value for one in sorted(values, key=lambda one: one.step) if one.step <= epochs]


def page(html: str, table: str) -> str:
    """Log the report of an evaluation and its table of images; return where the report is."""
    mlflow.log_text(table, report.TABLE)
    mlflow.log_text(html, report.FILE)
    return str(mlflow.get_artifact_uri(report.FILE))


def run_id() -> str:
    """Return the id of the active run, "" if MLflow has not made it."""
    return _sink.info.run_id if isinstance(_sink, Journal) else str(_run().info.run_id)


def commit() -> str:
    """Return the project's commit, as MLflow tagged the active run with it."""
    return str(_run().data.tags.get("mlflow.source.git.commit", "unknown"))


def _run() -> mlflow.ActiveRun:
    run = mlflow.active_run()
    assert run is not None, "nothing is recorded outside a run"
    return run
