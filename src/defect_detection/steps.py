"""The steps that the scripts are made of: fit, evaluate, register. Each logs in the active run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np

from defect_detection import dataset, metrics, plots, registry, tracking
from defect_detection.audit import Split
from defect_detection.classifier import Classifier
from defect_detection.metrics import THRESHOLD, Scores
from defect_detection.registry import Version
from defect_detection.report import Evaluated
from defect_detection.settings import Decisions, MLflowNames, Schedule

if TYPE_CHECKING:
    import keras

# What a cross-validation tells, by its names in `Scores`.
CROSS_VALIDATED = {
    "balanced_accuracy": "balanced accuracy",
    "recall_def_front": "recall def_front",
    "recall_ok_front": "recall ok_front",
    "roc_auc": "ROC AUC",
    "calibration_error": "calibration error",
}

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
    split: Split,
    rows: Rows,
    schedule: Schedule,
    decisions: Decisions,
    device: str,
    verbose: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fitted:
    """Make a model, fit it and log parameters, metrics per epoch, curves and the model.

    Args:
        name: what the fit is called in tables and pictures.
        make_model: is called after the seed is set.
        split: its training pictures are taken.
        rows: which of them to learn from and which to validate on.
        schedule: learning rate, batch size, epochs, patience, seed.
        decisions: what the threshold and the review band are chosen for.
        device: "auto", "cpu" or "gpu"; which it was is logged as a tag.
        verbose: Keras's: 0 silent, 1 bar, 2 one line an epoch.
        on_epoch: is called with the number of each epoch that has ended, from 1.

    Raises:
        PipelineError: the fit diverged, or there is no GPU and `device` is "gpu".
    """
    # TensorFlow takes 4 s to import: not before the options, the data and the store are good.
    from defect_detection import devices, training
    from defect_detection.model import to_litert

    data = split.training

    def log_epoch(epoch: int, values: dict[str, float]) -> None:
        mlflow.log_metrics(values, step=epoch)
        on_epoch(epoch)

    mlflow.log_params(
        asdict(schedule)
        | {"image_size": list(data.images.shape[1:3])}
        | {"training_pictures": len(rows[0]), "validation_pictures": len(rows[1])}
    )
    with devices.chosen(device, make_model, data.images, data.labels) as chosen:
        mlflow.set_tags(chosen.tags())
        training.make_deterministic(schedule.seed)
        result = training.fit(
            make_model(),
            data.images,
            data.labels,
            split.training_photographs,
            *rows,
            schedule,
            on_epoch=log_epoch,
            verbose=verbose,
        )
    mlflow.log_metrics(
        {
            "best_epoch": result.best_epoch,
            "fit_seconds": result.seconds,
            "temperature": result.temperature,
        }
        | {f"best_{key}": value for key, value in result.best.items()}
    )
    litert = to_litert(result.model)
    held_back = Classifier(litert, data.images.shape[1:3]).probabilities(data.images[rows[1]])
    point = metrics.operating_point(
        data.labels[rows[1]], held_back, decisions.max_escape_rate, decisions.review_share
    )
    mlflow.log_params(
        {"max_escape_rate": decisions.max_escape_rate, "review_share": decisions.review_share}
    )
    mlflow.log_metrics(asdict(point))
    curves = plots.learning_curves(name, result.history, result.best_epoch)
    mlflow.log_figure(curves, "learning_curves.png")
    return Fitted(
        name=name,
        best_epoch=result.best_epoch,
        val_accuracy=result.best["val_accuracy"],
        val_loss=result.best["val_loss"],
        seconds=result.seconds,
        run_id=mlflow.active_run().info.run_id,
        model_uri=tracking.log_model(result.model, litert, point, data.images[:1]),
    )


@dataclass(frozen=True)
class CrossValidated:
    """Scores of each fold's pictures, and of its photographs by the mean of their pictures."""

    name: str
    pictures: list[Scores]
    photographs: list[Scores]


def cross_validate(
    name: str,
    make_model: "Callable[[], keras.Model]",
    split: Split,
    folds: int,
    schedule: Schedule,
    validation_share: float,
    device: str,
) -> CrossValidated:
    """Fit a model for each fold of the training pictures, score it on the fold and log that.

    No photograph is cut apart, nor by the pictures that the best epoch is chosen by: those are
    held back from the other folds.

    Raises:
        PipelineError: there are too few photographs, or a fit diverged.
    """
    from defect_detection import devices, model, training  # TensorFlow, as in `fit`

    data, photographs = split.training, split.training_photographs
    mlflow.log_params(asdict(schedule) | {"image_size": list(data.images.shape[1:3])})
    found = CrossValidated(name, [], [])
    divided = dataset.folds(data.labels, photographs, folds, schedule.seed)
    with devices.chosen(device, make_model, data.images, data.labels) as chosen:
        mlflow.set_tags(chosen.tags())
        for number, (others, fold) in enumerate(divided, start=1):
            learned, held_back = dataset.split_validation(
                data.labels[others], photographs[others], validation_share, schedule.seed
            )
            training.make_deterministic(schedule.seed)
            fitted = training.fit(
                make_model(),
                data.images,
                data.labels,
                photographs,
                others[learned],
                others[held_back],
                schedule,
                verbose=0,
            )
            classifier = Classifier(model.to_litert(fitted.model), data.images.shape[1:3])
            labels, probabilities = data.labels[fold], classifier.probabilities(data.images[fold])
            by_photograph = metrics.by_photograph(labels, probabilities, photographs[fold])
            for of, scores, judged in (
                ("pictures", found.pictures, (labels, probabilities)),
                ("photographs", found.photographs, by_photograph),
            ):
                scores.append(metrics.score(*judged, THRESHOLD))
                figures = scores[-1].as_dict()
                mlflow.log_metrics({f"{of}_{key}": v for key, v in figures.items()}, step=number)
            print(
                f"  fold {number} of {folds}: {len(fold)} pictures of {len(by_photograph[0])} "
                f"photographs, balanced accuracy {found.pictures[-1].balanced_accuracy:.4f}",
                flush=True,
            )
    for of, scores in (("pictures", found.pictures), ("photographs", found.photographs)):
        for figure in CROSS_VALIDATED:
            for what, value in zip(
                ("mean", "lowest", "highest"), over_folds(scores, figure), strict=True
            ):
                mlflow.log_metric(f"{of}_{figure}_{what}", value)
    return found


def over_folds(scores: list[Scores], figure: str) -> tuple[float, float, float]:
    """Return mean, lowest and highest of a figure over the folds."""
    values = [getattr(one, figure) for one in scores]
    return float(np.mean(values)), min(values), max(values)


def log_leakage(split: Split) -> None:
    """Log which share of the test pictures shows a photograph that is also in training."""
    mlflow.log_metric("leaked_share", split.leaked_share)
    mlflow.set_tags({"leaked_share": repr(split.leaked_share), "leakage": split.leakage})


def evaluate(classifier: Classifier, split: Split, folder: Path, prefix: str = "") -> Evaluated:
    """Score a model on the test pictures; log figures, leakage and confusion matrix; print them.

    `prefix` stands before the figures' names, for a run that has training figures too.
    """
    evaluated = judge(classifier, split.testing.images, split)
    scores, unseen = evaluated.scores, evaluated.unseen
    figures = scores.as_dict() | {
        "unseen_pictures": unseen.pictures,
        "unseen_photographs": unseen.photographs,
        "unseen_photographs_right": unseen.photographs_right,
    }
    if unseen.pictures:
        low, high = unseen.bounds
        figures |= {"acc_unseen": unseen.accuracy, "acc_unseen_low": low, "acc_unseen_high": high}
    if split.leaked.any():
        right = metrics.is_defect(evaluated.probabilities, THRESHOLD) == (evaluated.labels == 1)
        figures["acc_leaked"] = float(right[split.leaked].mean())
    for of, errors in (("", evaluated.errors), ("photographs_", evaluated.photograph_errors)):
        figures |= {of + name: value for name, value in errors.as_dict().items()}
    tracking.log_dataset(split.testing, folder, "testing")
    mlflow.log_metrics({prefix + name: value for name, value in figures.items()})
    log_leakage(split)
    mlflow.set_tags({"unseen": str(unseen)} | evaluated.sentences())
    mlflow.log_dict(scores.counts(), "confusion_matrix.json")
    title = f"Test accuracy {scores.accuracy:.2%}, threshold {THRESHOLD}"
    mlflow.log_figure(plots.confusion_matrix(title, scores.matrix()), "confusion_matrix.png")

    print(f"{folder / 'test'}: accuracy {scores.accuracy:.4f}, ROC AUC {scores.roc_auc:.4f}")
    print(scores.table())
    print(split.leakage)
    if "acc_leaked" in figures:
        print(f"  accuracy on those {figures['acc_leaked']:.4f}")
    print(f"  {unseen}")
    print(f"With the threshold {classifier.point.threshold:.4f}, chosen on validation pictures:")
    for name, sentence in evaluated.sentences().items():
        print(f"  {name.replace('_', ' '):24}{sentence}")
    return evaluated


def judge(classifier: Classifier, pictures: np.ndarray, split: Split) -> Evaluated:
    """Score a model on the test pictures of `split`, given at the size that the model takes."""
    labels, photographs = split.testing.labels, split.testing_photographs
    probabilities, maps = classifier.examine(pictures)
    unseen = ~split.leaked
    by_photograph = metrics.by_photograph(labels, probabilities, photographs)
    return Evaluated(
        scores=metrics.score(labels, probabilities, THRESHOLD),
        errors=metrics.errors(labels, probabilities, classifier.point),
        photograph_errors=metrics.errors(*by_photograph, classifier.point),
        unseen=metrics.unseen(
            labels[unseen], probabilities[unseen], photographs[unseen], THRESHOLD
        ),
        leaked_share=split.leaked_share,
        test_digest=split.testing.digest,
        labels=labels,
        probabilities=probabilities,
        maps=maps,
    )


def register(
    model_uri: str, run_id: str, evaluated: Evaluated, val_accuracy: float, names: MLflowNames
) -> tuple[Version, str]:
    """Register a logged model under the name that its test accuracy earns; decide the alias.

    Returns:
        The version, and a sentence that says what was done.
    """
    scores = evaluated.scores
    description = (
        f"Test accuracy {scores.accuracy:.4f} on {scores.pictures} pictures: "
        f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts rejected. "
        f"{evaluated.leaked_share:.1%} of them show a photograph of training; {evaluated.unseen}. "
        f"Validation accuracy {val_accuracy:.4f}."
    )
    name = registry.gate(scores.accuracy, names)
    version = registry.register(
        model_uri, run_id, scores.accuracy, description, name, evaluated.tags()
    )
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
