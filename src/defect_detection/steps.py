"""The steps that the scripts are made of: fit, evaluate, register. Each logs in the active run."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import numpy as np

from defect_detection import (
    PipelineError,
    dataset,
    metrics,
    parity,
    plots,
    promotion,
    registry,
    report,
    robustness,
    tracking,
)
from defect_detection.audit import Split
from defect_detection.classifier import Classifier
from defect_detection.metrics import THRESHOLD, Comparison, Rate, Scores
from defect_detection.registry import Version
from defect_detection.report import Evaluated, Registered
from defect_detection.scope import Scope
from defect_detection.settings import Decisions, MLflowNames, Sampling, Schedule
from defect_detection.tracking import BestModel

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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """A model that was fitted and logged; accuracy and loss are of photographs held back."""

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
    folder: Path,
    sampling: Sampling,
    schedule: Schedule,
    decisions: Decisions,
    quantize: str,
    device: str,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fitted:
    """Make a model, fit it and log parameters, metrics per epoch, curves and the model.

    Args:
        name: what the fit is called in tables and pictures.
        make_model: is called after the seed is set.
        split: its training pictures are taken.
        folder: where they lie.
        sampling: the variants that are drawn of them.
        schedule: learning rate, batch size, epochs, share held back, seed.
        decisions: what the threshold and the review band are chosen for.
        quantize: what the served model's weights are kept as, of `settings.QUANTIZE`.
        device: "auto", "cpu" or "gpu"; which it was is logged as a tag.
        on_epoch: is called with the number of each epoch that has ended, from 1.

    Raises:
        PipelineError: the fit diverged, there are too few photographs or variants, there is no GPU
            and `device` is "gpu", or the pretrained weights or room for their features are lacking.
    """
    # TensorFlow takes 4 s to import: not before the options, the data and the store are good.
    from defect_detection import devices, features, training
    from defect_detection.model import to_litert

    data, photographs = split.training, split.training_photographs
    # Too few photographs are found before minutes go by.
    dataset.validation_parts(data.labels, photographs, schedule.validation_share, schedule.seed)

    def log_epoch(epoch: int, values: dict[str, float]) -> None:
        mlflow.log_metrics(values, step=epoch)
        shown = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"  epoch {epoch} of {schedule.epochs}: {shown}", flush=True)
        on_epoch(epoch)

    _log_fit(schedule, sampling, data.images)
    with devices.chosen(device, make_model, data.images, data.labels) as chosen:
        mlflow.set_tags(chosen.tags())
        training.make_deterministic(schedule.seed)
        model = make_model()
        computed = features.compute(model, data, photographs, sampling)
        result = training.fit(model, computed, schedule, log_epoch)
    mlflow.log_params(
        {"fits": result.fits, "validation_pictures": len(result.held_back.labels)}
        | {"max_escape_rate": decisions.max_escape_rate, "review_share": decisions.review_share}
        | {"quantize": quantize}
    )
    mlflow.log_metrics(
        {
            "best_epoch": result.best_epoch,
            "fit_seconds": result.seconds,
            "calibration_scale": result.calibration.scale,
            "calibration_shift": result.calibration.shift,
        }
        | {f"best_{key}": value for key, value in result.best.items()}
    )
    litert = to_litert(result.model, quantize)
    point = metrics.operating_point(
        result.held_back.labels,
        result.held_back.probabilities,
        decisions.max_escape_rate,
        decisions.review_share,
    )
    mlflow.log_metrics(asdict(point))
    example = (folder / data.paths[0]).read_bytes()
    curves = plots.learning_curves(name, result.history, result.best_epoch)
    mlflow.log_figure(curves, "learning_curves.png")
    return Fitted(
        name=name,
        best_epoch=result.best_epoch,
        val_accuracy=result.best["val_accuracy"],
        val_loss=result.best["val_loss"],
        seconds=result.seconds,
        run_id=mlflow.active_run().info.run_id,
        model_uri=tracking.log_model(
            result.model, litert, quantize, point, Scope.of(data.images), example
        ),
    )


def _log_fit(schedule: Schedule, sampling: Sampling, images: np.ndarray) -> None:
    mlflow.log_params(
        asdict(schedule) | {"image_size": list(images.shape[1:3]), "variants": sampling.variants}
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
    sampling: Sampling,
    schedule: Schedule,
    device: str,
) -> CrossValidated:
    """Fit a model for each fold of the training pictures, score it on the fold and log that.

    No photograph is cut apart, nor by the pictures that the best epoch is chosen by: those are
    held back from the other folds.

    Raises:
        PipelineError: as `fit` raises it.
    """
    from defect_detection import devices, features, model, training  # TensorFlow, as in `fit`

    data, photographs = split.training, split.training_photographs
    _log_fit(schedule, sampling, data.images)
    found = CrossValidated(name, [], [])
    divided = dataset.folds(data.labels, photographs, folds, schedule.seed)
    for others, _ in divided:
        labels, of = data.labels[others], photographs[others]
        dataset.validation_parts(labels, of, schedule.validation_share, schedule.seed)
    with devices.chosen(device, make_model, data.images, data.labels) as chosen:
        mlflow.set_tags(chosen.tags())
        computed = features.compute(make_model(), data, photographs, sampling)
        for number, (others, fold) in enumerate(divided, start=1):
            training.make_deterministic(schedule.seed)
            fitted = training.fit(make_model(), computed.among(others), schedule)
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
        "called_unknown": evaluated.unknown.count,
    }
    if unseen.pictures:
        low, high = unseen.bounds
        figures |= {"acc_unseen": unseen.accuracy, "acc_unseen_low": low, "acc_unseen_high": high}
    if split.leaked.any():
        right = metrics.is_right(evaluated.labels, evaluated.probabilities, THRESHOLD)
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


def require_parity(
    model_uri: str, classifier: Classifier, split: Split, evaluated: Evaluated
) -> None:
    """Compare what serves with the Keras model on all test pictures; log and print how near it is.

    Raises:
        PipelineError: it is not near enough.
    """
    keras = registry.load_keras(model_uri, classifier.image_size)
    thresholds = (classifier.point.threshold, THRESHOLD)
    found = parity.compare(keras, split.testing.images, evaluated.probabilities, thresholds)
    mlflow.log_metrics(
        {"parity_largest_difference": found.largest, "parity_verdicts_flipped": found.flipped}
    )
    print(f"LiteRT against Keras: {found}")
    quantize = classifier.quantize
    if not found.within(quantize):
        raise PipelineError(
            f"Not registered, since LiteRT does not judge as Keras does: {found}; with quantize: "
            f"{quantize} {parity.TOLERANCES[quantize]:g} and no flip are allowed. "
            + ("" if quantize == "none" else "Set quantize: none in src/config.yaml. ")
            + "Train again"
        )


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
        unknown=Rate(sum(map(bool, classifier.outside(pictures))), len(pictures)),
        unseen=metrics.unseen(
            labels[unseen], probabilities[unseen], photographs[unseen], THRESHOLD
        ),
        leaked_share=split.leaked_share,
        test_digest=split.testing.digest,
        labels=labels,
        probabilities=probabilities,
        maps=maps,
    )


class Champions:
    """The versions found behind prod, judged on the test pictures of an evaluation."""

    def __init__(self, split: Split, folder: Path, cache: Path):
        self._split, self._folder, self._cache = split, folder, cache
        self._judged: dict[int, Evaluated | None] = {}

    def add(self, version: Version, evaluated: Evaluated) -> None:
        """Take a version in that was judged on these pictures."""
        self._judged[version.number] = evaluated

    def judged(self, version: Version) -> Evaluated | None:
        """Judge a version on these pictures; None, with a warning, if it cannot be run."""
        if version.number not in self._judged:
            try:
                classifier = registry.load_classifier(version.uri)
            except PipelineError as error:
                log.warning("%s cannot be compared: %s", version.uri, error)
                self._judged[version.number] = None
            else:
                testing, size = self._split.testing, classifier.image_size
                if size != testing.images.shape[1:3]:
                    testing = dataset.load(self._folder, "test", size, self._cache)
                self._judged[version.number] = judge(classifier, testing.images, self._split)
        return self._judged[version.number]

    def compare(self, champion: Version, evaluated: Evaluated) -> Comparison | None:
        """Compare what was evaluated with a version; None if that cannot be run."""
        judged = self.judged(champion)
        if judged is None:
            return None
        return metrics.compare(
            evaluated.labels,
            judged.probabilities,
            evaluated.probabilities,
            self._split.testing_photographs,
        )

    def bring_up_to_date(self, version: Version) -> bool:
        """Write a version's figures on these pictures to it, unless it has them.

        Returns:
            Whether it can be run.
        """
        judged = self.judged(version)
        if judged is not None and version.test_digest != judged.test_digest:
            # What of these pictures it was trained on is not known.
            tags = judged.tags() | {"acc_unseen": "unknown", "leaked_share": "unknown"}
            acc, text = judged.scores.accuracy, f"{_described(judged)} Scored again."
            registry.update(version, acc, tags, text)
            print(f"{version.uri} scored again on these pictures: accuracy {acc:.4f}")
        return judged is not None


def evaluate_and_register(
    classifier: Classifier,
    trained: Fitted | BestModel,
    split: Split,
    folder: Path,
    cache: Path,
    names: MLflowNames,
    decisions: Decisions,
    by: str,
    prefix: str = "",
) -> Version:
    """Score a model, register it, decide the alias and log the report.

    Args:
        classifier: the model.
        trained: where it was logged, and its validation accuracy.
        split: the pictures.
        folder: where they lie.
        cache: folder of decoded pictures.
        names: of the registered models.
        decisions: what the plant asks for.
        by: whose doing it is.
        prefix: stands before the figures' names, for a run that has training figures too.

    Raises:
        PipelineError: its LiteRT form does not judge as the Keras model does.
    """
    evaluated = evaluate(classifier, split, folder, prefix)
    require_parity(trained.model_uri, classifier, split, evaluated)
    champions = Champions(split, folder, cache)
    registered = register(trained, evaluated, names, decisions.promotion, champions, by)
    publish(classifier, split, folder, evaluated, registered, decisions.max_escape_rate)
    return registered.version


def register(
    trained: Fitted | BestModel,
    evaluated: Evaluated,
    names: MLflowNames,
    rule: str,
    champions: Champions,
    by: str,
) -> Registered:
    """Register a logged model under the name that its test accuracy earns; decide the alias.

    Before, it is compared with the version behind prod on the same pictures.

    Args:
        trained: the logged model.
        evaluated: what it is worth.
        names: of the registered models.
        rule: "highest_acc", or "significant": it may have the alias only if it is better than
            the version behind prod beyond chance.
        champions: judges versions that are behind prod.
        by: whose doing it is.
    """
    scores = evaluated.scores
    name = registry.gate(scores.accuracy, names)
    champion = registry.behind_alias(names.production_model_name, registry.PRODUCTION_ALIAS)
    tags = evaluated.tags()
    comparison, compared = None, "No version was behind prod to compare with."
    if champion is not None:
        comparison = champions.compare(champion, evaluated)
        known = f"{champion.name} version {champion.number}, behind {registry.PRODUCTION_ALIAS}"
        compared = f"{known}, cannot be run: not compared."
    if comparison is not None:
        compared = f"Compared with {known}: {comparison}"
        tags["comparison"] = compared
        mlflow.log_metrics(comparison.as_dict())
        if rule == "significant" and comparison.verdict != "better":
            tags[registry.QUALIFIED] = "false"
    description = (
        f"{_described(evaluated)} {evaluated.leaked_share:.1%} of them show a photograph of "
        f"training; {evaluated.unseen}. Validation accuracy {trained.val_accuracy:.4f}."
    )
    version = registry.register(
        trained.model_uri, trained.run_id, scores.accuracy, description, name, tags
    )
    mlflow.set_tags({"registered_version": version.uri, "comparison": compared})
    print(compared)
    in_production = False
    done = f"Registered as {version.name} version {version.number}"
    if name == names.testing_model_name:
        queued = registry.queue_for_retraining(names)
        decision = (
            f"{done}, below the threshold of {names.evaluation_threshold:.0%}; "
            f"{names.testing_model_alias} is version {queued.number}"
        )
    else:
        champions.add(version, evaluated)
        first = promotion.promote(name, evaluated.test_digest, champions.bring_up_to_date, by)
        in_production = first.number == version.number
        decision = (
            f"{done}; {registry.PRODUCTION_ALIAS} is version {first.number} with a test accuracy "
            f"of {first.acc:.4f}"
        )
        if not version.qualified:
            decision += ", since only a version that is better beyond chance replaces it"
    mlflow.set_tag("decision", decision)
    print(decision)
    return Registered(version, champion, comparison, decision, in_production)


def _described(evaluated: Evaluated) -> str:
    scores = evaluated.scores
    return (
        f"Test accuracy {scores.accuracy:.4f} on {scores.pictures} pictures: "
        f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts rejected."
    )


def publish(
    classifier: Classifier,
    split: Split,
    folder: Path,
    evaluated: Evaluated,
    registered: Registered,
    max_escape_rate: float,
) -> None:
    """Log the report of an evaluation, one HTML file, and say where it is."""
    run = mlflow.active_run()
    some = robustness.sample(len(split.testing))
    pictures = split.testing.images[some]
    page = report.html(
        evaluated,
        registered,
        classifier.point,
        max_escape_rate,
        split,
        folder,
        robustness.table(classifier, pictures, split.testing.labels[some]),
        robustness.repeatability(classifier, pictures),
        run.info.run_id,
        run.data.tags.get("mlflow.source.git.commit", "unknown"),
    )
    mlflow.log_text(page, report.FILE)
    print(f"Report: {mlflow.get_artifact_uri(report.FILE)}")
