"""The result of an evaluation."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from defect_detection.dataset.split import Dataset, Split
from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import ErrorRates, Rate, Scores, Unseen
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import ACCURACY_THRESHOLD, OperatingPoint
from defect_detection.runtime.preprocessing import ImageFormat


@dataclass(frozen=True)
class FieldResult:
    """How a model judges the field test set: approved images from the line.

    Attributes:
        data: the images.
        point: the model's operating point.
        probabilities: float32 (n,) of a defect, for each image.
    """

    data: Dataset
    point: OperatingPoint
    probabilities: np.ndarray

    @property
    def right(self) -> Rate:
        """Images that are judged right at the threshold 0.5."""
        right = metrics.is_right(self.data.labels, self.probabilities, ACCURACY_THRESHOLD)
        return Rate(int(right.sum()), len(right))

    @cached_property
    def error_rates(self) -> ErrorRates:
        """Error rates at the operating point, by photograph."""
        by_photograph = metrics.by_photograph(
            self.data.labels, self.probabilities, self.data.photographs
        )
        return metrics.error_rates(*by_photograph, self.point)

    def figures(self) -> dict[str, float]:
        """Return the figures by the names under which they are logged."""
        low, high = self.right.bounds
        rates = {f"field_{name}": value for name, value in self.error_rates.as_dict().items()}
        return rates | {
            "field_images": len(self.data),
            "field_photographs": len(np.unique(self.data.photographs)),
            "acc_field": self.right.share,
            "acc_field_low": low,
            "acc_field_high": high,
        }

    def tags(self) -> dict[str, str]:
        """Return the tags of a registered version."""
        return {
            "acc_field": repr(self.right.share),
            "field_escapes": str(self.error_rates.escapes),
            "field_overkill": str(self.error_rates.overkill),
            "field_digest": self.data.digest,
        }

    def __str__(self) -> str:
        """Return the figures in a sentence."""
        return (
            f"Field test set: {self.right} right at {ACCURACY_THRESHOLD}; by photograph, escapes "
            f"{self.error_rates.escapes}, overkill {self.error_rates.overkill}"
        )


@dataclass(frozen=True)
class Evaluation:
    """How a model judges the test images.

    Attributes:
        split: the images.
        takes: the pixels that the model takes.
        full_evidence: what heatmaps draw in full colour.
        point: the model's operating point.
        probabilities: float32 (n,) of a defect, for each test image.
        maps: float32 (n, h, w), evidence of a defect.
        unknown: test images that the model calls unknown.
        litert_sha256: of the model.
        field: how it judges the field test set, None if there is none.
    """

    split: Split
    takes: ImageFormat
    full_evidence: float | None
    point: OperatingPoint
    probabilities: np.ndarray
    maps: np.ndarray
    unknown: Rate
    litert_sha256: str = ""
    field: FieldResult | None = None

    @property
    def labels(self) -> np.ndarray:
        """Labels of the test images, (n,), 1 = defect."""
        return self.split.testing.labels

    @cached_property
    def scores(self) -> Scores:
        """Counts and rates at the threshold 0.5."""
        return metrics.score(self.labels, self.probabilities, ACCURACY_THRESHOLD)

    @cached_property
    def error_rates(self) -> ErrorRates:
        """Error rates at the operating point, by image."""
        return metrics.error_rates(self.labels, self.probabilities, self.point)

    @cached_property
    def photograph_error_rates(self) -> ErrorRates:
        """Error rates by photograph, which is judged by the mean of its images."""
        return metrics.error_rates(*self._by_photograph, self.point)

    @cached_property
    def photograph_scores(self) -> Scores:
        """Counts and rates by photograph at the threshold 0.5."""
        return metrics.score(*self._by_photograph, ACCURACY_THRESHOLD)

    @cached_property
    def _by_photograph(self) -> tuple[np.ndarray, np.ndarray]:
        return metrics.by_photograph(
            self.labels, self.probabilities, self.split.testing.photographs
        )

    @cached_property
    def unseen(self) -> Unseen:
        """The test images whose photograph is not in training, at the threshold 0.5."""
        unseen = ~self.split.leaked
        return metrics.unseen(
            self.labels[unseen],
            self.probabilities[unseen],
            self.split.testing.photographs[unseen],
            ACCURACY_THRESHOLD,
        )

    @cached_property
    def leaked_accuracy(self) -> float | None:
        """Accuracy at 0.5 on the test images whose photograph is in training; None without any."""
        leaked = self.split.leaked
        right = metrics.is_right(self.labels, self.probabilities, ACCURACY_THRESHOLD)
        return float(right[leaked].mean()) if leaked.any() else None

    def figures(self) -> dict[str, float]:
        """Return all figures by the names under which they are logged."""
        unseen = self.unseen
        found = self.scores.as_dict() | {
            "unseen_pictures": unseen.pictures,
            "unseen_photographs": unseen.photographs,
            "unseen_photographs_right": unseen.photographs_right,
            "called_unknown": self.unknown.count,
        }
        if unseen.pictures:
            low, high = unseen.bounds
            found |= {"acc_unseen": unseen.accuracy, "acc_unseen_low": low, "acc_unseen_high": high}
        if self.leaked_accuracy is not None:
            found["acc_leaked"] = self.leaked_accuracy
        for of, rates in (("", self.error_rates), ("photographs_", self.photograph_error_rates)):
            found |= {of + name: value for name, value in rates.as_dict().items()}
        return found | (self.field.figures() if self.field else {})

    def tags(self) -> dict[str, str]:
        """Return the tags of a registered version beside `acc`."""
        return {
            "acc_unseen": repr(self.unseen.accuracy) if self.unseen.pictures else "unknown",
            "leaked_share": repr(self.split.leaked_share),
            "escapes": str(self.error_rates.escapes),
            "overkill": str(self.error_rates.overkill),
        } | (self.field.tags() if self.field else {})

    def sentences(self) -> dict[str, str]:
        """Return the main figures in words, by name."""
        return {
            "escapes": str(self.error_rates.escapes),
            "overkill": str(self.error_rates.overkill),
            "escapes_by_photograph": str(self.photograph_error_rates.escapes),
            "overkill_by_photograph": str(self.photograph_error_rates.overkill),
            "sent_to_a_person": str(self.error_rates.reviewed),
            "escapes_past_review": str(self.error_rates.escapes_past_review),
            "overkill_past_review": str(self.error_rates.overkill_past_review),
            "called_unknown": str(self.unknown),
        }

    def summary(self) -> str:
        """Return the accuracy and the mistakes at 0.5 in a sentence."""
        scores = self.scores
        return (
            f"Test accuracy {scores.accuracy:.4f} on {scores.pictures} images: "
            f"{scores.defects_missed} defects let through, {scores.ok_rejected} good parts "
            f"rejected."
        )


def evaluate(classifier: Classifier, split: Split) -> Evaluation:
    """Judge the test images with a model.

    Raises:
        PipelineError: the model takes other pixels and the files have changed meanwhile.
    """
    images = split.testing.images_as(classifier.takes)
    probabilities, maps = classifier.examine(images)
    unknown = sum(map(bool, classifier.ood_reasons(images)))
    return Evaluation(
        split=split,
        takes=classifier.takes,
        full_evidence=classifier.full_evidence,
        point=classifier.point,
        probabilities=probabilities,
        maps=maps,
        unknown=Rate(unknown, len(images)),
        litert_sha256=classifier.litert_sha256,
        field=_field(classifier, split.field),
    )


def _field(classifier: Classifier, data: Dataset | None) -> FieldResult | None:
    if data is None:
        return None
    probabilities = classifier.probabilities(data.images_as(classifier.takes))
    return FieldResult(data, classifier.point, probabilities)
