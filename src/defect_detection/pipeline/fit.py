"""Fits a model to the training images, and measures by cross-validation how well that works."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from defect_detection.dataset import holdout
from defect_detection.dataset.split import Dataset
from defect_detection.evaluation import labels, metrics
from defect_detection.evaluation.labels import LabelError
from defect_detection.evaluation.metrics import Scores
from defect_detection.progress import Progress
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, OperatingPoint
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.ood import OodDetector
from defect_detection.settings import Decisions, FitParameters, Sampling

EVIDENCE_OF = 64  # defective images that say what strong evidence is
# Cost of a variant in an epoch, where that of a view of an image in the frozen layers is 1.
VARIANT_COST = 0.02

# TensorFlow takes 4 s to import, so it is imported after options, data and store are checked.
if TYPE_CHECKING:
    import keras

    from defect_detection.training.devices import Device
    from defect_detection.training.features import Features
    from defect_detection.training.fitting import TrainingResult


@dataclass(frozen=True)
class FitPlan:
    """How one model is made.

    Attributes:
        name: of the model in tables and figures.
        make_model: returns the model to fit; called after the seed is set.
        parameters: learning rate, batch size, epochs, share held out, seed.
        sampling: the variants that are drawn of the training images.
        decisions: what the threshold and the review band are chosen for.
        quantize: how the weights of the served model are stored, one of `settings.QUANTIZE`.
        device: "auto", "cpu" or "gpu".
        good_only: whether the model learns from good parts alone.
        layers: describes the network of a new model, for the record.
    """

    name: str
    make_model: "Callable[[], keras.Model]"
    parameters: FitParameters
    sampling: Sampling
    decisions: Decisions
    quantize: str
    device: str
    good_only: bool = False
    layers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> str:
        """The name of its frozen layers; plans with the same ones share their features."""
        known = {"good_only": self.good_only, **self.layers}
        return f"features {[known.get(name) for name in ('blocks', 'views', 'good_only')]}"


def costs(plans: list[FitPlan], fits: int = 1) -> dict[str, float]:
    """Return what the features and the epochs of plans cost, in any unit, for `Progress`.

    Args:
        plans: in one training.
        fits: to the same features, for each plan.
    """
    features = {one.frozen: one.layers.get("views", 2) * one.sampling.variants for one in plans}
    epochs = {
        one.name: fits * one.parameters.epochs * one.sampling.variants * VARIANT_COST
        for one in plans
    }
    return features | epochs


@dataclass(frozen=True)
class Observer:
    """What is told about a fit while it runs.

    Attributes:
        progress: has the parts of `costs`.
        on_device: is called with the device before the fit.
        on_epoch: is called after each epoch with its number, from 1, and its metrics.
        on_fold: is called with each fold of a cross-validation when it is scored.
    """

    progress: Progress
    on_device: "Callable[[Device], None]"
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None
    on_fold: "Callable[[Fold], None]" = lambda fold: None


class Engine(Protocol):
    """What fits: this module, or a cluster."""

    def fit(self, plan: FitPlan, data: Dataset, observer: Observer) -> "Fit":
        """Do as the function `fit` does."""

    def cross_validate(
        self, plan: FitPlan, data: Dataset, folds: int, observer: Observer
    ) -> "list[Fold]":
        """Do as the function `cross_validate` does."""


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Attributes:
        plan: how it was made.
        result: the Keras model, its history and what it says about held-out photographs.
        point: its threshold and review band.
    """

    plan: FitPlan
    result: "TrainingResult"
    point: OperatingPoint


def fit(plan: FitPlan, data: Dataset, observer: Observer) -> Fit:
    """Fit a model to images and choose its operating point.

    Args:
        plan: how.
        data: the images.
        observer: is told of the device and of each epoch.

    Raises:
        PipelineError: the fit diverged, there are too few photographs or variants, there is no GPU
            and the plan demands one, or the pretrained weights or disk space are lacking.
    """
    from defect_detection.training import (
        calibration,
        devices,
        fitting,
        network,
    )

    def each(epoch: int, values: dict[str, float]) -> None:
        observer.on_epoch(epoch, values)
        observer.progress.reached(plan.name, epoch / plan.parameters.epochs)

    _require_photographs(plan, data.labels, data.photographs)
    with devices.chosen(plan.device, plan.make_model, data.images, data.labels) as device:
        observer.on_device(device)
        fitting.make_deterministic(plan.parameters.seed)
        model = plan.make_model()
        network.require_contract(model)
        computed = _features(plan, model, data, observer.progress)
        result = _fit(plan, model, computed, each)
    found, share = result.held_out.probabilities, plan.decisions.review_share
    if result.good_only:
        return Fit(plan, result, calibration.around(ACCURACY_THRESHOLD, found, share))
    truth, most = result.held_out.labels, plan.decisions.max_escape_rate
    return Fit(plan, result, calibration.choose_operating_point(truth, found, most, share))


def _fit(
    plan: FitPlan,
    model: "keras.Model",
    features: "Features",
    on_epoch: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
) -> "TrainingResult":
    from defect_detection.training import fitting, good_only, network

    if network.is_good_only(model):
        most = plan.decisions.max_overkill_rate
        return good_only.fit(model, features, plan.parameters, most, on_epoch)
    return fitting.fit(model, features, plan.parameters, on_epoch)


def _features(plan: FitPlan, model: "keras.Model", data: Dataset, progress: Progress) -> "Features":
    from defect_detection.training import features

    found = features.compute(model, data, plan.sampling, partial(progress.reached, plan.frozen))
    progress.finished(plan.frozen)
    return found


def label_errors(fitted: Fit, data: Dataset) -> list[LabelError]:
    """Return the training images whose labels the fits that did not see them contradict."""
    held_out = fitted.result.held_out
    return labels.likely_errors(data, held_out.images, held_out.labels, held_out.probabilities)


def to_served(fitted: Fit, data: Dataset) -> ServedModel:
    """Convert a fitted model to LiteRT; its out-of-distribution limits are those of `data`."""
    from defect_detection.training import network

    quantize = fitted.plan.quantize
    litert = network.to_litert(fitted.result.model, quantize)
    return ServedModel(
        litert=litert,
        takes=data.format,
        point=fitted.point,
        ood=OodDetector.fit(data.images),
        quantize=quantize,
        full_evidence=(
            network.limit(fitted.result.model)
            if fitted.result.good_only
            else _full_evidence(Classifier(ServedModel(litert, data.format)), data)
        ),
    )


def _full_evidence(classifier: Classifier, data: Dataset) -> float:
    """Return the strongest evidence in the map of an ordinary defect."""
    defects = np.flatnonzero(data.labels == 1)
    some = defects[np.linspace(0, len(defects) - 1, min(len(defects), EVIDENCE_OF)).astype(int)]
    _, maps = classifier.examine(data.images[some])
    return float(np.median(maps.max((1, 2))))


@dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation.

    Attributes:
        number: from 1.
        of: how many folds there are.
        images: scores of its images at the threshold 0.5.
        photographs: scores of its photographs, by the mean of their images.
    """

    number: int
    of: int
    images: Scores
    photographs: Scores


def cross_validate(plan: FitPlan, data: Dataset, folds: int, observer: Observer) -> list[Fold]:
    """Fit a model for each fold of the images and score it on the fold.

    No photograph is divided, neither by the folds nor by the inner folds of the others that are
    held out to choose the best epoch.

    Args:
        plan: how each model is made.
        data: the images.
        folds: how many.
        observer: is told of the device and of each fold.

    Raises:
        PipelineError: as `fit` raises it.
    """
    with _prepared(plan, data, folds, observer) as score:
        return collect(plan, folds, score, observer)


def collect(
    plan: FitPlan, folds: int, score: Callable[[int], Fold], observer: Observer
) -> list[Fold]:
    """Score all folds of a cross-validation, in order, and report each.

    Args:
        plan: how each model is made.
        folds: how many.
        score: returns a fold by its number, from 1.
        observer: is told of each fold.
    """
    scored = []
    for number in range(1, folds + 1):
        scored.append(score(number))
        observer.on_fold(scored[-1])
        observer.progress.reached(plan.name, number / folds)
    return scored


def one_fold(plan: FitPlan, data: Dataset, fold: tuple[int, int], observer: Observer) -> Fold:
    """Fit a model without one fold of the images and score it on the fold.

    Args:
        plan: how the model is made.
        data: the images.
        fold: its number, from 1, and how many there are.
        observer: is told of the device.

    Raises:
        PipelineError: as `fit` raises it.
    """
    number, folds = fold
    with _prepared(plan, data, folds, observer) as score:
        return score(number)


@contextmanager
def _prepared(
    plan: FitPlan, data: Dataset, folds: int, observer: Observer
) -> Iterator[Callable[[int], Fold]]:
    """Compute once what all folds need; yield what fits and scores one by its number."""
    from defect_detection.training import devices, fitting

    labels, photographs = data.labels, data.photographs
    divided = holdout.folds(labels, photographs, folds, plan.parameters.seed)
    for others, _ in divided:
        _require_photographs(plan, labels[others], photographs[others])
    with devices.chosen(plan.device, plan.make_model, data.images, labels) as device:
        observer.on_device(device)
        computed = _features(plan, plan.make_model(), data, observer.progress)

        def score(number: int) -> Fold:
            others, rows = divided[number - 1]
            fitting.make_deterministic(plan.parameters.seed)
            fitted = _fit(plan, plan.make_model(), computed.among(others))
            return _score(fitted, data, rows, number, folds)

        yield score


def _score(fitted: "TrainingResult", data: Dataset, rows: np.ndarray, number: int, of: int) -> Fold:
    from defect_detection.training import network

    classifier = Classifier(ServedModel(network.to_litert(fitted.model), data.format))
    labels, probabilities = data.labels[rows], classifier.probabilities(data.images[rows])
    by_photograph = metrics.by_photograph(labels, probabilities, data.photographs[rows])
    return Fold(
        number,
        of,
        metrics.score(labels, probabilities, ACCURACY_THRESHOLD),
        metrics.score(*by_photograph, ACCURACY_THRESHOLD),
    )


def _require_photographs(plan: FitPlan, labels: np.ndarray, photographs: np.ndarray) -> None:
    """Raise PipelineError if there are too few photographs, before minutes of computing."""
    share, seed = plan.parameters.validation_share, plan.parameters.seed
    if plan.good_only:
        holdout.parts(photographs[labels == 0], share, seed)
        return
    holdout.validation_folds(labels, photographs, share, seed)
